"""Dropout inside a kernel: the bits of `DropoutSite.keep_mask`, computed where they are used.

One Philox evaluation serves eight neighbouring elements of the [H, T, L] probabilities. Where L is
a multiple of eight, an octet never leaves its row and a tile needs one evaluation for eight
elements; elsewhere each element evaluates its own.

Letters: H heads, T tokens of all sequences, L keys in a row, R rows and C columns of a tile.
"""

import triton
import triton.language as tl

from pipeline.modeling.kernels.philox import philox4x32


@triton.jit
def _octet_words(octet, drop):
    """Evaluate Philox at the counters (octet, layer, where): four uint32 tiles."""
    return philox4x32(
        octet.to(tl.uint32),
        (octet >> 32).to(tl.uint32),
        tl.full(octet.shape, drop.layer, tl.uint32),
        tl.full(octet.shape, drop.where, tl.uint32),
        tl.load(drop.words_2).to(tl.uint32),
        tl.load(drop.words_2 + 1).to(tl.uint32),
    )


@triton.jit
def keep_tile(
    drop,
    row_element_R,
    first_column,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Draw a tile of a keep mask.

    Args:
        drop: The site, a `Drop`.
        row_element_R: int64 [R], index of each row's first element in the whole mask.
        first_column: First column of the tile.
        ALIGNED: Whether rows begin at multiples of eight elements, and so does the tile.
        ROWS: R.
        COLUMNS: C.

    Returns:
        int1 [R, C], true where the element is kept.
    """
    if ALIGNED:
        octet_R = (row_element_R + first_column) // 8
        octet_RO = octet_R[:, None] + tl.arange(0, COLUMNS // 8)[None, :]
        w0, w1, w2, w3 = _octet_words(octet_RO, drop)
        # Joins put the new axis last: the words of an octet in order, then low half before high.
        words_RO22 = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        halves = tl.join(words_RO22 & 0xFFFF, words_RO22 >> 16)
        half_RC = tl.reshape(halves, [ROWS, COLUMNS])
    else:
        element_RC = (row_element_R + first_column)[:, None] + tl.arange(0, COLUMNS)[None, :]
        w0, w1, w2, w3 = _octet_words(element_RC // 8, drop)
        place_RC = (element_RC % 8).to(tl.int32)
        first_RC = tl.where(place_RC < 2, w0, w1)
        second_RC = tl.where(place_RC < 6, w2, w3)
        word_RC = tl.where(place_RC < 4, first_RC, second_RC)
        half_RC = tl.where(place_RC % 2 == 0, word_RC & 0xFFFF, word_RC >> 16)
    return half_RC.to(tl.int32) >= drop.threshold
