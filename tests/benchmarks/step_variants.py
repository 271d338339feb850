"""Ways to take a training step of replaced token detection that have the same losses and gradients.

    Ours              decoder on masked slots, keys and values once, logits at the slots in chunks,
                      gathered rows of E_G and Delta, any backend, compiled or not
    TransformersPair  transformers' layers in one of three algorithms
        naive         logits at every position, draws by multinomial, the whole sum E_G + Delta
        masked        logits at the masked positions, gathered rows of E_G and Delta
        original      the released code's: the enhanced mask decoder on every row, two passes behind
                      a last layer whose output nobody reads; masked logits; the whole sum

`naive` and `masked` have no enhanced mask decoder and compute less than DeBERTaV3 asks for; where
losses are compared with them, ours does without it too (`agreement`). A variant's `train_on` is the
forward and the backward pass of both networks; draws may be given, so that all read the same ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DebertaV2Model

from pipeline.config import RunConfig
from pipeline.counter_rng import DropoutKey
from pipeline.masking import MaskedBatch, MaskingVocabulary, MaskKeys, choose_masks
from pipeline.modeling.pair import NetworkPair, shared_rows
from pipeline.rtd import DrawKey, corrupt
from tests.reference.transformers_encoder import transformers_config

RTD_LOSS_WEIGHT = 50.0
Algorithm = Literal["naive", "masked", "original"]


@dataclass
class Batch:
    """One micro batch of full sequences with its masks."""

    ids: torch.Tensor
    masked: MaskedBatch
    draw: DrawKey

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return self.ids.numel()

    @property
    def is_masked(self) -> torch.Tensor:
        """bool [B, L]."""
        return self.masked.masked_ids_BL != self.ids


@dataclass
class Losses:
    """What a step computed."""

    mlm: torch.Tensor
    rtd: torch.Tensor
    drawn_BK: torch.Tensor


def make_batch(config: RunConfig, sequences: int, device: torch.device) -> Batch:
    """Full sequences of random ids."""
    length, vocab_size = config.data.sequence_length, config.model.vocab_size
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab_size - 100, (sequences, length), generator=draws).to(device)
    words = torch.arange(2 * sequences, device=device).view(sequences, 2)
    masked = choose_masks(
        ids,
        torch.full((sequences,), length, device=device),
        words,
        config.objective,
        MaskKeys.derive(0, "train", length),
        MaskingVocabulary(vocab_size - 100),
    )
    return Batch(ids, masked, DrawKey((3, 4), words))


class Ours(nn.Module):
    """Our networks, trained as `pipeline.step` does."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.pair = NetworkPair(config)
        self.between = lambda: None
        """Called between the generator's backward and the discriminator's forward pass."""

    def train_on(self, batch: Batch, drops: bool, drawn_BK: torch.Tensor | None = None) -> Losses:
        """Forward and backward of both networks."""
        generator, discriminator = self.pair.generator, self.pair.discriminator
        keys = [
            DropoutKey.derive(0, name, 0, 0, 0, batch.ids.device) if drops else None
            for name in ("generator", "discriminator")
        ]
        slots = batch.masked
        out = generator(
            slots.masked_ids_BL,
            None,
            slots.positions_BK,
            slots.valid_BK,
            slots.targets_BK,
            batch.draw,
            keys[0],
        )
        mlm = out.loss_sum / slots.valid_BK.sum()
        mlm.backward()
        drawn_BK = out.drawn_BK if drawn_BK is None else drawn_BK
        del out
        self.between()
        ids, is_replaced = corrupt(batch.ids, slots.positions_BK, slots.valid_BK, drawn_BK)
        rows = shared_rows(generator, discriminator, ids)
        rtd = discriminator(ids, rows, None, is_replaced.float(), keys[1]).loss_sum / ids.numel()
        (RTD_LOSS_WEIGHT * rtd).backward()
        return Losses(mlm.detach(), rtd.detach(), drawn_BK)

    @contextmanager
    def without_mask_decoder(self) -> Iterator[None]:
        """Decode as peers do that have no enhanced mask decoder."""
        generator = self.pair.generator
        wanted, generator.enhanced_mask_decoder = generator.enhanced_mask_decoder, False
        try:
            yield
        finally:
            generator.enhanced_mask_decoder = wanted


