"""The DeBERTaV3 encoder and the generator's enhanced mask decoder.

Parameter names are those of transformers' DebertaV2Model, so that an export is a copy. Layers are
post-LN; one relative table, normalized once a forward pass, serves all of them, and each layer
projects it with its own query and key projections (share_att_key) after a fresh dropout.

    Encoder.forward   all layers: what the discriminator and an export compute
    Encoder.decode    all but the last layer, then the last layer twice at the masked slots

Letters: B sequences, L sequence length, Q query rows, K masked slots per sequence, D hidden size,
H heads, d head size, R relative rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey, dropout
from pipeline.modeling.attention import KeySide, disentangled_attention
from pipeline.modeling.embeddings import LayerNorm, dropout_site
from pipeline.modeling.relative_positions import RelativePositions, relative_positions

# Dropout sites of a layer.
_ATTENTION_PROBS, _ATTENTION_OUTPUT, _FEED_FORWARD_OUTPUT, _RELATIVE_TABLE = range(4)


@dataclass(frozen=True)
class LayerContext:
    """What every layer of one forward pass shares."""

    relative: RelativePositions
    relative_table_RD: torch.Tensor
    """The relative table after its LayerNorm."""
    attention_mask_BL: torch.Tensor | None
    dropout_key: DropoutKey | None


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function now and again in the backward pass, keeping only its arguments.

    No random state is kept: dropout is a function of its site and repeats itself.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _rows_at(hidden_BLD: torch.Tensor, positions_BK: torch.Tensor) -> torch.Tensor:
    """Select rows by position: [B, K, D]."""
    batch, length, _ = hidden_BLD.shape
    first_B1 = torch.arange(0, batch * length, length, device=positions_BK.device)[:, None]
    rows_N = (positions_BK + first_B1).flatten()
    return hidden_BLD.flatten(0, 1).index_select(0, rows_N).unflatten(0, positions_BK.shape)


class DisentangledSelfAttention(nn.Module):
    """Projections of one layer's attention.

    Args:
        network: Sizes and dropout.
        model: Attention backend and activation checkpointing.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        width = network.hidden_size
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.head_size = network.attention_head_size
        self.probs_dropout = network.attention_probs_dropout_prob
        self.table_dropout = network.hidden_dropout_prob
        self.backend = model.attention_backend
        self.recomputes = model.activation_checkpointing == "attention"

    def _split_heads(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return x_BLD.unflatten(-1, (-1, self.head_size)).permute(2, 0, 1, 3)

    def key_side(self, hidden_BLD: torch.Tensor, context: LayerContext, layer: int) -> KeySide:
        """Project keys, values and the relative table.

        Args:
            hidden_BLD: States that are attended to.
            context: What the layers share.
            layer: Layer number of the dropout sites.

        Returns:
            The key side.
        """
        site = dropout_site(context.dropout_key, layer, _RELATIVE_TABLE)
        table_1RD = dropout(context.relative_table_RD, self.table_dropout, site)[None]
        return KeySide(
            key_HBLd=self._split_heads(self.key_proj(hidden_BLD)),
            value_HBLd=self._split_heads(self.value_proj(hidden_BLD)),
            rel_key_HRd=self._split_heads(self.key_proj(table_1RD))[:, 0],
            rel_query_HRd=self._split_heads(self.query_proj(table_1RD))[:, 0],
        )

    def forward(
        self, query_BQD: torch.Tensor, keys: KeySide, context: LayerContext, layer: int
    ) -> torch.Tensor:
        """Attend from query states to a key side.

        Args:
            query_BQD: Query states, before their projection.
            keys: From `key_side`.
            context: What the layers share.
            layer: Layer number of the dropout sites.

        Returns:
            [B, Q, D].
        """
        run = _recompute if self.recomputes else _call
        context_HBQd = run(
            disentangled_attention,
            self.backend,
            self._split_heads(self.query_proj(query_BQD)),
            keys,
            context.relative,
            context.attention_mask_BL,
            self.probs_dropout,
            dropout_site(context.dropout_key, layer, _ATTENTION_PROBS),
        )
        return context_HBQd.permute(1, 2, 0, 3).flatten(2)


class ResidualOutput(nn.Module):
    """Dense, dropout, residual, LayerNorm.

    Args:
        input_size: Width of the input.
        network: Hidden size, epsilon and dropout.
    """

    def __init__(self, input_size: int, network: NetworkSection) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, network.hidden_size)
        self.LayerNorm = LayerNorm(network.hidden_size, network.layer_norm_eps)
        self.dropout_prob = network.hidden_dropout_prob

    def forward(
        self,
        x: torch.Tensor,
        residual_BQD: torch.Tensor,
        dropout_key: DropoutKey | None,
        layer: int,
        where: int,
    ) -> torch.Tensor:
        """Project and add.

        Args:
            x: [B, Q, input_size].
            residual_BQD: What the projection is added to.
            dropout_key: Dropout of this micro step; None outside training.
            layer: Layer number of the dropout site.
            where: Which dropout of the layer.

        Returns:
            [B, Q, D].
        """
        site = dropout_site(dropout_key, layer, where)
        return self.LayerNorm(residual_BQD + dropout(self.dense(x), self.dropout_prob, site))


