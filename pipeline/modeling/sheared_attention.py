"""The `torch` attention backend: position terms by shearing instead of gathering.

A term that depends on the distance of two positions is computed for all E = 2 L distances as a band
[.., L, E]; read with a row stride of E - 1 instead of E, the same memory is the score matrix (the
shift of Transformer-XL, arXiv:1901.02860, appendix B). So the forward pass reads no index, and the
backward pass writes each gradient once: nothing is scattered or added atomically, and the result is
deterministic. E is even, which keeps the rows of the band aligned for matrix units.

    forward   band = Q Kr' ; scores = Q K' + shear(band) + shear(K Qr')' ; P = softmax ; P V
    backward  dP = dO V' ; dS = softmax backward ; dband = unshear(dS) ; matrix products

Between the passes only P and the dropout mask have L x L elements. A layer of large at L = 512
moves 862 KiB a token forward and backward, dropout aside; transformers moves 1,154. The band is
wider than the R = 512 columns of a gather once L > 256, which the absent gather, scatter and index
still outweigh at 512; sequences of several thousand tokens want a fused kernel instead.

Letters: B sequences, L sequence length, Q query rows, H heads, d head size, E = 2 L distances.
"""

import torch
from torch.autograd.function import once_differentiable


def shear(band_HBLE: torch.Tensor) -> torch.Tensor:
    """View a band as a score matrix: element (i, j) is band element (i, j - i + L - 1).

    Args:
        band_HBLE: Contiguous [H, B, L, 2 L].

    Returns:
        View [H, B, L, L].
    """
    length = band_HBLE.shape[2]
    flat = band_HBLE.flatten(2)[:, :, length - 1 : length - 1 + length * (2 * length - 1)]
    return flat.unflatten(2, (length, 2 * length - 1))[..., :length]


def unshear(scores_HBLL: torch.Tensor) -> torch.Tensor:
    """Apply the adjoint of `shear`: put scores into a band that is zero elsewhere.

    Args:
        scores_HBLL: [H, B, L, L], any strides.

    Returns:
        Contiguous [H, B, L, 2 L].
    """
    num_heads, batch, length, _ = scores_HBLL.shape
    flat = scores_HBLL.new_empty(num_heads, batch, 2 * length * length)
    flat[..., length * (2 * length - 1) :] = 0
    rows = flat[..., : length * (2 * length - 1)].unflatten(2, (length, 2 * length - 1))
    rows[..., : length - 1] = 0
    rows[..., length - 1 :] = scores_HBLL
    return flat.unflatten(2, (length, 2 * length))


def gather_windows(band_HBQE: torch.Tensor, positions_BQ: torch.Tensor) -> torch.Tensor:
    """Shear selected rows: element (q, j) is band element (q, j - position(q) + L - 1).

    Args:
        band_HBQE: [H, B, Q, 2 L].
        positions_BQ: int64 [B, Q], positions of the rows.

    Returns:
        [H, B, Q, L].
    """
    length = band_HBQE.shape[3] // 2
    key_L = torch.arange(length, device=positions_BQ.device)
    index_BQL = key_L - positions_BQ[:, :, None] + (length - 1)
    return band_HBQE.gather(3, index_BQL.expand(band_HBQE.shape[0], -1, -1, -1))


def spread_windows(scores_HBQL: torch.Tensor, positions_BQ: torch.Tensor) -> torch.Tensor:
    """Apply the adjoint of `gather_windows`, itself a gather: a row's window holds each key once.

    Args:
        scores_HBQL: [H, B, Q, L].
        positions_BQ: int64 [B, Q], positions of the rows.

    Returns:
        [H, B, Q, 2 L], zero outside the windows.
    """
    length = scores_HBQL.shape[3]
    distance_E = torch.arange(2 * length, device=positions_BQ.device) - (length - 1)
    key_BQE = distance_E + positions_BQ[:, :, None]
    outside_BQE = (key_BQE < 0) | (key_BQE >= length)
    index_BQE = key_BQE.clamp(0, length - 1).expand(scores_HBQL.shape[0], -1, -1, -1)
    return scores_HBQL.gather(3, index_BQE).masked_fill_(outside_BQE, 0)


