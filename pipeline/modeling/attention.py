"""Disentangled attention: one function, several backends with the same numbers.

DeBERTa (arXiv:2006.03654, section 3.1) adds two terms to the scores of self-attention, content to
position and position to content, through a table of relative positions:

    A[i, j] = (Q_i . K_j + Q_i . Kr[row(i - j)] + K_j . Qr[row(i - j)]) / sqrt(3 d)

Both position terms use the row of i - j. Equation 4 of the paper has j - i in the second one; the
released code and every released model have i - j. Without a table (relative_attention is false)
the first term is left, over sqrt(d): the attention of BERT.

    eager   the definition: gather each term from [.., R] products, fp32 softmax, autograd
    torch   (`sheared_attention`) the same sums without a gather or a scatter, one autograd.Function
    triton  (`kernels.disentangled`) scores, softmax and dropout in fused kernels
    disentangled_flash   (`kernels.flash_peer`) the package of that name, for comparison; it draws
            dropout masks of its own

Where the kernels do not serve a call (no Triton, another device, another head size, selected query
rows), `torch` does, and the log says so once.

Heads come first, [H, B, L, d]: a product with a table that all sequences share is then one matrix
product a head, and the table's gradient is summed over the batch inside the matrix product.

Letters: B sequences, L sequence length, Q query rows (L in the encoder, the masked slots in the
enhanced mask decoder), T tokens of all packed sequences, D hidden size, H heads, d head size,
R relative rows, E distances.
"""

import itertools
import logging
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from pipeline.counter_rng import DropoutSite
from pipeline.modeling.kernels import flash_peer, serving
from pipeline.modeling.kernels.disentangled import fused_attention
from pipeline.modeling.relative_positions import RelativePositions
from pipeline.modeling.sheared_attention import ShearedAttention

AttentionBackend = Literal["eager", "torch", "triton", "disentangled_flash"]
FUSED_BACKENDS: tuple[AttentionBackend, ...] = ("triton", "disentangled_flash")
"""They launch kernels of their own, which no graph makes faster, and draw their dropout inside."""


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
        backend: Which implementation, see the module.
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
    scale = _scale(query_HBQd, keys)
    served_by = serving_backend(backend, query_HBQd, keys, relative)
    if served_by == "triton":
        return _fused(query_HBQd, keys, relative, attention_mask_BL, scale, dropout_p, site)
    if served_by == "disentangled_flash":
        return flash_peer.attention(
            query_HBQd,
            *(keys.key_HBLd, keys.value_HBLd),
            *(keys.rel_key_HRd, keys.rel_query_HRd),
            *(None if relative is None else relative.key_rows_E, attention_mask_BL),
            *(scale, dropout_p, site),
        )
    keep_HBQL = None
    if site is not None and dropout_p > 0.0:
        keep_HBQL = site.keep_mask((*query_HBQd.shape[:3], keys.key_HBLd.shape[2]), dropout_p)
    attend = _eager if served_by == "eager" else _sheared
    # Scaling before the products keeps fp16 scores finite where the sums of products are not.
    context_HBQd = attend(
        *(query_HBQd * scale, _scaled(keys, scale), relative, attention_mask_BL),
        *(keep_HBQL, 1.0 / (1.0 - dropout_p)),
    )
    if attention_mask_BL is None:
        return context_HBQd
    return context_HBQd * attention_mask_BL.any(1)[None, :, None, None].to(context_HBQd.dtype)


def packed_disentangled_attention(
    backend: AttentionBackend,
    query_H1Td: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    starts: torch.Tensor,
    dropout_p: float,
    site: DropoutSite | None,
    max_length: int,
) -> torch.Tensor:
    """Attend within sequences that lie end to end in one row, without padding.

    Each sequence gets what `disentangled_attention` gives it alone. `triton` computes all of them
    in one launch; `eager` and `torch` go from sequence to sequence, with the lengths on the host.
    The dropout mask has shape [H, T, max_length]: sequences of equal lengths have the bits of the
    same sequences as a batch.

    Args:
        backend: Which implementation, see the module.
        query_H1Td: Queries [H, 1, T, d], not scaled.
        keys: Keys and values [H, 1, T, d], and the table's projections.
        relative: The geometry of `max_length`; None where `keys` has no table.
        starts: int32 [sequences + 1], the first token of each sequence, and T (cu_seqlens).
        dropout_p: Probability of dropping an attention probability.
        site: Dropout site; None outside training.
        max_length: Tokens of the longest sequence, or more.

    Returns:
        Context [H, 1, T, d].
    """
    served_by = serving_backend(backend, query_H1Td, keys, relative)
    scale = _scale(query_H1Td, keys)
    if served_by == "triton":
        return _fused(
            *(query_H1Td, keys, relative, None, scale, dropout_p, site),
            *(starts, max_length),
        )
    keep_HTL = None
    if site is not None and dropout_p > 0.0:
        num_heads, _, num_tokens, _ = query_H1Td.shape
        keep_HTL = site.keep_mask((num_heads, num_tokens, max_length), dropout_p)
    attend = _eager if served_by == "eager" else _sheared
    scaled_H1Td, keys, contexts = query_H1Td * scale, _scaled(keys, scale), []
    bounds = starts.tolist()
    for first, end in itertools.pairwise(bounds):
        here = (slice(None), slice(None), slice(first, end))
        keys_here = replace(keys, key_HBLd=keys.key_HBLd[here], value_HBLd=keys.value_HBLd[here])
        keep_here = None if keep_HTL is None else keep_HTL[:, None, first:end, : end - first]
        geometry = None if relative is None else _shortened(relative, max_length, end - first)
        contexts.append(
            attend(
                *(scaled_H1Td[here], keys_here, geometry, None),
                *(keep_here, 1.0 / (1.0 - dropout_p)),
            )
        )
    return torch.cat(contexts, dim=2)


