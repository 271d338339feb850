"""Attention of torch's operations as one graph, behind the graph that draws its dropout mask.

The fused backends are no part of it: they are two opaque operators, and draw inside.

Letters: B sequences, L sequence length, Q query rows, H heads, d head size.
"""

from typing import cast

import torch

from pipeline.counter_rng import DropoutSite
from pipeline.modeling.attention import AttentionBackend, KeySide, disentangled_attention
from pipeline.modeling.compiled import KeptBits, compiled, draw_bits
from pipeline.modeling.relative_positions import RelativePositions


def compiled_attention(
    backend: AttentionBackend,
    query_HBQd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    attention_mask_BL: torch.Tensor | None,
    dropout_p: float,
    site: DropoutSite | None,
) -> torch.Tensor:
    """Attend as `disentangled_attention` does, in one graph behind that of the dropout mask.

    Args:
        backend: One that consists of torch's operations.
        query_HBQd: As for `disentangled_attention`, like all that follow.
        keys: Keys, values and tables.
        relative: Positions.
        attention_mask_BL: Padding.
        dropout_p: Probability of dropping an attention probability.
        site: Dropout site; None outside training.

    Returns:
        Context [H, B, Q, d].
    """
    bits = draw_bits(site, (*query_HBQd.shape[:3], keys.key_HBLd.shape[2]), dropout_p)
    rows = (None, None, None)
    if relative is not None:
        rows = (relative.query_rows_E, relative.key_rows_E, relative.positions_BQ)
    return compiled(_attend)(
        backend,
        query_HBQd,
        (keys.key_HBLd, keys.value_HBLd, keys.rel_key_HRd, keys.rel_query_HRd),
        rows,
        attention_mask_BL,
        dropout_p,
        bits,
    )


def _attend(
    backend: AttentionBackend,
    query_HBQd: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    rows: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    attention_mask_BL: torch.Tensor | None,
    dropout_p: float,
    bits: torch.Tensor | None,
) -> torch.Tensor:
    """Attend, as a function of tensors alone."""
    query_rows_E, key_rows_E, positions_BQ = rows
    relative = None
    if query_rows_E is not None and key_rows_E is not None:
        relative = RelativePositions(query_rows_E, key_rows_E, positions_BQ)
    site = None if bits is None else cast(DropoutSite, KeptBits(bits))
    return disentangled_attention(
        backend, query_HBQd, KeySide(*keys), relative, attention_mask_BL, dropout_p, site
    )
