"""The vocabulary head between its matrix products: one pass over a chunk's products each way.

`sums_kernel` reads the products once. Every element of its tile of registers keeps what it has seen
in its own column of tiles: the highest logit, the sum of exponentials relative to it, the highest
score of the draw, and where they were. Threads meet once, at the chunk's end, and the result joins
what the chunks before have left. `gradient_kernel` reads the products once, writes the gradient of
the logits and sums it over rows for the bias.

Letters: N masked slots, R rows and C ids of a tile.
"""

import triton
import triton.language as tl

from pipeline.modeling.kernels.gumbel import gumbel_tile

_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite number: unlike -inf, it may be subtracted from itself."""


@triton.jit
def _logits(products, bias, row_R, real_R, place_C, SIZE: tl.constexpr):
    """Load products [R, C] of fp32 and add the bias; padding rows have the bias alone."""
    inside_C = place_C < SIZE
    first_R = products + row_R.to(tl.int64) * SIZE
    product_RC = tl.load(
        first_R[:, None] + place_C[None, :], mask=real_R[:, None] & inside_C[None, :], other=0.0
    )
    bias_C = tl.load(bias + place_C, mask=inside_C, other=0.0)
    return product_RC + bias_C.to(tl.float32)[None, :]


@triton.jit
def _slots(noise, row_R, real_R):
    """Load what the noise of rows depends on: three uint32 [R, 1], and the key's two words."""
    words = noise.sample_words + row_R // noise.slots * 2
    position_R = tl.load(noise.positions + row_R, mask=real_R, other=0)
    first_R = tl.load(words, mask=real_R, other=0)
    second_R = tl.load(words + 1, mask=real_R, other=0)
    key_0 = tl.load(noise.key).to(tl.uint32)
    key_1 = tl.load(noise.key + 1).to(tl.uint32)
    slot_R3 = (
        position_R.to(tl.uint32)[:, None],
        first_R.to(tl.uint32)[:, None],
        second_R.to(tl.uint32)[:, None],
    )
    return slot_R3, (key_0, key_1)


@triton.jit
def _highest(value_RC, place_RC):
    """Find the highest value of each row and the lowest place where it is."""
    value_R = tl.reduce(value_RC, 1, tl.standard._elementwise_max)
    place_RC = tl.where(value_RC == value_R[:, None], place_RC, 2147483647)
    return value_R, tl.reduce(place_RC, 1, tl.standard._elementwise_min)


@triton.jit
def _join(value_at, id_at, value_R, id_R, real_R):
    """Put a chunk's highest values in place where they exceed those of the chunks before."""
    before_R = tl.load(value_at, mask=real_R, other=0.0)
    wins_R = real_R & (value_R > before_R)
    tl.store(value_at, value_R, mask=wins_R)
    tl.store(id_at, id_R.to(tl.int64), mask=wins_R)


