"""The heads. They differ in order: MLM is dense -> GELU -> LayerNorm, RTD is the reverse.

    generator      lm_predictions.lm_head    dense -> GELU -> LayerNorm -> tied word table + bias
    discriminator  mask_predictions          LayerNorm(h_CLS + h_i) -> dense -> GELU -> one logit
                   mask_predictions          dense -> GELU -> one logit (rtd_head = "electra")

Parameter names are those of the released checkpoints.

Letters: B sequences, L sequence length, K masked slots per sequence, D hidden size, E width of the
word table, V vocabulary.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import ModelSection, NetworkSection
from pipeline.modeling.embeddings import LayerNorm, compiles_layers
from pipeline.modeling.vocabulary_head import MlmOutput, vocabulary_head
from pipeline.modeling.vocabulary_sums import HeadForm
from pipeline.rtd import DrawKey


class MlmHead(nn.Module):
    """The generator's prediction head, tied to its word embeddings.

    Args:
        network: Sizes.
        model: Vocabulary size, and what computes a chunk of it: kernels, graphs or operations.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        width = network.word_embedding_size
        self.form: HeadForm = "compiled" if compiles_layers(model) else "torch"
        self.fuses = model.attention_backend == "triton"
        self.dense = nn.Linear(network.hidden_size, width)
        self.LayerNorm = LayerNorm(width, network.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(model.vocab_size))

    def forward(
        self,
        hidden_BKD: torch.Tensor,
        word_embeddings: nn.Embedding,
        valid_BK: torch.Tensor,
        targets_BK: torch.Tensor,
        positions_BK: torch.Tensor,
        draw: DrawKey | None,
    ) -> MlmOutput:
        """Predict the masked slots.

        Args:
            hidden_BKD: Decoder output at the slots.
            word_embeddings: The module that owns E_G. Its weight is read in this forward and
                nowhere else, which is what makes ZeRO-3 gather it here, forward and backward.
            valid_BK: bool [B, K], False for slots that a short sequence does not have.
            targets_BK: int64 [B, K].
            positions_BK: int64 [B, K].
            draw: What the draws depend on; None draws nothing.

        Returns:
            Loss sum, draws and correct predictions.
        """
        transformed_BKE = self.LayerNorm(F.gelu(self.dense(hidden_BKD)))
        return vocabulary_head(
            transformed_BKE,
            word_embeddings.weight,
            self.bias,
            valid_BK,
            targets_BK,
            positions_BK,
            draw,
            form="fused" if self.fuses else self.form,
            otherwise=self.form,
        )


class MlmPredictions(nn.Module):
    """Holds the head under its released name `lm_predictions.lm_head`.

    Args:
        network: Sizes.
        model: Vocabulary size.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.lm_head = MlmHead(network, model)


class RtdHead(nn.Module):
    """The discriminator's head: is this token the original?

    Args:
        network: Sizes.
        kind: "debertav3", or "electra" without the [CLS] state and the LayerNorm.
    """

    def __init__(self, network: NetworkSection, kind: Literal["debertav3", "electra"]) -> None:
        super().__init__()
        self.LayerNorm = None
        if kind == "debertav3":
            self.LayerNorm = LayerNorm(network.hidden_size, network.layer_norm_eps)
        self.dense = nn.Linear(network.hidden_size, network.hidden_size)
        self.classifier = nn.Linear(network.hidden_size, 1)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Score every token: w . GELU(W x_i + b) + c, with x_i = LayerNorm(h_CLS + h_i) or h_i.

        Args:
            hidden_BLD: Encoder output; row 0 is [CLS].

        Returns:
            fp32 [B, L] logits of "replaced" (fp64 in an fp64 model).

        Source:
            `replaced_token_detection_model.py` of the release; ELECTRA's `run_pretraining.py`.
        """
        if self.LayerNorm is not None:
            hidden_BLD = self.LayerNorm(hidden_BLD[:, :1] + hidden_BLD)
        logits_BL = self.classifier(F.gelu(self.dense(hidden_BLD))).squeeze(-1)
        return logits_BL.to(torch.promote_types(logits_BL.dtype, torch.float32))