class Attention(nn.Module):
    """Self-attention and its output block, named as in transformers.

    Args:
        network: Sizes and dropout.
        model: Attention backend and activation checkpointing.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(network, model)
        self.output = ResidualOutput(network.hidden_size, network)


class Intermediate(nn.Module):
    """First half of the feed-forward block, with exact GELU.

    Args:
        network: Sizes.
    """

    def __init__(self, network: NetworkSection) -> None:
        super().__init__()
        self.dense = nn.Linear(network.hidden_size, network.intermediate_size)

    def forward(self, hidden_BQD: torch.Tensor) -> torch.Tensor:
        """Project and activate.

        Args:
            hidden_BQD: [B, Q, D].

        Returns:
            [B, Q, intermediate_size].
        """
        return F.gelu(self.dense(hidden_BQD))


class EncoderLayer(nn.Module):
    """One post-LN layer.

    Args:
        network: Sizes and dropout.
        model: Attention backend and activation checkpointing.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.attention = Attention(network, model)
        self.intermediate = Intermediate(network)
        self.output = ResidualOutput(network.intermediate_size, network)

    def forward(
        self,
        query_BQD: torch.Tensor,
        context: LayerContext,
        layer: int,
        keys: KeySide | None = None,
    ) -> torch.Tensor:
        """Apply the layer.

        Args:
            query_BQD: Query states, which are also the residual.
            context: What the layers share.
            layer: Layer number of the dropout sites.
            keys: What is attended to; None projects the query states (self-attention).

        Returns:
            [B, Q, D].
        """
        if keys is None:
            keys = self.attention.self.key_side(query_BQD, context, layer)
        key = context.dropout_key
        attended = self.attention.self(query_BQD, keys, context, layer)
        attended = self.attention.output(attended, query_BQD, key, layer, _ATTENTION_OUTPUT)
        inner = self.intermediate(attended)
        return self.output(inner, attended, key, layer, _FEED_FORWARD_OUTPUT)


class Encoder(nn.Module):
    """A stack of layers with one relative table.

    Args:
        network: Sizes and dropout.
        model: Attention backend and activation checkpointing.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            EncoderLayer(network, model) for _ in range(network.num_hidden_layers)
        )
        self.rel_embeddings = nn.Embedding(2 * network.position_buckets, network.hidden_size)
        self.LayerNorm = LayerNorm(network.hidden_size, network.layer_norm_eps)
        self.position_buckets = network.position_buckets
        self.max_position = network.max_position_embeddings
        self.recomputes = model.activation_checkpointing == "full"

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Apply every layer.

        Args:
            hidden_BLD: Embedded tokens.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D]. Rows at padding are numbers without a meaning.
        """
        context = self._context(hidden_BLD, attention_mask_BL, dropout_key)
        run = _recompute if self.recomputes else _call
        for number, layer in enumerate(self.layer):
            hidden_BLD = run(layer, hidden_BLD, context, number)
        return hidden_BLD

    def decode(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
        positions_BK: torch.Tensor,
        position_rows_BKD: torch.Tensor,
    ) -> torch.Tensor:
        """Apply the enhanced mask decoder at selected positions.

        The states H after all layers but the last are both keys and values. The queries start as
        H plus the raw position embeddings, and the last layer is applied to them twice. Rows do
        not see each other's queries, so that only the selected ones are computed, and the keys,
        the values and the projected relative table are computed once.

        Args:
            hidden_BLD: Embedded tokens.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.
            positions_BK: int64 [B, K], positions to decode.
            position_rows_BKD: Position embeddings of these positions.

        Returns:
            [B, K, D].

        Source:
            arXiv:2006.03654, section 3.2, in the form of the release
            (`masked_language_model.py`, EnhancedMaskDecoder).
        """
        context = self._context(hidden_BLD, attention_mask_BL, dropout_key)
        run = _recompute if self.recomputes else _call
        last = len(self.layer) - 1
        for number in range(last):
            hidden_BLD = run(self.layer[number], hidden_BLD, context, number)
        query_BKD = _rows_at(hidden_BLD, positions_BK) + position_rows_BKD
        decoder = cast(EncoderLayer, self.layer[last])
        keys = decoder.attention.self.key_side(hidden_BLD, context, last)
        at_slots = replace(context, relative=context.relative.at(positions_BK))
        # The numbers of the two passes differ, and with them their dropout masks.
        for number in (last, last + 1):
            query_BKD = run(decoder, query_BKD, at_slots, number, keys)
        return query_BKD

    def _context(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> LayerContext:
        rows_R = torch.arange(2 * self.position_buckets, device=hidden_BLD.device)
        return LayerContext(
            relative=relative_positions(
                hidden_BLD.shape[1], self.position_buckets, self.max_position, hidden_BLD.device
            ),
            relative_table_RD=self.LayerNorm(self.rel_embeddings(rows_R)),
            attention_mask_BL=attention_mask_BL,
            dropout_key=dropout_key,
        )
