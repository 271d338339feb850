"""Dropout inside a kernel: the bits of `DropoutSite.keep_mask`, computed where they are used.

One Philox evaluation serves eight neighbouring elements of the [H, T, L] probabilities. Where L is
a multiple of eight, an octet never leaves its row and a tile needs one evaluation for eight
elements; elsewhere each element evaluates its own.

Letters: H heads, T tokens of all sequences, L keys in a row, R rows and C columns of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def _philox4x32(octet, drop):
    """Philox4x32-10 of the counters (octet, layer, where): four uint32 tiles, as counter_rng's."""
    multiplier_0: tl.constexpr = 0xD2511F53
    multiplier_1: tl.constexpr = 0xCD9E8D57
    key_0 = tl.load(drop.words_2).to(tl.uint32)
    key_1 = tl.load(drop.words_2 + 1).to(tl.uint32)
    c0 = octet.to(tl.uint32)
    c1 = (octet >> 32).to(tl.uint32)
    c2 = tl.full(octet.shape, drop.layer, tl.uint32)
    c3 = tl.full(octet.shape, drop.where, tl.uint32)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, multiplier_0)
        high_1 = tl.umulhi(c2, multiplier_1)
        low_0 = tl.mul(c0, multiplier_0, sanitize_overflow=False)
        low_1 = tl.mul(c2, multiplier_1, sanitize_overflow=False)
        c0 = high_1 ^ c1 ^ key_0
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_1
        c3 = low_0
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


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
        w0, w1, w2, w3 = _philox4x32(octet_RO, drop)
        # Joins put the new axis last: the words of an octet in order, then low half before high.
        words_RO22 = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        halves = tl.join(words_RO22 & 0xFFFF, words_RO22 >> 16)
        half_RC = tl.reshape(halves, [ROWS, COLUMNS])
    else:
        element_RC = (row_element_R + first_column)[:, None] + tl.arange(0, COLUMNS)[None, :]
        w0, w1, w2, w3 = _philox4x32(element_RC // 8, drop)
        place_RC = (element_RC % 8).to(tl.int32)
        first_RC = tl.where(place_RC < 2, w0, w1)
        second_RC = tl.where(place_RC < 6, w2, w3)
        word_RC = tl.where(place_RC < 4, first_RC, second_RC)
        half_RC = tl.where(place_RC % 2 == 0, word_RC & 0xFFFF, word_RC >> 16)
    return half_RC.to(tl.int32) >= drop.threshold
