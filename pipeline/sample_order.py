"""The order of the samples in every epoch: an O(1)-memory permutation, a function of position.

    SampleOrder   position -> epoch and sample
    SkipList      how many samples were trained on -> position, over windows that are left out

Blocks of neighbours are permuted, then the samples within a window of blocks, so that a cold disk
reads runs. Example with 10 sequences, blocks of 2 and windows of 2 blocks: blocks in order
(3 0 4 1 2), windows (3 0) and (4 1 2); position 5 of the epoch is some sample of blocks 4, 1, 2.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.counter_rng import WORD, philox4x32, stream_key

Int64Array = npt.NDArray[np.int64]
_FEISTEL_ROUNDS = 6
_TABLE_BITS = 10  # of half an index: tables of 49 kB serve a million blocks, and any window


def permute(index: Int64Array, size: int, key: tuple[int, int]) -> Int64Array:
    """Apply a keyed permutation of [0, size) in constant memory.

    A balanced Feistel network over the next power of four, whose round function is Philox, is
    applied again to what lands outside (cycle walking; Black and Rogaway, CT-RSA 2002, section 3).

    Args:
        index: int64 array of values in [0, size).
        size: Size of the domain.
        key: The permutation's key.

    Returns:
        int64 array of the same shape, values in [0, size).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    tables = _round_tables(half_bits, key) if half_bits <= _TABLE_BITS else None

    def scramble(values: Int64Array) -> Int64Array:
        left, right = values >> half_bits, values & mask
        for number in range(_FEISTEL_ROUNDS):
            if tables is not None:
                word = tables[number].take(right)
            else:
                word = _round(right, number, key) & mask
            left, right = right, left ^ word
        return (left << half_bits) | right

    result = scramble(index)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = again = scramble(result[outside])
        outside = outside[again >= size]
    return result


def _round(half: Int64Array, number: int, key: tuple[int, int]) -> Int64Array:
    """The round function of the network: one word for every half of an index."""
    return philox4x32((half & WORD, half >> 32, number, 0), key)[0]


@lru_cache(maxsize=32)
def _round_tables(half_bits: int, key: tuple[int, int]) -> list[Int64Array]:
    """All values of the round functions; a window asks for each of them many times."""
    halves = np.arange(1 << half_bits, dtype=np.int64)
    mask = (1 << half_bits) - 1
    return [_round(halves, number, key) & mask for number in range(_FEISTEL_ROUNDS)]