class TransformersPair(nn.Module):
    """Both networks from transformers' layers, trained by one of three algorithms."""

    def __init__(self, config: RunConfig, algorithm: Algorithm) -> None:
        super().__init__()
        g, d, vocab_size = config.generator, config.discriminator, config.model.vocab_size
        self.algorithm = algorithm
        self.generator = DebertaV2Model(transformers_config(g, vocab_size))
        self.positions = nn.Embedding(g.max_position_embeddings, g.hidden_size)
        width = g.word_embedding_size
        self.mlm_dense = nn.Linear(g.hidden_size, width)
        self.mlm_norm = nn.LayerNorm(width, g.layer_norm_eps)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab_size))
        # Fed with embeddings; a table of its own would only take memory.
        self.discriminator = DebertaV2Model(transformers_config(d, 1))
        self.delta = nn.Parameter(torch.zeros(vocab_size, d.word_embedding_size))
        self.rtd_norm = nn.LayerNorm(d.hidden_size, d.layer_norm_eps)
        self.rtd_dense = nn.Linear(d.hidden_size, d.hidden_size)
        self.rtd_classifier = nn.Linear(d.hidden_size, 1)
        self.between = lambda: None

    @property
    def has_mask_decoder(self) -> bool:
        """Whether it computes what DeBERTaV3 asks for."""
        return self.algorithm == "original"

    def compile_layers(self) -> "TransformersPair":
        """Compile layer by layer: one graph serves all of a network, and only they are hot."""
        for encoder in (self.generator.encoder, self.discriminator.encoder):
            for layer in encoder.layer:
                layer.compile()
        return self

    def train_on(self, batch: Batch, drops: bool, drawn_BK: torch.Tensor | None = None) -> Losses:
        """Forward and backward of both networks."""
        self.train(drops)
        is_masked = batch.is_masked
        mlm, probabilities_NV = self._generate(batch, is_masked)
        mlm.backward()
        if drawn_BK is None:
            drawn_BK = probabilities_NV.multinomial(1).view(batch.ids.shape[0], -1)
        del probabilities_NV
        self.between()
        ids = batch.ids.masked_scatter(is_masked, drawn_BK)
        states = self.discriminator(inputs_embeds=self._corrupted_rows(ids)).last_hidden_state
        scored = F.gelu(self.rtd_dense(self.rtd_norm(states[:, :1] + states)))
        logits = self.rtd_classifier(scored)[..., 0].float()
        rtd = F.binary_cross_entropy_with_logits(logits, (ids != batch.ids).float())
        (RTD_LOSS_WEIGHT * rtd).backward()
        return Losses(mlm.detach(), rtd.detach(), drawn_BK)

    def _generate(self, batch: Batch, is_masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The generator's loss, and the distributions [N, V] at the masked positions."""
        ids = batch.masked.masked_ids_BL
        if self.algorithm == "original":
            states = self.generator(ids, output_hidden_states=True).hidden_states
            rows = self._enhanced_mask_decoder(states[-2])[is_masked]
        else:
            rows = self.generator(ids).last_hidden_state
            rows = rows.flatten(0, 1) if self.algorithm == "naive" else rows[is_masked]
        rows = self.mlm_norm(F.gelu(self.mlm_dense(rows)))
        logits = rows @ self.generator.get_input_embeddings().weight.T + self.mlm_bias
        if self.algorithm == "naive":
            labels = batch.ids.masked_fill(~is_masked, -100).flatten()
            at_slots = logits.detach()[is_masked.flatten()]
            # As DebertaV2ForMaskedLM: in the dtype of the network.
            return F.cross_entropy(logits, labels).float(), at_slots.float().softmax(-1)
        labels, at_slots = batch.ids[is_masked], logits.detach()
        loss = F.cross_entropy(logits.float(), labels)
        return loss, at_slots.float().softmax(-1)

    def _enhanced_mask_decoder(self, states_BLD: torch.Tensor) -> torch.Tensor:
        """Two passes of the last layer over every row, keys and values projected in each."""
        encoder = self.generator.encoder
        ones_BL = torch.ones(states_BLD.shape[:2], dtype=torch.int64, device=states_BLD.device)
        mask, relative = encoder.get_attention_mask(ones_BL), encoder.get_rel_pos(states_BLD)
        query = states_BLD + self.positions.weight[: states_BLD.shape[1]]
        for _ in range(2):
            query = encoder.layer[-1](
                states_BLD,
                mask,
                query_states=query,
                relative_pos=relative,
                rel_embeddings=encoder.get_rel_embedding(),
            )[0]
        return query

    def _corrupted_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """What the discriminator reads, by gradient-disentangled embedding sharing."""
        table = self.generator.get_input_embeddings().weight.detach()
        if self.algorithm == "masked":
            return F.embedding(ids, table) + F.embedding(ids, self.delta, padding_idx=0)
        return F.embedding(ids, table + self.delta)


RENAMED = {
    "generator.deberta.embeddings.position_embeddings.weight": "positions.weight",
    "generator.lm_predictions.lm_head.dense": "mlm_dense",
    "generator.lm_predictions.lm_head.LayerNorm": "mlm_norm",
    "generator.lm_predictions.lm_head.bias": "mlm_bias",
    "generator.deberta": "generator",
    "discriminator.deberta.embeddings.word_embeddings._weight": "delta",
    "discriminator.deberta": "discriminator",
    "discriminator.mask_predictions.LayerNorm": "rtd_norm",
    "discriminator.mask_predictions.dense": "rtd_dense",
    "discriminator.mask_predictions.classifier": "rtd_classifier",
}


def their_name(name: str) -> str:
    """A parameter of `NetworkPair` -> the one of `TransformersPair`."""
    for ours, theirs in RENAMED.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


@torch.no_grad()
def copy_weights(ours: Ours, theirs: TransformersPair) -> None:
    """Give the peer our weights."""
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.pair.named_parameters():
        weights[their_name(name)].copy_(parameter)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def agreement(ours: Ours, theirs: nn.Module, batch: Batch) -> dict[str, float]:
    """Compare losses and gradients without dropout on the same weights and draws.

    Args:
        ours: Whose weights and draws are taken.
        theirs: A `TransformersPair`, or another of ours.
        batch: A micro batch.

    Returns:
        Relative differences: "mlm_loss", "rtd_loss" and "gradient", of all gradients as one vector.
    """
    is_peer = isinstance(theirs, TransformersPair)
    if is_peer:
        copy_weights(ours, theirs)
    else:
        theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    if is_peer and not theirs.has_mask_decoder:
        with ours.without_mask_decoder():
            mine = ours.train_on(batch, drops=False)
    else:
        mine = ours.train_on(batch, drops=False)
    other = theirs.train_on(batch, drops=False, drawn_BK=mine.drawn_BK)
    found = dict((theirs if is_peer else theirs.pair).named_parameters())
    square, whole = 0.0, 0.0
    for name, parameter in ours.pair.named_parameters():
        gradient = found[their_name(name) if is_peer else name].grad
        if parameter.grad is None or gradient is None:
            assert not _any(parameter.grad), name
            assert not _any(gradient), name
            continue
        square += (gradient.double() - parameter.grad.double()).square().sum().item()
        whole += parameter.grad.double().square().sum().item()
    return {
        "mlm_loss": relative_difference(other.mlm, mine.mlm),
        "rtd_loss": relative_difference(other.rtd, mine.rtd),
        "gradient": (square / whole) ** 0.5,
    }


def _any(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
