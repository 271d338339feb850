"""Forward pass: one program owns a block of queries and walks over the keys of its sequence.

Scores, softmax and dropout of a tile live in registers; the running maximum and sum make the
softmax exact (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). What is
written is the context and, for the backward pass, the log-sum-exp of each row. A row without a key
has context 0 and log-sum-exp -inf.

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


@triton.jit(do_not_specialize=["drop"])
def forward_kernel(
    query,
    key,
    value,
    terms,
    key_mask,
    extent,
    drop,
    context,
    log_sum_exp,
    scale,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a block of queries of one sequence and head: grid (query blocks, sequences, heads).

    Tensors begin at this launch's first head.
    """
    head = tl.program_id(2).to(tl.int64)
    start, length = sequence_bounds(extent, tl.program_id(1), FORM.max_length, FORM.packed)
    first_query = tl.program_id(0) * BLOCK_Q
    if first_query >= length:
        return
    query_Q = first_query + tl.arange(0, BLOCK_Q)
    real_Q = query_Q < length
    first_row = head * extent.num_tokens + start
    mask_row_Q = first_row + drop.first_head * extent.num_tokens + query_Q
    query_Qd = row_tile(query, head, start, query_Q, real_Q, FORM.head_size)
    maximum_Q = tl.full([BLOCK_Q], float("-inf"), FORM.wide)
    sum_Q = tl.full([BLOCK_Q], 0.0, FORM.wide)
    context_Qd = tl.full([BLOCK_Q, FORM.head_size], 0.0, FORM.wide)
    for first_key in range(0, length, BLOCK_K):
        key_K = first_key + tl.arange(0, BLOCK_K)
        inside_K = key_K < length
        key_Kd = row_tile(key, head, start, key_K, inside_K, FORM.head_size)
        scores_QK = tl.full([BLOCK_Q, BLOCK_K], 0.0, FORM.wide)
        if FORM.num_columns:
            to_position_QK, to_content_KQ = position_tiles(
                *(terms, first_row, first_query, first_key, length, FORM.max_length),
                *(FORM.num_columns, FORM.by_row, MASKED, BLOCK_Q, BLOCK_K),
            )
            scores_QK = to_position_QK.to(FORM.wide) + tl.trans(to_content_KQ).to(FORM.wide)
            # Added by the product itself: the sum then has the layout of matrix units, and with it
            # all that follows.
            scores_QK = scores_QK * (1.0 / scale)
        scores_QK = add_product(query_Qd, tl.trans(key_Kd), scores_QK, FORM)
        scores_QK = scores_QK * scale
        counts_K = keys_that_count(key_mask, start, key_K, inside_K, FORM.has_mask)
        scores_QK = tl.where(counts_K[None, :], scores_QK, float("-inf"))
        seen_Q = tl.maximum(maximum_Q, tl.reduce(scores_QK, 1, tl.standard._elementwise_max))
        # A row that has seen no key yet would subtract -inf from -inf.
        shift_Q = tl.where(seen_Q == float("-inf"), 0.0, seen_Q)
        probs_QK = tl.exp(scores_QK - shift_Q[:, None])
        shrink_Q = tl.exp(maximum_Q - shift_Q)
        sum_Q = sum_Q * shrink_Q + tl.reduce(probs_QK, 1, tl.standard._sum_combine)
        maximum_Q = seen_Q
        if FORM.drops:
            keep_QK = keep_tile(
                drop, mask_row_Q * FORM.max_length, first_key, FORM.aligned, BLOCK_Q, BLOCK_K
            )
            probs_QK = tl.where(keep_QK, probs_QK, 0.0)
        value_Kd = row_tile(value, head, start, key_K, inside_K, FORM.head_size)
        context_Qd = add_product(
            probs_QK.to(value_Kd.dtype), value_Kd, context_Qd * shrink_Q[:, None], FORM
        )
    divisor_Q = tl.where(sum_Q == 0.0, 1.0, sum_Q)
    context_Qd = context_Qd * (drop.keep_scale / divisor_Q)[:, None]
    store_rows(context, head, start, query_Q, real_Q, context_Qd, FORM.head_size)
    log_sum_exp_Q = tl.where(sum_Q == 0.0, float("-inf"), maximum_Q + tl.log(divisor_Q))
    tl.store(log_sum_exp + first_row + query_Q, log_sum_exp_Q, mask=real_Q)
