"""Backward pass, second part: from the gradient of the scores to those of all inputs but values.

    side_kernel    owns rows of dS: dQ from dS by query, dK from dS by key
    table_kernel   owns distances: the gradient of one projection of the relative table
    row_kernel     owns rows of the table, and sums the distances that share each

In both forms of dS the entries of one distance lie on a diagonal. The kernels read tiles along
diagonals, [row, diagonal], by affine addresses: no band with zeros is stored. Each output element
is written by one program, and nothing is added atomically.

Letters: T tokens of all sequences, L longest sequence, d head size, R rows, C columns and
U diagonals of a tile.
"""

import triton
import triton.language as tl

from pipeline.modeling.kernels.score_tiles import add_product, row_tile, sequence_bounds, store_rows


@triton.jit
def _diagonal_tile(d_scores, row_R, diagonal_U, length, max_length):
    """Load dS[r, r + u] as [R, U], zero outside the sequence; `d_scores` is the sequence's."""
    column_RU = row_R[:, None] + diagonal_U[None, :]
    inside_RU = (row_R < length)[:, None] & (column_RU >= 0) & (column_RU < length)
    offset_RU = (row_R * (max_length + 1))[:, None] + diagonal_U[None, :]
    return tl.load(d_scores + offset_RU, mask=inside_RU, other=0.0)


@triton.jit
def side_kernel(
    d_scores,
    other,
    table,
    table_rows,
    extent,
    gradient,
    scale,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of queries or keys: grid (row blocks, sequences, heads).

    With column c of row r on diagonal u = c - r, it is
    scale * sum over c of dS[r, c] other[c]  +  sum over u of dS[r, r + u] table[row of u].
    Where rows are queries, u is key - query; where they are keys, it is query - key.
    """
    head = tl.program_id(2).to(tl.int64)
    start, length = sequence_bounds(extent, tl.program_id(1), FORM.max_length, FORM.packed)
    first_row = tl.program_id(0) * BLOCK_R
    if first_row >= length:
        return
    row_R = first_row + tl.arange(0, BLOCK_R)
    real_R = row_R < length
    max_length = FORM.max_length
    d_scores += (head * extent.num_tokens + start) * max_length
    gradient_Rd = tl.full([BLOCK_R, FORM.head_size], 0.0, FORM.wide)
    for first_column in range(0, length, BLOCK_C):
        column_C = first_column + tl.arange(0, BLOCK_C)
        real_C = column_C < length
        d_scores_RC = tl.load(
            d_scores + (row_R * max_length)[:, None] + column_C[None, :],
            mask=real_R[:, None] & real_C[None, :],
            other=0.0,
        )
        other_Cd = row_tile(other, head, start, column_C, real_C, FORM.head_size)
        gradient_Rd = add_product(d_scores_RC, other_Cd, gradient_Rd, FORM)
    gradient_Rd = gradient_Rd * scale
    if FORM.num_columns:
        # The diagonals that meet this block, from its last row's first column on.
        lowest = 1 - BLOCK_R - first_row
        for step in range(0, length + BLOCK_R - 1, BLOCK_C):
            diagonal_U = lowest + step + tl.arange(0, BLOCK_C)
            d_scores_RU = _diagonal_tile(d_scores, row_R, diagonal_U, length, max_length)
            is_used_U = (diagonal_U > -length) & (diagonal_U < length)
            table_row_U = tl.load(
                table_rows + (max_length - 1) + diagonal_U, mask=is_used_U, other=0
            ).to(tl.int32)
            table_Ud = row_tile(table, head, 0, table_row_U, is_used_U, FORM.head_size)
            gradient_Rd = add_product(d_scores_RU, table_Ud, gradient_Rd, FORM)
    store_rows(gradient, head, start, row_R, real_R, gradient_Rd, FORM.head_size)


@triton.jit
def table_kernel(
    d_scores,
    side,
    extent,
    gradient,
    num_sequences,
    sequences_a_part,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum dS[r, r + u] side[r] over the rows of some sequences: grid (diagonals, parts, heads).

    The result is [heads x parts, 2 L, d], diagonal u at L - 1 + u.
    """
    head = tl.program_id(2).to(tl.int64)
    max_length = FORM.max_length
    first_element = tl.program_id(0) * BLOCK_C
    element_U = first_element + tl.arange(0, BLOCK_C)
    lowest = first_element - (max_length - 1)
    highest = lowest + BLOCK_C - 1
    diagonal_U = lowest + tl.arange(0, BLOCK_C)
    gradient_Ud = tl.full([BLOCK_C, FORM.head_size], 0.0, FORM.wide)
    first_sequence = tl.program_id(1) * sequences_a_part
    end_sequence = tl.minimum(first_sequence + sequences_a_part, num_sequences)
    for sequence in range(first_sequence, end_sequence):
        start, length = sequence_bounds(extent, sequence, FORM.max_length, FORM.packed)
        scores = d_scores + (head * extent.num_tokens + start) * max_length
        # Rounded down, so that tiles begin at multiples of the block.
        first_row = tl.maximum(-highest, 0) // BLOCK_R * BLOCK_R
        end_row = tl.minimum(length, length - lowest)
        for row in range(first_row, end_row, BLOCK_R):
            row_R = row + tl.arange(0, BLOCK_R)
            d_scores_RU = _diagonal_tile(scores, row_R, diagonal_U, length, max_length)
            side_Rd = row_tile(side, head, start, row_R, row_R < length, FORM.head_size)
            gradient_Ud = add_product(tl.trans(d_scores_RU), side_Rd, gradient_Ud, FORM)
    part = head * tl.num_programs(1) + tl.program_id(1)
    exists_U = element_U < 2 * max_length
    store_rows(gradient, part, 0, element_U, exists_U, gradient_Ud, FORM.head_size)


@triton.jit
def row_kernel(
    by_distance,
    table_rows,
    gradient,
    num_rows,
    parts,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum what `table_kernel` left over parts and over each row's distances: grid (rows, heads).

    A block of rows skips the distances of others. The rest is a product with zeros and ones, whose
    order of sums is fixed.
    """
    head = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    gradient_Rd = tl.full([BLOCK_R, FORM.head_size], 0.0, FORM.wide)
    for first_element in range(0, 2 * FORM.max_length, BLOCK_C):
        element_C = first_element + tl.arange(0, BLOCK_C)
        exists_C = element_C < 2 * FORM.max_length
        table_row_C = tl.load(table_rows + element_C, mask=exists_C, other=-1).to(tl.int32)
        is_row_RC = (table_row_C[None, :] == row_R[:, None]).to(FORM.wide)
        any_R = tl.reduce(is_row_RC, 1, tl.standard._elementwise_max)
        if tl.reduce(any_R, 0, tl.standard._elementwise_max) > 0.0:
            for part in range(0, parts):
                rows_Cd = row_tile(
                    by_distance, head * parts + part, 0, element_C, exists_C, FORM.head_size
                )
                gradient_Rd = add_product(is_row_RC, rows_Cd, gradient_Rd, FORM)
    store_rows(gradient, head, 0, row_R, row_R < num_rows, gradient_Rd, FORM.head_size)
