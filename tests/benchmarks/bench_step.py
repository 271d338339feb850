"""The step's algorithm: forward and backward of both networks on one masked micro batch.

    ours          decoder on masked slots, keys and values once, logits at the slots in chunks,
                  gathered rows of E_G and Delta
    transformers  what one writes first: DebertaV2ForMaskedLM with logits at every position, draws
                  by multinomial, DebertaV2Model on the whole sum E_G + Delta

The peer has no enhanced mask decoder and computes less than DeBERTaV3 asks for. Masks are chosen
and the optimizer is left out on both sides. On a GPU the shapes are deberta_v3_large's in bf16 with
dropout 0.1, and both are also measured with `torch.compile` on every layer and without dropout.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DebertaV2ForMaskedLM, DebertaV2Model

from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.counter_rng import DropoutKey
from pipeline.flops import peak_flops, training_flops_per_token
from pipeline.masking import MaskedBatch, MaskingVocabulary, MaskKeys, choose_masks
from pipeline.modeling.pair import NetworkPair, shared_rows
from pipeline.rtd import DrawKey, corrupt
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, device_seconds, main, measure
from tests.reference.transformers_encoder import transformers_config

RTD_LOSS_WEIGHT = 50.0
ROUNDS = {"cpu": 4, "cuda": 10}
SEQUENCES = 16
QUARTER_OF_LARGE = [
    "data.sequence_length=128",
    "model.vocab_size=32_100",
    *(
        f"{network}.{key}"
        for network in ("generator", "discriminator")
        for key in (
            "hidden_size=256",
            "num_attention_heads=4",
            "intermediate_size=1024",
            "max_position_embeddings=128",
            "position_buckets=64",
            "hidden_dropout_prob=0.0",
            "attention_probs_dropout_prob=0.0",
        )
    ),
    "generator.num_hidden_layers=6",
    "discriminator.num_hidden_layers=12",
]


@dataclass
class Batch:
    """One micro batch with its masks."""

    ids: torch.Tensor
    masked: MaskedBatch
    draw: DrawKey

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return self.ids.numel()


def make_batch(config: RunConfig, device: torch.device) -> Batch:
    """Full sequences of random ids."""
    length, vocab_size = config.data.sequence_length, config.model.vocab_size
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab_size - 100, (SEQUENCES, length), generator=draws).to(device)
    words = torch.arange(2 * SEQUENCES, device=device).view(SEQUENCES, 2)
    masked = choose_masks(
        ids,
        torch.full((SEQUENCES,), length, device=device),
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
        self.pair.init_weights(0)

    def layers(self) -> list[nn.Module]:
        """What a compiler is given."""
        return [
            *self.pair.generator.deberta.encoder.layer,
            *self.pair.discriminator.deberta.encoder.layer,
        ]

    def train_on(self, batch: Batch, drops: bool) -> None:
        """Forward and backward of both networks."""
        device = batch.ids.device
        keys = [
            DropoutKey.derive(0, name, 0, 0, 0, device) if drops else None
            for name in ("generator", "discriminator")
        ]
        slots = batch.masked
        out = self.pair.generator(
            slots.masked_ids_BL,
            None,
            slots.positions_BK,
            slots.valid_BK,
            slots.targets_BK,
            batch.draw,
            keys[0],
        )
        (out.loss_sum / slots.valid_BK.sum()).backward()
        ids, is_replaced = corrupt(batch.ids, slots.positions_BK, slots.valid_BK, out.drawn_BK)
        rows = shared_rows(self.pair.generator, self.pair.discriminator, ids)
        rtd = self.pair.discriminator(ids, rows, None, is_replaced.float(), keys[1])
        (RTD_LOSS_WEIGHT * rtd.loss_sum / ids.numel()).backward()


class Theirs(nn.Module):
    """The same objective from transformers' classes."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        encoders = [
            transformers_config(network, config.model.vocab_size)
            for network in (config.generator, config.discriminator)
        ]
        width = config.discriminator.hidden_size
        self.generator = DebertaV2ForMaskedLM(encoders[0])
        self.discriminator = DebertaV2Model(encoders[1])
        # Fed with embeddings; its own table would only take memory.
        self.discriminator.embeddings.word_embeddings = nn.Embedding(1, width)
        self.delta = nn.Parameter(torch.zeros(config.model.vocab_size, width))
        self.norm = nn.LayerNorm(width, config.discriminator.layer_norm_eps)
        self.dense, self.classifier = nn.Linear(width, width), nn.Linear(width, 1)

    def layers(self) -> list[nn.Module]:
        """What a compiler is given."""
        return [*self.generator.deberta.encoder.layer, *self.discriminator.encoder.layer]

    def train_on(self, batch: Batch, drops: bool) -> None:
        """Forward and backward of both networks."""
        self.train(drops)
        is_masked = batch.masked.masked_ids_BL != batch.ids
        labels = batch.ids.masked_fill(~is_masked, -100)
        out = self.generator(batch.masked.masked_ids_BL, labels=labels)
        probabilities = out.logits.detach()[is_masked].float().softmax(-1)
        out.loss.backward()
        ids = batch.ids.masked_scatter(is_masked, probabilities.multinomial(1))
        del out, probabilities
        table = self.generator.get_input_embeddings().weight.detach() + self.delta
        states = self.discriminator(inputs_embeds=F.embedding(ids, table)).last_hidden_state
        scored = F.gelu(self.dense(self.norm(states[:, :1] + states)))
        logits = self.classifier(scored)[..., 0].float()
        loss = F.binary_cross_entropy_with_logits(logits, (ids != batch.ids).float())
        (RTD_LOSS_WEIGHT * loss).backward()


