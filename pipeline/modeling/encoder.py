"""The encoder of DeBERTa v2 and v3, and its decoders for masked slots.

Parameter names are those of transformers' DebertaV2Model, so that an export is a copy. One relative
table, normalized once a forward pass, serves all layers; without relative attention there is none.
A convolution runs beside the first layer where the network has one.

    Encoder.forward   all layers: what the discriminator and an export compute
    Encoder.decode    all but the last layer, then the last one at the masked slots only: twice on
                      states with absolute positions (the enhanced mask decoder), or once

Letters: B sequences, L sequence length, K masked slots per sequence, D hidden size,
R relative rows.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey
from pipeline.modeling.convolution import Convolution
from pipeline.modeling.embeddings import LayerNorm
from pipeline.modeling.layer import EncoderLayer, LayerContext, maybe_recompute
from pipeline.modeling.relative_positions import relative_positions


class Encoder(nn.Module):
    """A stack of layers with at most one relative table and one convolution.

    Args:
        network: Sizes, dropout, relative positions and convolution.
        model: Attention backend and activation checkpointing.
    """

    def __init__(self, network: NetworkSection, model: ModelSection) -> None:
        super().__init__()
        width = network.hidden_size
        self.layer = nn.ModuleList(
            EncoderLayer(network, model) for _ in range(network.num_hidden_layers)
        )
        self.rel_embeddings = self.LayerNorm = None
        if network.relative_attention:
            self.rel_embeddings = nn.Embedding(2 * network.position_buckets, width)
            self.LayerNorm = LayerNorm(width, network.layer_norm_eps)
        self.conv = Convolution(network) if network.conv_kernel_size else None
        self.position_buckets = network.position_buckets
        self.max_position = network.last_relative_position + 1
        self.position_rule = network.relative_position_rule
        self.recomputes = model.activation_checkpointing == "full"

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Apply every layer.

        Args:
            hidden_BLD: Embedded tokens, zero at padding.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D]. Rows at padding are numbers without a meaning.
        """
        context = self._context(hidden_BLD, attention_mask_BL, dropout_key)
        return self._first_layers(len(self.layer), hidden_BLD, context)

    def decode(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
        positions_BK: torch.Tensor,
        position_rows_BKD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the last layer's output, or the enhanced mask decoder's, at selected positions.

        The states H after all layers but the last are both keys and values. Rows do not see each
        other's queries, so that only the selected ones are computed, and the keys and the values
        are computed once; so is the projected relative table where nothing is dropped.

        The enhanced mask decoder's queries start as H plus the raw position embeddings, and the
        last layer is applied to them twice. Without it the queries are H, and the result is that of
        `forward` at these positions.

        Args:
            hidden_BLD: Embedded tokens, zero at padding.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.
            positions_BK: int64 [B, K], positions to decode.
            position_rows_BKD: Position embeddings of these positions; None without the enhanced
                mask decoder.

        Returns:
            [B, K, D].

        Source:
            arXiv:2006.03654, section 3.2, in the form of the release
            (`masked_language_model.py`, EnhancedMaskDecoder).
        """
        context = self._context(hidden_BLD, attention_mask_BL, dropout_key)
        last = len(self.layer) - 1
        hidden_BLD = self._first_layers(last, hidden_BLD, context)
        query_BKD, passes = _rows_at(hidden_BLD, positions_BK), (last,)
        if position_rows_BKD is not None:
            # The numbers of the two passes differ, and with them their dropout masks.
            query_BKD, passes = query_BKD + position_rows_BKD, (last, last + 1)
        decoder = cast(EncoderLayer, self.layer[last])
        attention = decoder.attention.self
        keys = attention.key_side(hidden_BLD, context, last)
        drops_table = dropout_key is not None and attention.table_dropout > 0.0
        at_slots = context
        if context.relative is not None:
            at_slots = replace(context, relative=context.relative.at(positions_BK))
        for number in passes:
            if number > last and drops_table:
                # The release drops the table anew in each application of a layer.
                keys = attention.with_relative_table(keys, context, number)
            query_BKD = maybe_recompute(self.recomputes, decoder, query_BKD, at_slots, number, keys)
        return query_BKD

    def _first_layers(
        self, count: int, hidden_BLD: torch.Tensor, context: LayerContext
    ) -> torch.Tensor:
        """Apply the first layers, and the convolution behind the very first."""
        embedded_BLD = hidden_BLD
        for number in range(count):
            hidden_BLD = maybe_recompute(
                self.recomputes, self.layer[number], hidden_BLD, context, number
            )
            if number == 0 and self.conv is not None:
                hidden_BLD = maybe_recompute(
                    self.recomputes,
                    self.conv,
                    embedded_BLD,
                    hidden_BLD,
                    context.attention_mask_BL,
                    context.dropout_key,
                )
        return hidden_BLD

    def _context(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> LayerContext:
        if self.rel_embeddings is None or self.LayerNorm is None:
            return LayerContext(None, None, attention_mask_BL, dropout_key)
        rows_R = torch.arange(2 * self.position_buckets, device=hidden_BLD.device)
        return LayerContext(
            relative=relative_positions(
                hidden_BLD.shape[1],
                self.position_buckets,
                self.max_position,
                hidden_BLD.device,
                self.position_rule,
            ),
            relative_table_RD=self.LayerNorm(self.rel_embeddings(rows_R)),
            attention_mask_BL=attention_mask_BL,
            dropout_key=dropout_key,
        )


def _rows_at(hidden_BLD: torch.Tensor, positions_BK: torch.Tensor) -> torch.Tensor:
    """Select rows by position: [B, K, D]."""
    batch, length, _ = hidden_BLD.shape
    first_B1 = torch.arange(0, batch * length, length, device=positions_BK.device)[:, None]
    rows_N = (positions_BK + first_B1).flatten()
    return hidden_BLD.flatten(0, 1).index_select(0, rows_N).unflatten(0, positions_BK.shape)
