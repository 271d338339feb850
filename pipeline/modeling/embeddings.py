"""Input embeddings of both networks, and the LayerNorm that every module uses.

    generator      E_G[ids]
    discriminator  gdes  stop_gradient(E_G)[ids] + Delta[ids]
                   es    E_G[ids]
                   nes   a table of its own
    both           -> projection where the table is narrow -> LayerNorm -> padding mask -> dropout

In DeBERTaV3 no position enters here: the encoder sees relative ones, and the generator's absolute
ones enter in its decoder (`encoder.py`). A `position_biased_input` (BERT, ELECTRA) adds absolute
positions to the tokens' rows, shared between the networks by the same law.

Letters: B sequences, L sequence length, E width of the tables, D hidden size, V vocabulary.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey, DropoutSite
from pipeline.modeling.compiled import drop, normalized_sum

EmbeddingSharing = Literal["gdes", "es", "nes"]
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


def compiles_layers(model: ModelSection) -> bool:
    """Say whether a network is to compile the functions inside its layers.

    Args:
        model: [model].

    Returns:
        Whether model.compile is "layer".
    """
    return model.compile == "layer"


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose arithmetic is in the wider dtype of input and weights.

    torch computes the statistics of half precision inputs in fp32, but refuses an fp32 input with
    half precision weights, which is what the fp32 sum of two embedding tables is.
    """

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        bits: torch.Tensor | None = None,
        dropout_prob: float = 0.0,
    ) -> torch.Tensor:
        """Normalize the last dimension.

        Args:
            input: [.., D].
            residual: [.., D]; where given, LayerNorm(residual + dropout(input)) is one graph.
            bits: Which elements of the input stay (`compiled.draw_bits`); None for all.
            dropout_prob: Probability that the bits were drawn with.

        Returns:
            [.., D] in the wider dtype of the input and the weights.
        """
        if residual is not None:
            return normalized_sum(
                input, residual, self.weight, self.bias, self.eps, bits, dropout_prob
            )
        wide = torch.promote_types(input.dtype, self.weight.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps)


