"""Generator and Discriminator: the two networks of replaced token detection.

    Generator      masked ids -> embeddings -> encoder -> decoder at the slots -> loss and draws;
                   alone, it is a masked language model
    Discriminator  corrupted ids and rows of E_G -> embeddings -> encoder -> loss on every token

`pipeline.modeling.pair` puts them together. Both compute sums of losses; who trains them divides by
global counts. Nothing here knows of devices, precision or ranks: a module works in the dtype of its
weights, with sums, logits and losses in fp32 (fp64 in an fp64 module), and its dropout is a
function of an explicit key.

Letters: B sequences, L sequence length, K masked slots per sequence, E width of the word table,
D hidden size.
"""

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import ModelSection, NetworkSection, ObjectiveSection
from pipeline.counter_rng import DropoutKey, stream_key
from pipeline.modeling.embeddings import (
    DeltaEmbedding,
    DiscriminatorEmbeddings,
    GeneratorEmbeddings,
)
from pipeline.modeling.encoder import Encoder
from pipeline.modeling.heads import MlmPredictions, RtdHead
from pipeline.modeling.vocabulary_head import MlmOutput
from pipeline.rtd import DrawKey

EmbeddingsT = TypeVar("EmbeddingsT", GeneratorEmbeddings, DiscriminatorEmbeddings)


class RtdOutput(NamedTuple):
    """What the discriminator reports of a micro batch."""

    loss_sum: torch.Tensor
    """Scalar, fp32: sum of binary cross entropies over the tokens that are not padding, in nats."""
    logits_BL: torch.Tensor
    """fp32 [B, L]: logits of "replaced"; without a meaning at padding."""


class Backbone(nn.Module, Generic[EmbeddingsT]):
    """Embeddings and encoder under the released prefix `deberta`.

    Args:
        embeddings: The network's embeddings.
        encoder: The network's encoder.
    """

    def __init__(self, embeddings: EmbeddingsT, encoder: Encoder) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder


