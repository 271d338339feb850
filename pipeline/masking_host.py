"""The masking laws for single tokens on the host: the integers of `pipeline.masking`, in NumPy.

A device evaluates the laws as they are written down there, in tensors whose shapes do not depend on
the data. A host may look at the data, which makes the same choice some twenty times cheaper:

    uniform    the words of a row are sorted; the one at the quota is the threshold
    windowed   one word a window is drawn, not one a position
    both       what is chosen is a list, from which slots, targets and masked ids are filled

Letters: B sequences, L sequence length, Q quads of words, W windows, K masked slots of a sequence.
"""

import math
import threading
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
_MASK = 0xFFFFFFFF
_WORD, _HALF = np.uint64(_MASK), np.uint64(32)
_MULTIPLIERS = np.array([0xCD9E8D57, 0xD2511F53], np.uint64)[:, None, None]  # of c2, of c0
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_QUADS_AT_ONCE = 8192  # three arrays of 128 KiB stay in a core's own cache
_THREAD = threading.local()


def position_words(
    num_positions: int, sample_words_B2: Int64Array, key: tuple[int, int]
) -> NDArray[np.uint32]:
    """Give every position of every sample one word, as `counter_rng.position_words` does.

    Args:
        num_positions: L.
        sample_words_B2: int64 [B, 2], the identities of the samples.
        key: The stream.

    Returns:
        uint32 [B, L].
    """
    num_quads = -(-num_positions // 4)
    words_BQ4 = np.empty((len(sample_words_B2), num_quads, 4), np.uint32)
    rows = max(1, _QUADS_AT_ONCE // max(1, num_quads))
    for first in range(0, len(words_BQ4), rows):
        some = slice(first, first + rows)
        _philox(sample_words_B2[some].astype(np.uint64), key, words_BQ4[some])
    return words_BQ4.reshape(len(words_BQ4), -1)[:, :num_positions]


def _philox(
    sample_words_B2: NDArray[np.uint64], key: tuple[int, int], out_BQ4: NDArray[np.uint32]
) -> None:
    """Evaluate Philox4x32-10 at the counters (quad, 0, first word, second word).

    Of a counter's words two are multiplied in a round, c0 and c2, and two are not, c1 and c3: the
    pairs lie together, so that one call of NumPy does both. In the first round quads and samples
    have not met yet: it is evaluated for each of them by itself.
    """
    factors, others, products = _scratch((2, *out_BQ4.shape[:2]))
    first_key, *keys = _round_keys(key)
    sample_B1 = sample_words_B2[:, :1] * _MULTIPLIERS[0, 0, 0]
    quad_Q = np.arange(out_BQ4.shape[1], dtype=np.uint64) * _MULTIPLIERS[1, 0, 0]
    factors[0] = (sample_B1 >> _HALF) ^ first_key[0]
    np.bitwise_xor(quad_Q >> _HALF, sample_words_B2[:, 1:] ^ first_key[1], out=factors[1])
    others[0], others[1] = sample_B1 & _WORD, quad_Q & _WORD
    for round_key in keys:
        np.multiply(factors[::-1], _MULTIPLIERS, out=products)
        np.right_shift(products, _HALF, out=factors)
        np.bitwise_xor(factors, others, out=factors)
        np.bitwise_xor(factors, round_key, out=factors)
        np.bitwise_and(products, _WORD, out=others)
    out_BQ4[:, :, 0], out_BQ4[:, :, 2] = factors
    out_BQ4[:, :, 1], out_BQ4[:, :, 3] = others


def _scratch(shape: tuple[int, int, int]) -> list[NDArray[np.uint64]]:
    """Three arrays, the same memory in every call of a thread: fetching it costs a third more."""
    size = math.prod(shape)
    if size > getattr(_THREAD, "size", 0):
        _THREAD.size, _THREAD.arrays = size, np.empty((3, size), np.uint64)
    return [array[:size].reshape(shape) for array in _THREAD.arrays]


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, int]) -> NDArray[np.uint64]:
    """The two words that each round mixes in, uint64 [rounds, 2, 1, 1]."""
    steps = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array(_WEYL, np.uint64)
    return (np.array(key, np.uint64) + steps & _WORD)[:, :, None, None]


