"""Disentangled attention: one function, two backends with the same numbers.

DeBERTa (arXiv:2006.03654, section 3.1) adds two terms to the scores of self-attention, content to
position and position to content, through a table of relative positions:

    A[i, j] = (Q_i . K_j + Q_i . Kr[row(i - j)] + K_j . Qr[row(i - j)]) / sqrt(3 d)

Both position terms use the row of i - j. Equation 4 of the paper has j - i in the second one; the
released code and every released model have i - j. Without a table (relative_attention is false)
the first term is left, over sqrt(d): the attention of BERT.

    eager   the definition: gather each term from [.., R] products, fp32 softmax, autograd
    torch   (`sheared_attention`) the same sums without a gather or a scatter, one autograd.Function

Heads come first, [H, B, L, d]: a product with a table that all sequences share is then one matrix
product a head, and the table's gradient is summed over the batch inside the matrix product.

Letters: B sequences, L sequence length, Q query rows (L in the encoder, the masked slots in the
enhanced mask decoder), D hidden size, H heads, d head size, R relative rows, E distances.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from pipeline.counter_rng import DropoutSite, dropout
from pipeline.modeling.relative_positions import RelativePositions
from pipeline.modeling.sheared_attention import ShearedAttention

AttentionBackend = Literal["eager", "torch"]


@dataclass(frozen=True)
class KeySide:
    """What queries are compared with; the decoder computes it once and asks it twice."""

    key_HBLd: torch.Tensor
    value_HBLd: torch.Tensor
    rel_key_HRd: torch.Tensor | None = None
    """Kr: the relative table through the key projection; None without relative attention."""
    rel_query_HRd: torch.Tensor | None = None
    """Qr: the relative table through the query projection; None without relative attention."""


def disentangled_attention(
    backend: AttentionBackend,
    query_HBQd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    attention_mask_BL: torch.Tensor | None,
    dropout_p: float,
    site: DropoutSite | None,
) -> torch.Tensor:
    """Attend with content-to-position and position-to-content terms, or with content alone.

    Args:
        backend: "eager" or "torch".
        query_HBQd: Queries [H, B, Q, d], not scaled.
        keys: Keys, values and both projections of the relative table, in the queries' dtype.
        relative: Positions of the queries and the table row of each distance; None where `keys` has
            no table.
        attention_mask_BL: bool [B, L], False at padding keys; None where every token counts.
        dropout_p: Probability of dropping an attention probability.
        site: Dropout site; None outside training.

    Returns:
        Context [H, B, Q, d]. Zero in a sequence whose keys are all masked.

    Source:
        arXiv:2006.03654, equations 3 and 4, as in `disentangled_attention.py` of the release.
    """
    # Scaling before the products keeps fp16 scores finite where the sums of products are not. The
    # root is rounded to fp32 whatever the dtype, as in transformers: fp64 results can be compared.
    terms = 1 if keys.rel_query_HRd is None else 3
    scale = 1.0 / float(np.sqrt(np.float32(terms * query_HBQd.shape[3])))
    if keys.rel_query_HRd is not None:
        keys = replace(keys, rel_query_HRd=keys.rel_query_HRd * scale)
    attend = _eager if backend == "eager" else _sheared
    context_HBQd = attend(query_HBQd * scale, keys, relative, attention_mask_BL, dropout_p, site)
    if attention_mask_BL is None:
        return context_HBQd
    return context_HBQd * attention_mask_BL.any(1)[None, :, None, None].to(context_HBQd.dtype)


def _position_terms(
    query_HBQd: torch.Tensor, keys: KeySide, relative: RelativePositions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather content to position and position to content, both [H, B, Q, L]."""
    assert keys.rel_key_HRd is not None
    assert keys.rel_query_HRd is not None
    num_heads, batch = query_HBQd.shape[:2]
    index_HBQL = relative.index().expand(num_heads, batch, -1, -1)
    by_query_HBQR = query_HBQd @ keys.rel_key_HRd[:, None].mT
    by_key_HBLR = keys.key_HBLd @ keys.rel_query_HRd[:, None].mT
    # Key j meets query i in the row of i - j: gather from the key's rows, then transpose.
    position_to_content = by_key_HBLR.gather(3, index_HBQL.mT).mT
    return by_query_HBQR.gather(3, index_HBQL), position_to_content


def _eager(
    query_HBQd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    attention_mask_BL: torch.Tensor | None,
    dropout_p: float,
    site: DropoutSite | None,
) -> torch.Tensor:
    """Attend by the definition: gather the position terms, softmax in fp32 at least."""
    wide = torch.promote_types(query_HBQd.dtype, torch.float32)
    position_terms = () if relative is None else _position_terms(query_HBQd, keys, relative)
    scores_HBQL = (query_HBQd @ keys.key_HBLd.mT).to(wide)
    for term_HBQL in position_terms:
        scores_HBQL = scores_HBQL + term_HBQL
    if attention_mask_BL is not None:
        masked_BL = ~attention_mask_BL[None, :, None, :]
        scores_HBQL = scores_HBQL.masked_fill(masked_BL, torch.finfo(wide).min)
    probs_HBQL = torch.softmax(scores_HBQL, dim=-1).to(keys.value_HBLd.dtype)
    return dropout(probs_HBQL, dropout_p, site) @ keys.value_HBLd


def _sheared(
    query_HBQd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    attention_mask_BL: torch.Tensor | None,
    dropout_p: float,
    site: DropoutSite | None,
) -> torch.Tensor:
    """Attend by `ShearedAttention`: expand the tables to one row a distance, draw the mask."""
    keep_HBQL, keep_scale = None, 1.0
    if site is not None and dropout_p > 0.0:
        shape = (*query_HBQd.shape[:3], keys.key_HBLd.shape[2])
        keep_HBQL, keep_scale = site.keep_mask(shape, dropout_p), 1.0 / (1.0 - dropout_p)
    rel_key_HEd = rel_query_HEd = positions_BQ = None
    if relative is not None:
        assert keys.rel_key_HRd is not None
        assert keys.rel_query_HRd is not None
        rel_key_HEd = keys.rel_key_HRd.index_select(1, relative.query_rows_E)
        rel_query_HEd = keys.rel_query_HRd.index_select(1, relative.key_rows_E)
        positions_BQ = relative.positions_BQ
    return ShearedAttention.apply(
        query_HBQd.contiguous(),
        keys.key_HBLd.contiguous(),
        keys.value_HBLd,
        rel_key_HEd,
        rel_query_HEd,
        positions_BQ,
        attention_mask_BL,
        keep_HBQL,
        keep_scale,
    )