class DeltaEmbedding(nn.Module):
    """Delta of gradient-disentangled embedding sharing, under the released name `_weight`.

    Args:
        num_rows: Rows, V of the word table.
        width: Width of a row, E.
        padding_idx: Row whose lookups give no gradient.
    """

    def __init__(self, num_rows: int, width: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self._weight = nn.Parameter(torch.zeros(num_rows, width))
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows.

        Args:
            ids: int64, of any shape.

        Returns:
            [.., E]; the padding row gets no gradient, as in the released code.
        """
        return F.embedding(ids, self._weight, padding_idx=self.padding_idx)


class _Embeddings(nn.Module):
    """What both networks do with the sum of their tables: project, normalize, mask, drop.

    Args:
        network: Sizes and dropout.
        compiles: Whether dropout is a compiled graph.
    """

    def __init__(self, network: NetworkSection, compiles: bool) -> None:
        super().__init__()
        width = network.word_embedding_size
        self.embed_proj = None
        if width != network.hidden_size:
            self.embed_proj = nn.Linear(width, network.hidden_size, bias=False)
        self.LayerNorm = LayerNorm(network.hidden_size, network.layer_norm_eps)
        self.dropout_prob = network.hidden_dropout_prob
        self.compiles = compiles

    def normalize(
        self,
        embeddings_BLE: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Project where the tables are narrow, normalize, mask and drop, then round.

        Args:
            embeddings_BLE: [B, L, E], fp32 where tables of two networks were added.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D] in the dtype of the weights.
        """
        dtype = self.LayerNorm.weight.dtype
        if self.embed_proj is not None:
            embeddings_BLE = self.embed_proj(embeddings_BLE.to(dtype))
        hidden_BLD = self.LayerNorm(embeddings_BLE)
        if attention_mask_BL is not None:
            hidden_BLD = hidden_BLD * attention_mask_BL[:, :, None].to(hidden_BLD.dtype)
        site = dropout_site(dropout_key, _EMBEDDINGS_LAYER, 0)
        return drop(hidden_BLD, self.dropout_prob, site, self.compiles).to(dtype)


class GeneratorEmbeddings(_Embeddings):
    """E_G, and absolute positions for the input or for the enhanced mask decoder.

    Args:
        network: The generator's section.
        model: Vocabulary size.
        has_decoder: Whether the enhanced mask decoder reads positions.
    """

    def __init__(self, network: NetworkSection, model: ModelSection, has_decoder: bool) -> None:
        super().__init__(network, compiles_layers(model))
        width = network.word_embedding_size
        self.word_embeddings = nn.Embedding(model.vocab_size, width, padding_idx=PAD_ID)
        self.position_embeddings = None
        if has_decoder or network.position_biased_input:
            self.position_embeddings = nn.Embedding(network.max_position_embeddings, width)
        self.position_biased_input = network.position_biased_input

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
        rows_BLE = self.rows(input_ids_BL, with_positions=self.position_biased_input)
        return self.normalize(rows_BLE, attention_mask_BL, dropout_key)

    def rows(self, input_ids_BL: torch.Tensor, with_positions: bool) -> torch.Tensor:
        """Look up E_G, and add the positions' rows where they belong to the input.

        Args:
            input_ids_BL: int64 [B, L].
            with_positions: Whether whoever reads the rows is position biased.

        Returns:
            [B, L, E] in the dtype of the table; a sum in fp32 at least.
        """
        rows_BLE = self.word_embeddings(input_ids_BL)
        if with_positions:
            assert self.position_embeddings is not None, "positions that the generator lacks"
            rows_BLE = _wide_sum(rows_BLE, self.position_embeddings(_positions(input_ids_BL)))
        return rows_BLE


class DiscriminatorEmbeddings(_Embeddings):
    """E_D by the law of `objective.embedding_sharing` (arXiv:2111.09543, section 3.3).

    gdes: stop_gradient(E_G) + Delta; es: E_G; nes: a table of its own. Positions, where the input
    has them, follow the same law.

    Args:
        network: The discriminator's section.
        model: Vocabulary size.
        sharing: "gdes", "es" or "nes".
    """

    def __init__(
        self, network: NetworkSection, model: ModelSection, sharing: EmbeddingSharing
    ) -> None:
        super().__init__(network, compiles_layers(model))
        self.sharing = sharing
        self.position_biased_input = network.position_biased_input
        width, positions = network.word_embedding_size, network.max_position_embeddings
        self.word_embeddings = self.position_embeddings = None
        if sharing == "gdes":
            self.word_embeddings = DeltaEmbedding(model.vocab_size, width, PAD_ID)
            if network.position_biased_input:
                self.position_embeddings = DeltaEmbedding(positions, width)
        elif sharing == "nes":
            self.word_embeddings = nn.Embedding(model.vocab_size, width, padding_idx=PAD_ID)
            if network.position_biased_input:
                self.position_embeddings = nn.Embedding(positions, width)

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        base_BLE: torch.Tensor | None,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Embed tokens.

        Args:
            input_ids_BL: int64 [B, L].
            base_BLE: fp32 [B, L, E], rows of E_G (`Generator.token_embeddings`); None for nes.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D].
        """
        own_BLE = self._own_rows(input_ids_BL)
        if own_BLE is None:
            assert base_BLE is not None, "es without rows of E_G"
            return self.normalize(base_BLE, attention_mask_BL, dropout_key)
        if self.sharing == "gdes":
            assert base_BLE is not None, "gdes without rows of E_G"
            # In fp32: Delta starts at zero, and its first steps would vanish beside E_G in bf16.
            own_BLE = _wide_sum(base_BLE.detach(), own_BLE)
        return self.normalize(own_BLE, attention_mask_BL, dropout_key)

    def _own_rows(self, input_ids_BL: torch.Tensor) -> torch.Tensor | None:
        if self.word_embeddings is None:
            return None
        rows_BLE = self.word_embeddings(input_ids_BL)
        if self.position_embeddings is not None:
            rows_BLE = _wide_sum(rows_BLE, self.position_embeddings(_positions(input_ids_BL)))
        return rows_BLE


def _wide_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add in fp32, or in fp64 where one side is fp64."""
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(wide) + right.to(wide)


def _positions(input_ids_BL: torch.Tensor) -> torch.Tensor:
    """Positions of a sequence: int64 [L]."""
    return torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
