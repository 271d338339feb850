"""Backward pass, first part: the gradient of the scores, and of the values on the way.

`delta_kernel` sums context * d context, a number a query. `score_kernel` owns a block of keys: it
computes probabilities and dropout bits again, adds up dV in registers, and writes dS twice, by
query [T, L] and by key [T, L], so that every later read runs along memory.

Letters: T tokens of all sequences, L longest sequence, d head size, Q queries and K keys of a tile.
"""

import triton
import triton.language as tl

from pipeline.modeling.kernels.keep_bits import keep_tile
from pipeline.modeling.kernels.score_tiles import (
    add_product,
    keys_that_count,
    position_tiles,
    row_tile,
    sequence_bounds,
    store_rows,
)


@triton.jit
def delta_kernel(context, d_context, delta, num_tokens, FORM: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sum context * d context over the channels: grid (token blocks, heads)."""
    head = tl.program_id(1).to(tl.int64)
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_T = token_T < num_tokens
    context_Td = row_tile(context, head, 0, token_T, real_T, FORM.head_size)
    d_context_Td = row_tile(d_context, head, 0, token_T, real_T, FORM.head_size)
    product_Td = context_Td.to(FORM.wide) * d_context_Td.to(FORM.wide)
    delta_T = tl.reduce(product_Td, 1, tl.standard._sum_combine)
    tl.store(delta + head * num_tokens + token_T, delta_T, mask=real_T)


@triton.jit(do_not_specialize=["drop"])
def score_kernel(
    query,
    key,
    value,
    terms,
    key_mask,
    extent,
    drop,
    d_context,
    log_sum_exp,
    delta,
    d_value,
    by_query,
    by_key,
    scale,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute dV and both forms of dS for a block of keys: grid (key blocks, sequences, heads).

    Tiles are [K, Q]: the transposed probabilities are then the left side of dV's product.
    """
    head = tl.program_id(2).to(tl.int64)
    start, length = sequence_bounds(extent, tl.program_id(1), FORM.max_length, FORM.packed)
    first_key = tl.program_id(0) * BLOCK_K
    if first_key >= length:
        return
    key_K = first_key + tl.arange(0, BLOCK_K)
    real_K = key_K < length
    first_row = head * extent.num_tokens + start
    by_query += first_row * FORM.max_length
    by_key += first_row * FORM.max_length
    mask_row = first_row + drop.first_head * extent.num_tokens
    key_Kd = row_tile(key, head, start, key_K, real_K, FORM.head_size)
    value_Kd = row_tile(value, head, start, key_K, real_K, FORM.head_size)
    counts_K = keys_that_count(key_mask, start, key_K, real_K, FORM.has_mask)
    d_value_Kd = tl.full([BLOCK_K, FORM.head_size], 0.0, FORM.wide)
    for first_query in range(0, length, BLOCK_Q):
        query_Q = first_query + tl.arange(0, BLOCK_Q)
        real_Q = query_Q < length
        query_Qd = row_tile(query, head, start, query_Q, real_Q, FORM.head_size)
        d_context_Qd = row_tile(d_context, head, start, query_Q, real_Q, FORM.head_size)
        row_Q = first_row + query_Q
        log_sum_exp_Q = tl.load(log_sum_exp + row_Q, mask=real_Q, other=float("-inf"))
        delta_Q = tl.load(delta + row_Q, mask=real_Q, other=0.0)
        scores_KQ = tl.full([BLOCK_K, BLOCK_Q], 0.0, FORM.wide)
        if FORM.num_columns:
            to_position_QK, to_content_KQ = position_tiles(
                *(terms, first_row, first_query, first_key, length, FORM.max_length),
                *(FORM.num_columns, FORM.by_row, MASKED, BLOCK_Q, BLOCK_K),
            )
            scores_KQ = tl.trans(to_position_QK).to(FORM.wide) + to_content_KQ.to(FORM.wide)
            scores_KQ = scores_KQ * (1.0 / scale)
        scores_KQ = add_product(key_Kd, tl.trans(query_Qd), scores_KQ, FORM)
        scores_KQ = scores_KQ * scale
        scores_KQ = tl.where(counts_K[:, None], scores_KQ, float("-inf"))
        # Rows without a key and rows past the end: exp(x - inf) is 0 for every x.
        divisor_Q = tl.where(log_sum_exp_Q == float("-inf"), float("inf"), log_sum_exp_Q)
        probs_KQ = tl.exp(scores_KQ - divisor_Q[None, :])
        zero_KQ = tl.full([BLOCK_K, BLOCK_Q], 0.0, FORM.wide)
        d_probs_KQ = add_product(value_Kd, tl.trans(d_context_Qd), zero_KQ, FORM)
        dropped_KQ = probs_KQ
        if FORM.drops:
            element_Q = (mask_row + query_Q) * FORM.max_length
            keep_QK = keep_tile(drop, element_Q, first_key, FORM.aligned, BLOCK_Q, BLOCK_K)
            keep_KQ = tl.trans(keep_QK)
            dropped_KQ = tl.where(keep_KQ, probs_KQ, 0.0)
            d_probs_KQ = tl.where(keep_KQ, d_probs_KQ * drop.keep_scale, 0.0)
        dropped_KQ = dropped_KQ.to(d_context_Qd.dtype)
        d_value_Kd = add_product(dropped_KQ, d_context_Qd, d_value_Kd, FORM)
        d_scores_KQ = (probs_KQ * (d_probs_KQ - delta_Q[None, :])).to(key_Kd.dtype)
        offset_KQ = (key_K * FORM.max_length)[:, None] + query_Q[None, :]
        tl.store(by_key + offset_KQ, d_scores_KQ, mask=real_K[:, None] & real_Q[None, :])
        offset_QK = (query_Q * FORM.max_length)[:, None] + key_K[None, :]
        d_scores_QK = tl.trans(d_scores_KQ)
        tl.store(by_query + offset_QK, d_scores_QK, mask=real_Q[:, None] & real_K[None, :])
    d_value_Kd = d_value_Kd * drop.keep_scale
    store_rows(d_value, head, start, key_K, real_K, d_value_Kd, FORM.head_size)