def case(
    name: str, model: nn.Module, batch: Batch, *, drops: bool = True, optional: bool = False
) -> Case:
    """Train on the batch without gradients from before."""

    def prepare():
        model.zero_grad(set_to_none=True)

    return Case(name, lambda: model.train_on(batch, drops), prepare, optional)


def compiled(model: nn.Module) -> nn.Module:
    """Compile layer by layer: one graph serves all, and only they are hot."""
    for layer in model.layers():
        layer.compile()
    return model


def peak_gib(each: Case, models: list[nn.Module]) -> float:
    """Memory that a case needs on top of all weights."""
    for model in models:
        model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    each.run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def on_cpu(config: RunConfig) -> Outcome:
    batch = make_batch(config, torch.device("cpu"))
    cases = [
        case("ours", Ours(config), batch, drops=False),
        case("transformers", Theirs(config), batch, drops=False),
    ]
    seconds, notes = measure(cases, ROUNDS["cpu"], cpu_seconds)
    return Outcome(
        benchmark="step",
        unit="tokens",
        work=batch.tokens,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[("ours", "transformers")],
        shape={"words": QUARTER_OF_LARGE, "sequences": SEQUENCES, "dtype": "float32"},
        notes=notes,
    )


def on_gpu(config: RunConfig) -> Outcome:
    device = torch.device("cuda")
    batch = make_batch(config, device)

    def build(kind: type[nn.Module]) -> nn.Module:
        return kind(config).to(device, torch.bfloat16)

    ours, theirs, ours_compiled, theirs_compiled = map(build, (Ours, Theirs, Ours, Theirs))
    cases = [
        case("ours", ours, batch),
        case("ours, no dropout", ours, batch, drops=False),
        case("ours, compiled layers", compiled(ours_compiled), batch, optional=True),
        case("transformers", theirs, batch),
        case("transformers, no dropout", theirs, batch, drops=False),
        case("transformers, compiled layers", compiled(theirs_compiled), batch, optional=True),
    ]
    seconds, notes = measure(cases, ROUNDS["cuda"], device_seconds)
    models = [ours, theirs, ours_compiled, theirs_compiled]
    outcome = Outcome(
        benchmark="step",
        unit="tokens",
        work=batch.tokens,
        clock="seconds",
        seconds=seconds,
        pairs=[
            ("ours", "transformers"),
            ("ours, no dropout", "transformers, no dropout"),
            ("ours", "transformers, compiled layers"),
            ("ours, compiled layers", "transformers, compiled layers"),
        ],
        shape={"preset": "deberta_v3_large", "sequences": SEQUENCES, "dtype": "bfloat16"},
        facts={
            f"GiB on top of weights, {each.name}": peak_gib(each, models)
            for each in cases
            if each.name in seconds
        },
        notes=notes,
    )
    peak = peak_flops(torch.cuda.get_device_name())
    if peak:
        flops = training_flops_per_token(config)
        outcome.facts |= {f"MFU, {name}": outcome.rate(name) * flops / peak for name in seconds}
    return outcome


def benchmark(device: str) -> Outcome:
    if device == "cpu":
        return on_cpu(load_run_config("deberta_v3_large", QUARTER_OF_LARGE))
    return on_gpu(load_run_config("deberta_v3_large", []))


if __name__ == "__main__":
    main(benchmark)