class Generator(nn.Module):
    """Masked language model with a tied, chunked softmax and, on request, the mask decoder.

    Args:
        network: [generator].
        model: [model].
        objective: Whether the enhanced mask decoder is used.
    """

    name = "generator"

    def __init__(
        self, network: NetworkSection, model: ModelSection, objective: ObjectiveSection
    ) -> None:
        super().__init__()
        self.initializer_range = network.initializer_range
        self.enhanced_mask_decoder = objective.enhanced_mask_decoder
        embeddings = GeneratorEmbeddings(network, model, objective.enhanced_mask_decoder)
        self.deberta = Backbone(embeddings, Encoder(network, model))
        self.lm_predictions = MlmPredictions(network, model)

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        positions_BK: torch.Tensor,
        valid_BK: torch.Tensor,
        targets_BK: torch.Tensor,
        draw: DrawKey | None,
        dropout: DropoutKey | None,
    ) -> MlmOutput:
        """Predict the masked slots and draw replacements for them.

        Args:
            input_ids_BL: int64 [B, L] with [MASK] in the slots.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            positions_BK: int64 [B, K], the slots; distinct within a sequence where valid.
            valid_BK: bool [B, K], False for slots that a short sequence does not have.
            targets_BK: int64 [B, K], the original tokens.
            draw: What the draws depend on; None draws nothing.
            dropout: Dropout of this micro step; None outside training.

        Returns:
            Loss sum, draws and correct predictions. Every parameter gets a gradient, which is zero
            where no slot is valid.
        """
        embeddings, encoder = self.deberta.embeddings, self.deberta.encoder
        hidden_BLD = embeddings(input_ids_BL, attention_mask_BL, dropout)
        position_rows_BKD = None
        if self.enhanced_mask_decoder:
            assert embeddings.position_embeddings is not None, "a decoder without positions"
            position_rows_BKD = embeddings.position_embeddings(positions_BK)
        decoded_BKD = encoder.decode(
            hidden_BLD, attention_mask_BL, dropout, positions_BK, position_rows_BKD
        )
        return self.lm_predictions.lm_head(
            decoded_BKD, embeddings.word_embeddings, valid_BK, targets_BK, positions_BK, draw
        )

    def token_embeddings(self, ids_BL: torch.Tensor, with_positions: bool = False) -> torch.Tensor:
        """Look up raw rows of E_G for the discriminator, with their gradient.

        Args:
            ids_BL: int64 [B, L].
            with_positions: Add the absolute positions, for a discriminator that is biased by them.

        Returns:
            fp32 [B, L, E] (fp64 from an fp64 module).
        """
        rows_BLE = self.deberta.embeddings.rows(ids_BL, with_positions)
        return rows_BLE.to(torch.promote_types(rows_BLE.dtype, torch.float32))

    def encode(
        self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the states after all layers, which an exported encoder must reproduce.

        Args:
            input_ids_BL: int64 [B, L].
            attention_mask_BL: bool [B, L], False at padding; None where there is none.

        Returns:
            [B, L, D], without dropout.
        """
        hidden_BLD = self.deberta.embeddings(input_ids_BL, attention_mask_BL, None)
        return self.deberta.encoder(hidden_BLD, attention_mask_BL, None)


class Discriminator(nn.Module):
    """Replaced token detection on embeddings that may be shared with the generator.

    Args:
        network: [discriminator].
        model: [model].
        objective: How embeddings are shared, and the head.
    """

    name = "discriminator"

    def __init__(
        self, network: NetworkSection, model: ModelSection, objective: ObjectiveSection
    ) -> None:
        super().__init__()
        self.initializer_range = network.initializer_range
        embeddings = DiscriminatorEmbeddings(network, model, objective.embedding_sharing)
        self.deberta = Backbone(embeddings, Encoder(network, model))
        self.mask_predictions = RtdHead(network, objective.rtd_head)

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        base_BLE: torch.Tensor | None,
        attention_mask_BL: torch.Tensor | None,
        labels_BL: torch.Tensor,
        dropout: DropoutKey | None,
    ) -> RtdOutput:
        """Score every token as original or replaced.

        Args:
            input_ids_BL: int64 [B, L], the corrupted tokens.
            base_BLE: fp32 [B, L, E], `Generator.token_embeddings` of the same ids; None for nes.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            labels_BL: [B, L], 1 where the token was replaced.
            dropout: Dropout of this micro step; None outside training.

        Returns:
            Loss sum over all tokens but padding ([CLS] and [SEP] included), and logits.
        """
        logits_BL = self.mask_predictions(
            self.encode(input_ids_BL, base_BLE, attention_mask_BL, dropout)
        )
        losses_BL = F.binary_cross_entropy_with_logits(
            logits_BL, labels_BL.to(logits_BL.dtype), reduction="none"
        )
        if attention_mask_BL is not None:
            losses_BL = torch.where(attention_mask_BL, losses_BL, 0.0)
        return RtdOutput(losses_BL.sum(), logits_BL)

    def encode(
        self,
        input_ids_BL: torch.Tensor,
        base_BLE: torch.Tensor | None,
        attention_mask_BL: torch.Tensor | None,
        dropout: DropoutKey | None = None,
    ) -> torch.Tensor:
        """Compute the states after all layers, which an exported encoder must reproduce.

        Args:
            input_ids_BL: int64 [B, L].
            base_BLE: fp32 [B, L, E], `Generator.token_embeddings` of the same ids; None for nes.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D].
        """
        hidden_BLD = self.deberta.embeddings(input_ids_BL, base_BLE, attention_mask_BL, dropout)
        return self.deberta.encoder(hidden_BLD, attention_mask_BL, dropout)


def init_weights(module: Generator | Discriminator, seed: int) -> None:
    """Fill the weights as a function of (seed, network, parameter name) alone.

    Every Linear and Embedding weight is N(0, initializer_range), the row of [PAD] included; biases
    are 0, LayerNorm weights 1, Delta 0; a convolution keeps torch's own law, as in the release.
    Drawn in fp32 on the host and rounded to the module's dtype, so that neither the device nor the
    order of construction matters.

    Args:
        module: Network with full (not partitioned) parameters.
        seed: The run's seed.

    Source:
        `nnmodule.py` (init_weights) of the release.
    """
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            full_name = f"{path}.{name}".lstrip(".")
            if isinstance(child, nn.Linear | nn.Embedding) and name == "weight":
                values = torch.empty(parameter.shape)
                generator = _random(module, seed, full_name)
                values.normal_(0.0, module.initializer_range, generator=generator)
            elif isinstance(child, nn.Conv1d):
                bound = (child.in_channels * child.kernel_size[0]) ** -0.5
                values = torch.empty(parameter.shape)
                values.uniform_(-bound, bound, generator=_random(module, seed, full_name))
            elif isinstance(child, nn.LayerNorm) and name == "weight":
                values = torch.ones(parameter.shape)
            elif isinstance(child, DeltaEmbedding) or name == "bias":
                values = torch.zeros(parameter.shape)
            else:
                raise TypeError(f"no initialization rule for {full_name}")
            with torch.no_grad():
                parameter.copy_(values)


def _random(module: Generator | Discriminator, seed: int, full_name: str) -> torch.Generator:
    """Seed torch's generator for one parameter."""
    words = stream_key(seed, f"init/{module.name}/{full_name}")
    return torch.Generator().manual_seed(words[0] | (words[1] & 0x7FFFFFFF) << 32)