@dataclass(frozen=True)
class SampleOrder:
    """The order of the sequences in every epoch, as a function of position."""

    num_samples: int
    seed: int
    sequence_length: int
    block_sequences: int
    window_blocks: int
    stream: str = ""
    """Sets the orders of a mixture's sources apart."""

    def samples(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Look up positions of the endless order.

        Args:
            positions: int64 [n], positions counted over all epochs.

        Returns:
            (epochs, samples), int64 [n] each; every epoch holds every sample exactly once.
        """
        epochs = positions // self.num_samples
        within = positions - epochs * self.num_samples
        samples = np.empty_like(positions)
        windows = np.minimum(within // self._window_sequences, self._num_windows - 1)
        parts = epochs * self._num_windows + windows
        for part in _distinct(parts):
            here = np.flatnonzero(parts == part)
            samples[here] = self._in_window(within[here], *divmod(part, self._num_windows))
        return epochs, samples

    @property
    def _num_full_blocks(self) -> int:
        return self.num_samples // self.block_sequences

    @property
    def _window_sequences(self) -> int:
        return self.window_blocks * self.block_sequences

    @property
    def _num_windows(self) -> int:
        return max(1, self._num_full_blocks // self.window_blocks)

    def _in_window(self, within: Int64Array, epoch: int, window: int) -> Int64Array:
        """Resolve positions that fall into one window of one epoch."""
        blocks = self._num_full_blocks
        first_block = window * self.window_blocks
        is_last = window == self._num_windows - 1
        num_blocks = blocks - first_block if is_last else self.window_blocks
        # The samples behind the last full block join the last window of the epoch.
        tail = self.num_samples - blocks * self.block_sequences if is_last else 0
        size = num_blocks * self.block_sequences + tail
        key = self._key("order/window", epoch, window)
        shuffled = permute(within - first_block * self.block_sequences, size, key)
        slots = shuffled // self.block_sequences
        key = self._key("order/blocks", epoch)
        if len(slots) > num_blocks:
            every_slot = np.arange(first_block, first_block + num_blocks)
            # What lies behind the last full block stays there, as if that were one more.
            chosen = np.append(permute(every_slot, blocks, key), blocks).take(slots, mode="clip")
        else:
            chosen = np.full_like(slots, blocks)
            in_block = slots < num_blocks
            chosen[in_block] = permute(first_block + slots[in_block], blocks, key)
        places = np.minimum(slots, num_blocks)
        return shuffled + (chosen - places) * self.block_sequences

    def _key(self, purpose: str, *parts: int) -> tuple[int, int]:
        purpose = f"{purpose}/{self.stream}" if self.stream else purpose
        return stream_key(self.seed, purpose, self.sequence_length, *parts)


def _distinct(values: Int64Array) -> list[int]:
    """The values that occur, ascending; mostly there is one."""
    first = int(values[0]) if len(values) else 0
    return [first] if (values == first).all() and len(values) else np.unique(values).tolist()


@dataclass(frozen=True)
class SkippedWindow:
    """Neighbouring positions of one sequence length's endless order that are never trained on."""

    sequence_length: int
    """Tokens in a sequence."""
    first_position: int
    end_position: int
    """Position before which it ends."""


@dataclass(frozen=True)
class SkipList:
    """Which positions of the endless orders are left out, and so where each trained sample lies.

    Training takes the positions that no window holds, in order. A window that is added where
    training stands moves nothing that has been trained on. Example with the window [3, 5): the
    trained samples 0 1 2 3 4 lie at the positions 0 1 2 5 6.
    """

    windows: tuple[SkippedWindow, ...] = ()
    """In the order in which they were added; they may touch, overlap or hold one another."""

    def positions(self, sequence_length: int, counts: Int64Array) -> Int64Array:
        """Find where trained samples lie.

        Args:
            sequence_length: Tokens in their sequences.
            counts: int64 [n]: how many samples of that length are trained on before each.

        Returns:
            int64 [n], positions of the endless order, which no window holds.
        """
        firsts, ends = self._merged(sequence_length)
        if not len(firsts):
            return counts
        skipped = np.concatenate([[0], np.cumsum(ends - firsts)])
        # The window after which a sample lies begins with that many trained samples before it.
        windows_before = np.searchsorted(firsts - skipped[:-1], counts, side="right")
        return counts + skipped[windows_before]

    def window_of(self, sequence_length: int, first: int, end: int) -> SkippedWindow | None:
        """Give the positions over which trained samples are spread, to be left out.

        Args:
            sequence_length: Tokens in their sequences.
            first: How many samples of that length are trained on before the first of them.
            end: The same for the first sample behind them.

        Returns:
            The window; it holds what was left out between them. None where they are none.
        """
        if first >= end:
            return None
        ends = self.positions(sequence_length, np.array([first, end - 1], np.int64))
        return SkippedWindow(sequence_length, int(ends[0]), int(ends[1]) + 1)

    def _merged(self, sequence_length: int) -> tuple[Int64Array, Int64Array]:
        """Sort one length's windows and join those that touch: where each begins and ends."""
        merged: list[list[int]] = []
        for first, end in sorted(
            (window.first_position, window.end_position)
            for window in self.windows
            if window.sequence_length == sequence_length
        ):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        array = np.array(merged, np.int64).reshape(-1, 2)
        return array[:, 0], array[:, 1]


NOTHING_SKIPPED = SkipList()
