"""Tiles of scores, shared by the forward and the backward kernels.

The position terms arrive as two products with the relative table, one row for each token:

    by_query   query rows x table: read at the row's own query, the column of the distance
    by_key     key rows x table:   read at the row's own key, the column of the distance

A column is a distance (2 L columns, and the address is affine in query and key: the skew of
Transformer-XL, arXiv:1901.02860, appendix B) or a row of the table (the row of each distance is
looked up first). Either way neighbours in memory are neighbours in the tile: by_query along the
keys, by_key along the queries, which is why one tile is [Q, K] and the other [K, Q].

Letters: L longest sequence, Q queries and K keys of a tile, d head size.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(extent, sequence, MAX_LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """Return the first token of a sequence, in 64 bits for addresses, and its length in tokens."""
    if PACKED:
        first = tl.load(extent.starts + sequence)
        length = tl.load(extent.starts + sequence + 1) - first
        start = first.to(tl.int64)
    else:
        start = tl.cast(sequence, tl.int64) * MAX_LENGTH
        length = MAX_LENGTH
    return start, length


@triton.jit
def add_product(left, right, total, FORM: tl.constexpr):
    """Add the product of two matrices to `total`, in the dtype of sums and without TF32."""
    return tl.dot(left, right, total, input_precision=FORM.precision, out_dtype=FORM.wide)


@triton.jit
def row_tile(rows, head, start, row_R, real_R, HEAD_SIZE: tl.constexpr):
    """Load rows [R, d] of `Rows` that follow token `start`, zero where `real_R` is false."""
    first = rows.pointer + head * rows.stride_h + start * rows.stride_t
    offset_Rd = (row_R * rows.stride_t)[:, None] + tl.arange(0, HEAD_SIZE)[None, :]
    return tl.load(first + offset_Rd, mask=real_R[:, None], other=0.0)


@triton.jit
def store_rows(rows, head, start, row_R, real_R, value_Rd, HEAD_SIZE: tl.constexpr):
    """Store rows [R, d] where `real_R` is true, in the dtype of their tensor."""
    first = rows.pointer + head * rows.stride_h + start * rows.stride_t
    offset_Rd = (row_R * rows.stride_t)[:, None] + tl.arange(0, HEAD_SIZE)[None, :]
    tl.store(first + offset_Rd, value_Rd.to(first.dtype.element_ty), mask=real_R[:, None])


@triton.jit
def _position_tile(
    products,
    table_rows,
    first_own,
    first_other,
    length,
    MAX_LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Read a product where its rows `own` meet positions `other`.

    The tile is loaded as one line of elements: in a matrix Triton would give each thread as many
    neighbours as in the loads of keys, which are aligned, and these are not.

    Args:
        products: Pointer to the sequence's first row of [tokens, COLUMNS].
        table_rows: Pointer to int16 [2 L], row of the table where other - own = e - (L - 1).
        first_own: Position of the tile's first own row.
        first_other: Position of the tile's first other row.
        length: Tokens of the sequence.
        MAX_LENGTH: L.
        COLUMNS: Columns of the product.
        BY_ROW: Whether they are rows of the table; distances if not.
        MASKED: Whether the tile may reach past the end of the sequence.
        OWN: Own rows of the tile.
        OTHER: Other rows of the tile.

    Returns:
        [OWN, OTHER], zero outside the sequence.
    """
    element = tl.arange(0, OWN * OTHER)
    own, other = element // OTHER, element % OTHER
    # 32-bit sums until the pointer comes: what stays the same in a loop then takes one register.
    column = (other - own) + ((MAX_LENGTH - 1) + first_other - first_own)
    products += first_own * COLUMNS
    if MASKED:
        inside = (first_own + own < length) & (first_other + other < length)
        if BY_ROW:
            column = tl.load(table_rows + column, mask=inside, other=0).to(tl.int32)
        tile = tl.load(products + (own * COLUMNS + column), mask=inside, other=0.0)
    else:
        if BY_ROW:
            column = tl.load(table_rows + column).to(tl.int32)
        tile = tl.load(products + (own * COLUMNS + column))
    return tl.reshape(tile, [OWN, OTHER])


@triton.jit
def position_tiles(
    terms,
    first_row,
    first_query,
    first_key,
    length,
    MAX_LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Read content to position [Q, K] and position to content [K, Q]; see `_position_tile`.

    `terms` are the `PositionTerms` of the launch; `first_row` counts the rows of earlier heads.
    """
    to_position_QK = _position_tile(
        *(terms.by_query + first_row * COLUMNS, terms.table_rows, first_query, first_key, length),
        *(MAX_LENGTH, COLUMNS, BY_ROW, MASKED, BLOCK_Q, BLOCK_K),
    )
    key_rows = terms.table_rows + 2 * MAX_LENGTH
    to_content_KQ = _position_tile(
        *(terms.by_key + first_row * COLUMNS, key_rows, first_key, first_query, length),
        *(MAX_LENGTH, COLUMNS, BY_ROW, MASKED, BLOCK_K, BLOCK_Q),
    )
    return to_position_QK, to_content_KQ


@triton.jit
def keys_that_count(key_mask, start, key_K, real_K, HAS_MASK: tl.constexpr):
    """Return int1 [K]: keys of the sequence that are no padding."""
    if HAS_MASK:
        real_K = real_K & (tl.load(key_mask + start + key_K, mask=real_K, other=0) != 0)
    return real_K