def serving_backend(
    backend: AttentionBackend,
    query_HBQd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
) -> AttentionBackend:
    """Say which backend computes a call.

    Args:
        backend: The one that is asked for.
        query_HBQd: Queries.
        keys: Keys.
        relative: Positions; None without a table.

    Returns:
        The backend itself, or "torch" where it does not serve the call; the log says why, once.
    """
    selects_rows = query_HBQd.shape[2] != keys.key_HBLd.shape[2] or (
        relative is not None and relative.positions_BQ is not None
    )
    return _serving_backend(
        backend, query_HBQd.device, query_HBQd.dtype, query_HBQd.shape[3], selects_rows
    )


# torch.compile asks once, while it traces: the answer depends on no tensor's values.
@torch.compiler.assume_constant_result
def _serving_backend(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    selects_rows: bool,
) -> AttentionBackend:
    """Return the backend itself, or "torch" where it does not serve the call."""
    if backend in ("eager", "torch"):
        return backend
    if selects_rows:
        # A decoder's queries are a seventh of its keys: the kernels' gain would be small.
        serving.say_once(
            logging.INFO,
            f"attention backend {backend}: the decoder's selected rows are computed by torch",
        )
        return "torch"
    refuses = serving.refusal if backend == "triton" else flash_peer.refusal
    reason = refuses(device, dtype, head_size)
    if reason is None:
        return backend
    serving.say_once(logging.WARNING, f"attention backend {backend} is replaced by torch: {reason}")
    return "torch"


def _scale(query_HBQd: torch.Tensor, keys: KeySide) -> float:
    """Return 1 / sqrt(terms d)."""
    # The root is rounded to fp32 whatever the dtype, as in transformers: fp64 results can be
    # compared.
    terms = 1 if keys.rel_query_HRd is None else 3
    return 1.0 / float(np.sqrt(np.float32(terms * query_HBQd.shape[3])))


def _scaled(keys: KeySide, scale: float) -> KeySide:
    """Scale what keys are multiplied with; queries are scaled themselves."""
    if keys.rel_query_HRd is None:
        return keys
    return replace(keys, rel_query_HRd=keys.rel_query_HRd * scale)


def _shortened(relative: RelativePositions, max_length: int, length: int) -> RelativePositions:
    """Take the geometry of shorter sequences out of that of longer ones."""
    here = slice(max_length - length, max_length + length)
    return RelativePositions(relative.query_rows_E[here], relative.key_rows_E[here])


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
    keep_HBQL: torch.Tensor | None,
    keep_scale: float,
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
    if keep_HBQL is not None:
        probs_HBQL = probs_HBQL * keep_HBQL.to(probs_HBQL.dtype) * keep_scale
    return probs_HBQL @ keys.value_HBLd


def _sheared(
    query_HBQd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    attention_mask_BL: torch.Tensor | None,
    keep_HBQL: torch.Tensor | None,
    keep_scale: float,
) -> torch.Tensor:
    """Attend by `ShearedAttention`: expand the tables to one row a distance."""
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
        keep_scale if keep_HBQL is not None else 1.0,
    )


def _fused(
    query_HBLd: torch.Tensor,
    keys: KeySide,
    relative: RelativePositions | None,
    attention_mask_BL: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    site: DropoutSite | None,
    starts: torch.Tensor | None = None,
    max_length: int | None = None,
) -> torch.Tensor:
    """Attend by the Triton kernels, for which all sequences lie end to end."""
    batch, length = query_HBLd.shape[1:3]
    tables = None
    if relative is not None:
        assert keys.rel_key_HRd is not None
        assert keys.rel_query_HRd is not None
        # The tables are small: scaling them costs nothing, and keeps fp16 products finite.
        rows_2E = torch.stack((relative.query_rows_E, relative.key_rows_E))
        tables = (keys.rel_key_HRd * scale, keys.rel_query_HRd * scale, rows_2E)
    context_HTd = fused_attention(
        query_HBLd.flatten(1, 2),
        keys.key_HBLd.flatten(1, 2),
        keys.value_HBLd.flatten(1, 2),
        tables,
        None if attention_mask_BL is None else attention_mask_BL.flatten(),
        starts,
        max_length or length,
        scale,
        dropout_p,
        site,
    )
    return context_HTd.unflatten(1, (batch, length))
