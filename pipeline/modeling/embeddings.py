"""Input embeddings of both networks, and the LayerNorm that every module uses.

    generator      E_G[ids] -> LayerNorm -> padding mask -> dropout
    discriminator  stop_gradient(E_G)[ids] + Delta[ids] -> the same (gradient-disentangled sharing,
                   arXiv:2111.09543, section 3.2)

No position enters here (position_biased_input is false): the encoder sees relative positions, and
the generator's absolute ones enter in its decoder (`encoder.py`).

Letters: B sequences, L sequence length, K masked slots per sequence, D hidden size, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey, DropoutSite, dropout

PAD_ID = 0
_EMBEDDINGS_LAYER = 1 << 16  # a dropout layer number that no encoder layer has


def dropout_site(key: DropoutKey | None, layer: int, where: int) -> DropoutSite | None:
    """Name a dropout site, or none outside training.

    Args:
        key: The micro step's key; None outside training.
        layer: Layer number.
        where: Which dropout of the layer.

    Returns:
        The site.
    """
    return None if key is None else key.site(layer, where)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose arithmetic is in the wider dtype of input and weights.

    torch computes the statistics of half precision inputs in fp32, but refuses an fp32 input with
    half precision weights, which is what the fp32 sum of two embedding tables is.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension.

        Args:
            input: [.., D].

        Returns:
            [.., D] in the wider dtype of the input and the weights.
        """
        wide = torch.promote_types(input.dtype, self.weight.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps)


class DeltaEmbedding(nn.Module):
    """Delta of gradient-disentangled embedding sharing, under the released name `_weight`.

    Args:
        vocab_size: Rows, V.
        hidden_size: Width, D.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._weight = nn.Parameter(torch.zeros(vocab_size, hidden_size))

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        """Look up rows.

        Args:
            input_ids_BL: int64 [B, L].

        Returns:
            [B, L, D]; the padding row gets no gradient, as in the released code.
        """
        return F.embedding(input_ids_BL, self._weight, padding_idx=PAD_ID)


class _NormalizedEmbeddings(nn.Module):
    """What both networks do with their embeddings after the lookup."""

    def __init__(self, network: NetworkSection) -> None:
        super().__init__()
        self.LayerNorm = LayerNorm(network.hidden_size, network.layer_norm_eps)
        self.dropout_prob = network.hidden_dropout_prob

    def normalize(
        self,
        embeddings_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Normalize, mask and drop, then round to the dtype of the weights.

        Args:
            embeddings_BLD: [B, L, D], fp32 where two tables were added.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D] in the compute dtype.
        """
        hidden_BLD = self.LayerNorm(embeddings_BLD)
        if attention_mask_BL is not None:
            hidden_BLD = hidden_BLD * attention_mask_BL[:, :, None].to(hidden_BLD.dtype)
        site = dropout_site(dropout_key, _EMBEDDINGS_LAYER, 0)
        return dropout(hidden_BLD, self.dropout_prob, site).to(self.LayerNorm.weight.dtype)


class GeneratorEmbeddings(_NormalizedEmbeddings):
    """E_G, its LayerNorm, and the absolute positions that only the decoder reads.

    Args:
        network: The generator's section.
        model: Vocabulary size.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__(network)
        self.word_embeddings = nn.Embedding(
            model.vocab_size, network.hidden_size, padding_idx=PAD_ID
        )
        self.position_embeddings = nn.Embedding(
            network.max_position_embeddings, network.hidden_size
        )

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Embed tokens.

        Args:
            input_ids_BL: int64 [B, L].
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D].
        """
        embeddings_BLD = self.word_embeddings(input_ids_BL)
        return self.normalize(embeddings_BLD, attention_mask_BL, dropout_key)


class DiscriminatorEmbeddings(_NormalizedEmbeddings):
    """Delta and its own LayerNorm on top of the generator's table.

    Args:
        network: The discriminator's section.
        model: Vocabulary size.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__(network)
        self.word_embeddings = DeltaEmbedding(model.vocab_size, network.hidden_size)

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        base_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Embed tokens as stop_gradient(E_G) + Delta (arXiv:2111.09543, section 3.2).

        Args:
            input_ids_BL: int64 [B, L].
            base_BLD: fp32 [B, L, D], rows of E_G.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D].
        """
        # In fp32: Delta starts at zero, and its first steps would vanish beside E_G in bf16.
        wide = torch.promote_types(base_BLD.dtype, torch.float32)
        embeddings_BLD = base_BLD.detach().to(wide) + self.word_embeddings(input_ids_BL).to(wide)
        return self.normalize(embeddings_BLD, attention_mask_BL, dropout_key)
