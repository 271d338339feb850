"""The DeBERTaV3 encoder and the generator's enhanced mask decoder.

Parameter names are those of transformers' DebertaV2Model, so that an export is a copy. One relative
table, normalized once a forward pass, serves all layers.

    Encoder.forward   all layers: what the discriminator and an export compute
    Encoder.decode    all but the last layer, then the last layer twice at the masked slots

Letters: B sequences, L sequence length, K masked slots per sequence, D hidden size,
R relative rows.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from pipeline.config import ModelSection, NetworkSection
from pipeline.counter_rng import DropoutKey
from pipeline.modeling.embeddings import LayerNorm
from pipeline.modeling.layer import EncoderLayer, LayerContext, maybe_recompute
from pipeline.modeling.relative_positions import relative_positions


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
        for number, layer in enumerate(self.layer):
            hidden_BLD = maybe_recompute(self.recomputes, layer, hidden_BLD, context, number)
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
        last = len(self.layer) - 1
        for number in range(last):
            hidden_BLD = maybe_recompute(
                self.recomputes, self.layer[number], hidden_BLD, context, number
            )
        query_BKD = _rows_at(hidden_BLD, positions_BK) + position_rows_BKD
        decoder = cast(EncoderLayer, self.layer[last])
        keys = decoder.attention.self.key_side(hidden_BLD, context, last)
        at_slots = replace(context, relative=context.relative.at(positions_BK))
        # The numbers of the two passes differ, and with them their dropout masks.
        for number in (last, last + 1):
            query_BKD = maybe_recompute(self.recomputes, decoder, query_BKD, at_slots, number, keys)
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


def _rows_at(hidden_BLD: torch.Tensor, positions_BK: torch.Tensor) -> torch.Tensor:
    """Select rows by position: [B, K, D]."""
    batch, length, _ = hidden_BLD.shape
    first_B1 = torch.arange(0, batch * length, length, device=positions_BK.device)[:, None]
    rows_N = (positions_BK + first_B1).flatten()
    return hidden_BLD.flatten(0, 1).index_select(0, rows_N).unflatten(0, positions_BK.shape)