@triton.jit(do_not_specialize=["noise", "first_id", "num_rows"])
def sums_kernel(
    products,
    bias,
    targets,
    sums,
    noise,
    first_id,
    num_rows,
    SIZE: tl.constexpr,
    DRAWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Take a chunk of `SIZE` ids that begins with `first_id` into the `Sums`: grid (row blocks)."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < num_rows
    seen_RC = tl.full([BLOCK_R, BLOCK_C], _LOWEST, tl.float32)
    seen_place_RC = tl.full([BLOCK_R, BLOCK_C], 0, tl.int32)
    sum_RC = tl.full([BLOCK_R, BLOCK_C], 0.0, tl.float32)
    score_RC = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    score_place_RC = tl.full([BLOCK_R, BLOCK_C], 0, tl.int32)
    if DRAWS:
        slot_R3, key_2 = _slots(noise, row_R, real_R)
    for first in range(0, SIZE, BLOCK_C):
        place_C = first + tl.arange(0, BLOCK_C)
        logit_RC = _logits(products, bias, row_R, real_R, place_C, SIZE)
        inside_1C = (place_C < SIZE)[None, :]
        # Comparisons are false for what is not a number, which reaches the sum and never wins.
        higher_RC = inside_1C & (logit_RC > seen_RC)
        gap_RC = tl.exp(-tl.abs(logit_RC - seen_RC))
        added_RC = tl.where(higher_RC, sum_RC * gap_RC + 1.0, sum_RC + gap_RC)
        sum_RC = tl.where(inside_1C, added_RC, sum_RC)
        seen_RC = tl.where(higher_RC, logit_RC, seen_RC)
        seen_place_RC = tl.where(higher_RC, place_C[None, :], seen_place_RC)
        if DRAWS:
            noise_RC = gumbel_tile(slot_R3, key_2, (first_id + first) // 4, BLOCK_R, BLOCK_C // 4)
            here_RC = logit_RC * noise.factor + noise_RC
            id_C = first_id + place_C
            allowed_1C = inside_1C & ((id_C >= noise.start) & (id_C < noise.stop))[None, :]
            better_RC = allowed_1C & (here_RC > score_RC)
            score_RC = tl.where(better_RC, here_RC, score_RC)
            score_place_RC = tl.where(better_RC, place_C[None, :], score_place_RC)
    top_R, place_R = _highest(seen_RC, seen_place_RC)
    sum_R = tl.reduce(sum_RC * tl.exp(seen_RC - top_R[:, None]), 1, tl.standard._sum_combine)
    before_R = tl.load(sums.maximum + row_R, mask=real_R, other=0.0)
    total_R = tl.load(sums.total + row_R, mask=real_R, other=0.0)
    maximum_R = tl.maximum(before_R, top_R)
    total_R = total_R * tl.exp(before_R - maximum_R) + sum_R * tl.exp(top_R - maximum_R)
    tl.store(sums.total + row_R, total_R, mask=real_R)
    _join(sums.maximum + row_R, sums.best_id + row_R, top_R, first_id + place_R, real_R)
    target_R = tl.load(targets + row_R, mask=real_R, other=-1) - first_id
    here_R = (target_R >= 0) & (target_R < SIZE)
    line_R = products + row_R.to(tl.int64) * SIZE
    logit_R = tl.load(line_R + target_R, mask=here_R, other=0.0)
    logit_R += tl.load(bias + target_R, mask=here_R, other=0.0).to(tl.float32)
    tl.store(sums.target_logit + row_R, logit_R, mask=here_R)
    if DRAWS:
        best_R, place_R = _highest(score_RC, score_place_RC)
        _join(sums.best_score + row_R, sums.drawn_id + row_R, best_R, first_id + place_R, real_R)


@triton.jit(do_not_specialize=["first_id", "num_rows"])
def gradient_kernel(
    products,
    bias,
    targets,
    maximum,
    scale,
    weight,
    d_logits,
    d_bias,
    first_id,
    num_rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Differentiate a chunk: grid (id blocks, parts of `ROWS` rows).

    `scale` is the loss's weight over the sum of exponentials; `d_logits` may be the products' own
    memory; `d_bias` [parts, SIZE] gets each part's sum over its rows.
    """
    place_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    inside_C = place_C < SIZE
    d_bias_RC = tl.full([BLOCK_R, BLOCK_C], 0.0, tl.float32)
    for first in range(0, ROWS, BLOCK_R):
        row_R = part * ROWS + first + tl.arange(0, BLOCK_R)
        real_R = row_R < num_rows
        logit_RC = _logits(products, bias, row_R, real_R, place_C, SIZE)
        # Rows past the end: exp(x - inf) is 0 for every x.
        maximum_R = tl.load(maximum + row_R, mask=real_R, other=float("inf"))
        scale_R = tl.load(scale + row_R, mask=real_R, other=0.0)
        weight_R = tl.load(weight + row_R, mask=real_R, other=0.0)
        target_R = tl.load(targets + row_R, mask=real_R, other=-1) - first_id
        share_RC = tl.exp(logit_RC - maximum_R[:, None]) * scale_R[:, None]
        is_target_RC = target_R[:, None] == place_C[None, :]
        d_logit_RC = share_RC - tl.where(is_target_RC, weight_R[:, None], 0.0)
        d_bias_RC += d_logit_RC
        at_RC = (row_R.to(tl.int64) * SIZE)[:, None] + place_C[None, :]
        narrow_RC = d_logit_RC.to(d_logits.dtype.element_ty)
        tl.store(d_logits + at_RC, narrow_RC, mask=real_R[:, None] & inside_C[None, :])
    d_bias_C = tl.reduce(d_bias_RC, 0, tl.standard._sum_combine)
    tl.store(d_bias + part * SIZE + place_C, d_bias_C, mask=inside_C)
