"""A kernel that writes the noise which the fused head keeps in registers, for comparison."""

import triton
import triton.language as tl

from pipeline.modeling.kernels.gumbel import gumbel_tile


@triton.jit
def noise_kernel(
    noise, positions, words, key, num_rows, size, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write fp32 [rows, size]; one sample for each row: grid (row blocks, id blocks)."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    place_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real_R = row_R < num_rows
    slot_R3 = (
        tl.load(positions + row_R, mask=real_R, other=0).to(tl.uint32)[:, None],
        tl.load(words + 2 * row_R, mask=real_R, other=0).to(tl.uint32)[:, None],
        tl.load(words + 2 * row_R + 1, mask=real_R, other=0).to(tl.uint32)[:, None],
    )
    key_2 = (tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32))
    first_quad = tl.program_id(1) * (BLOCK_C // 4)
    noise_RC = gumbel_tile(slot_R3, key_2, first_quad, BLOCK_R, BLOCK_C // 4)
    inside_RC = real_R[:, None] & (place_C < size)[None, :]
    tl.store(noise + row_R[:, None] * size + place_C[None, :], noise_RC, mask=inside_RC)
