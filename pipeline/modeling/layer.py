"""One post-LN layer, with the parameter names of transformers' DebertaV2Layer.

    attention     queries, keys and the relative table -> context -> dense -> residual, LayerNorm
    feed-forward  dense -> GELU -> dense -> residual, LayerNorm

The relative table goes through the layer's own query and key projections, biases included
(share_att_key), after a dropout of its own. Queries may come from other states than keys and
values: that is how the enhanced mask decoder uses a layer.

Letters: B sequences, L sequence length, Q query rows, D hidden size, H heads, d head size,
R relative rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey, dropout
from pipeline.modeling.attention import (
    FUSED_BACKENDS,
    AttentionBackend,
    KeySide,
    disentangled_attention,
    serving_backend,
)
from pipeline.modeling.compiled import draw_bits, drop
from pipeline.modeling.compiled_attention import compiled_attention
from pipeline.modeling.embeddings import LayerNorm, compiles_layers, dropout_site
from pipeline.modeling.relative_positions import RelativePositions

# Dropout sites of a layer; `convolution.py` has the next one of layer 0.
_ATTENTION_PROBS, _ATTENTION_OUTPUT, _FEED_FORWARD_OUTPUT, _RELATIVE_TABLE = range(4)


@dataclass(frozen=True)
class LayerContext:
    """What every layer of one forward pass shares."""

    relative: RelativePositions | None
    """None, like the table, without relative attention."""
    relative_table_RD: torch.Tensor | None
    """The relative table after its LayerNorm."""
    attention_mask_BL: torch.Tensor | None
    dropout_key: DropoutKey | None


def maybe_recompute(recomputes: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function; on request run it again in the backward pass and keep only its arguments.

    No random state is kept: dropout is a function of its site and repeats itself.

    Args:
        recomputes: Whether to trade time for memory.
        function: A module or a function of tensors.
        *args: Its arguments.

    Returns:
        What the function returns.
    """
    if not recomputes:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class DisentangledSelfAttention(nn.Module):
    """Projections of one layer's attention.

    Args:
        network: Sizes and dropout.
        model: Attention backend, activation checkpointing and compilation.
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
        self.backend: AttentionBackend = model.attention_backend
        self.recomputes = model.activation_checkpointing == "attention"
        self.compiles = compiles_layers(model)

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
        keys = KeySide(
            key_HBLd=self._split_heads(self.key_proj(hidden_BLD)),
            value_HBLd=self._split_heads(self.value_proj(hidden_BLD)),
        )
        return self.with_relative_table(keys, context, layer)

    def with_relative_table(self, keys: KeySide, context: LayerContext, layer: int) -> KeySide:
        """Project the relative table, with the dropout mask of one application of the layer.

        Args:
            keys: Keys and values.
            context: What the layers share.
            layer: Layer number of the dropout site.

        Returns:
            The key side; `keys` themselves without relative attention.
        """
        if context.relative_table_RD is None:
            return keys
        site = dropout_site(context.dropout_key, layer, _RELATIVE_TABLE)
        table_1RD = drop(context.relative_table_RD, self.table_dropout, site, self.compiles)[None]
        return replace(
            keys,
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
        query_HBQd = self._split_heads(self.query_proj(query_BQD))
        backend = serving_backend(self.backend, query_HBQd, keys, context.relative)
        in_a_graph = self.compiles and backend not in FUSED_BACKENDS
        attend = compiled_attention if in_a_graph else disentangled_attention
        context_HBQd = maybe_recompute(
            self.recomputes,
            attend,
            backend,
            query_HBQd,
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
        model: Whether what follows the projection is compiled.
    """

    def __init__(self, input_size: int, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, network.hidden_size)
        self.LayerNorm = LayerNorm(network.hidden_size, network.layer_norm_eps)
        self.dropout_prob = network.hidden_dropout_prob
        self.compiles = compiles_layers(model)

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
        projected_BQD = self.dense(x)
        if self.compiles:
            bits = draw_bits(site, projected_BQD.shape, self.dropout_prob)
            return self.LayerNorm(projected_BQD, residual_BQD, bits, self.dropout_prob)
        return self.LayerNorm(residual_BQD + dropout(projected_BQD, self.dropout_prob, site))


class Attention(nn.Module):
    """Self-attention and its output block, named as in transformers.

    Args:
        network: Sizes and dropout.
        model: Attention backend, activation checkpointing and compilation.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(network, model)
        self.output = ResidualOutput(network.hidden_size, network, model)


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
        model: Attention backend, activation checkpointing and compilation.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        self.attention = Attention(network, model)
        self.intermediate = Intermediate(network)
        self.output = ResidualOutput(network.intermediate_size, network, model)

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