def _selector(positions_BQ: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Build the 0/1 matrix [B, Q, L] that picks rows: exact, and its adjoint adds no atomics."""
    key_L = torch.arange(length, device=positions_BQ.device)
    return (positions_BQ[:, :, None] == key_L).to(dtype)


def _with_table(rows_HBNx: torch.Tensor, table_HxE: torch.Tensor) -> torch.Tensor:
    """Multiply all sequences' rows by their head's table: one matrix product a head."""
    return (rows_HBNx.flatten(1, 2) @ table_HxE).unflatten(1, rows_HBNx.shape[1:3])


def _table_gradient(band_HBNE: torch.Tensor, rows_HBNd: torch.Tensor) -> torch.Tensor:
    """Sum over sequences and rows: [H, E, d]."""
    return band_HBNE.flatten(1, 2).mT @ rows_HBNd.flatten(1, 2)


def _scores(
    query_HBQd: torch.Tensor,
    key_HBLd: torch.Tensor,
    rel_key_HEd: torch.Tensor | None,
    rel_query_HEd: torch.Tensor | None,
    positions_BQ: torch.Tensor | None,
) -> torch.Tensor:
    """Sum the three terms of the scores, or the one that needs no table: [H, B, Q, L]."""
    scores_HBQL = query_HBQd @ key_HBLd.mT
    if rel_key_HEd is None or rel_query_HEd is None:
        return scores_HBQL
    query_band = _with_table(query_HBQd, rel_key_HEd.mT)
    key_scores_HBLL = shear(_with_table(key_HBLd, rel_query_HEd.mT)).mT
    if positions_BQ is None:
        return scores_HBQL.add_(shear(query_band)).add_(key_scores_HBLL)
    selector_BQL = _selector(positions_BQ, key_HBLd.shape[2], key_HBLd.dtype)
    scores_HBQL += gather_windows(query_band, positions_BQ)
    return scores_HBQL.add_(selector_BQL @ key_scores_HBLL)


class ShearedAttention(torch.autograd.Function):
    """Attention from scaled queries and distance tables to context; saves one L x L matrix."""

    @staticmethod
    def forward(
        ctx,
        query_HBQd: torch.Tensor,
        key_HBLd: torch.Tensor,
        value_HBLd: torch.Tensor,
        rel_key_HEd: torch.Tensor | None,
        rel_query_HEd: torch.Tensor | None,
        positions_BQ: torch.Tensor | None,
        attention_mask_BL: torch.Tensor | None,
        keep_HBQL: torch.Tensor | None,
        keep_scale: float,
    ) -> torch.Tensor:
        """Compute the context.

        Args:
            ctx: autograd's context.
            query_HBQd: Contiguous queries, divided by sqrt(3 d), or sqrt(d) without tables.
            key_HBLd: Contiguous keys.
            value_HBLd: Values.
            rel_key_HEd: Key projection of the table by key position - query position; None, like
                the next, where there is no relative table.
            rel_query_HEd: Query projection, divided by sqrt(3 d), by query - key position.
            positions_BQ: int64 positions of the queries; None for all positions in order.
            attention_mask_BL: bool, False at padding keys; None for no padding.
            keep_HBQL: bool dropout mask; None for no dropout.
            keep_scale: 1 / (1 - p).

        Returns:
            Context [H, B, Q, d].
        """
        scores_HBQL = _scores(query_HBQd, key_HBLd, rel_key_HEd, rel_query_HEd, positions_BQ)
        if attention_mask_BL is not None:
            # Not -inf: a sequence of padding alone must give numbers, which the caller zeroes.
            floor = torch.finfo(scores_HBQL.dtype).min
            scores_HBQL.masked_fill_(~attention_mask_BL[None, :, None, :], floor)
        # Half precision in and out, fp32 inside: one pass over memory.
        probs_HBQL = torch.softmax(scores_HBQL, dim=-1).to(value_HBLd.dtype)
        del scores_HBQL
        ctx.keep_scale = keep_scale
        ctx.save_for_backward(
            query_HBQd,
            key_HBLd,
            value_HBLd,
            rel_key_HEd,
            rel_query_HEd,
            positions_BQ,
            probs_HBQL,
            keep_HBQL,
        )
        if keep_HBQL is None:
            return probs_HBQL @ value_HBLd
        return (probs_HBQL * keep_HBQL) @ value_HBLd * keep_scale

    # Probabilities are kept without their history: a second derivative would be wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of the five differentiable arguments of `forward`."""
        query, key, value, rel_key, rel_query, positions_BQ, probs, keep = ctx.saved_tensors
        d_context = grads[0].to(value.dtype)
        dropped = probs
        if keep is not None:
            d_context = d_context * ctx.keep_scale
            dropped = probs * keep
        d_value = dropped.mT @ d_context
        d_probs = d_context @ value.mT
        if keep is not None:
            d_probs.mul_(keep)
        d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        del d_probs, dropped
        d_query, d_key = d_scores @ key, d_scores.mT @ query
        if rel_key is None:
            return d_query, d_key, d_value, None, None, None, None, None, None
        if positions_BQ is None:
            query_band, key_scores = unshear(d_scores), d_scores.mT
        else:
            query_band = spread_windows(d_scores, positions_BQ)
            selector_BQL = _selector(positions_BQ, key.shape[2], d_scores.dtype)
            key_scores = (selector_BQL.mT @ d_scores).mT
        d_query += _with_table(query_band, rel_key)
        d_rel_key = _table_gradient(query_band, query)
        del query_band
        key_band = unshear(key_scores)
        d_key += _with_table(key_band, rel_query)
        d_rel_query = _table_gradient(key_band, key)
        return d_query, d_key, d_value, d_rel_key, d_rel_query, None, None, None, None