def choose_uniform(
    maskable_BL: BoolArray, quota_B: Int64Array, words_BL: NDArray[np.uint32]
) -> Int64Array:
    """Choose the maskable positions with the smallest words; of equal ones those in front.

    Args:
        maskable_BL: bool [B, L].
        quota_B: int64 [B], how many to choose, at least 1 and at most L.
        words_BL: uint32 [B, L], the stream of places; what is not maskable is overwritten.

    Returns:
        int64 [n], the chosen places, ascending, counted through all rows.
    """
    never = np.uint32(_MASK)
    np.copyto(words_BL, never, where=~maskable_BL)
    threshold_B1 = np.take_along_axis(np.sort(words_BL, axis=1), quota_B[:, None] - 1, axis=1)
    chosen = np.flatnonzero(words_BL <= threshold_B1)
    # Every row has as many as it should, or more: then words are equal, or few are maskable.
    if len(chosen) == quota_B.sum() and (threshold_B1 < never).all():
        return chosen
    long_BL = np.where(maskable_BL, words_BL.astype(np.int64), np.int64(1) << 32)
    order_BL = np.argsort(long_BL, axis=1, kind="stable")
    count_B = np.minimum(quota_B, maskable_BL.sum(axis=1))
    is_taken_BL = np.arange(order_BL.shape[1]) < count_B[:, None]
    is_chosen_BL = np.zeros_like(is_taken_BL)
    np.put_along_axis(is_chosen_BL, order_BL, is_taken_BL, axis=1)
    return np.flatnonzero(is_chosen_BL)


def choose_windowed(
    maskable_BL: BoolArray,
    quota_B: Int64Array,
    words_BW: NDArray[np.uint32],
    window: int,
) -> Int64Array:
    """Choose one maskable position of each window, left to right, until the quota is reached.

    Args:
        maskable_BL: bool [B, L].
        quota_B: int64 [B], how many to choose.
        words_BW: uint32 [B, W], the first words of the stream of places.
        window: Maskable positions of a window.

    Returns:
        int64 [n], the chosen places, ascending, counted through all rows.
    """
    batch, length = maskable_BL.shape
    maskable = np.flatnonzero(maskable_BL)
    ends_B = np.searchsorted(maskable, np.arange(batch + 1) * length)
    count_B1 = np.diff(ends_B)[:, None]
    offset_W = np.arange(words_BW.shape[1]) * window
    size_BW = np.clip(count_B1 - offset_W, 0, window)
    winner_BW = (words_BW.astype(np.uint64) * size_BW.astype(np.uint64) >> _HALF).astype(np.int64)
    is_taken_BW = (size_BW > 0) & (np.arange(words_BW.shape[1]) < quota_B[:, None])
    return maskable[(ends_B[:-1, None] + offset_W + winner_BW)[is_taken_BW]]


def fill_slots(
    chosen: Int64Array, batch: int, length: int, num_slots: int
) -> tuple[Int64Array, BoolArray]:
    """Put chosen places, row by row, into a fixed number of slots.

    Args:
        chosen: int64 [n], ascending, counted through all rows.
        batch: B.
        length: L.
        num_slots: K, no fewer than any row has.

    Returns:
        (positions, int64 [B, K], zeros behind the last; which slots are real, bool [B, K]).
    """
    starts_B = np.arange(batch + 1) * length
    if len(chosen) == batch * num_slots:
        positions_BK = chosen.reshape(batch, num_slots) - starts_B[:-1, None]
        return positions_BK, np.ones((batch, num_slots), bool)
    counts_B = np.diff(np.searchsorted(chosen, starts_B))
    valid_BK = np.arange(num_slots) < counts_B[:, None]
    positions_BK = np.zeros((batch, num_slots), np.int64)
    positions_BK[valid_BK] = chosen - np.repeat(starts_B[:-1], counts_B)
    return positions_BK, valid_BK
