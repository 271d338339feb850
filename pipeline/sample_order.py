"""The order of the samples in every epoch: an O(1)-memory permutation, a function of position.

Blocks of neighbours are permuted, then the samples within a window of blocks, so that a cold disk
reads runs. Example with 10 sequences, blocks of 2 and windows of 2 blocks: blocks in order
(3 0 4 1 2), windows (3 0) and (4 1 2); position 5 of the epoch is some sample of blocks 4, 1, 2.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.counter_rng import WORD, philox4x32, stream_key

Int64Array = npt.NDArray[np.int64]
_FEISTEL_ROUNDS = 6


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

    def scramble(values: Int64Array) -> Int64Array:
        left, right = values >> half_bits, values & mask
        for number in range(_FEISTEL_ROUNDS):
            word = philox4x32((right & WORD, right >> 32, number, 0), key)[0]
            left, right = right, left ^ (word & mask)
        return (left << half_bits) | right

    result = scramble(index)
    outside = result >= size
    while outside.any():
        result[outside] = scramble(result[outside])
        outside = result >= size
    return result


@dataclass(frozen=True)
class SampleOrder:
    """The order of the sequences in every epoch, as a function of position."""

    num_samples: int
    seed: int
    sequence_length: int
    block_sequences: int
    window_blocks: int

    def samples(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Look up positions of the endless order.

        Args:
            positions: int64 [n], positions counted over all epochs.

        Returns:
            (epochs, samples), int64 [n] each; every epoch holds every sample exactly once.
        """
        epochs, within = np.divmod(positions, self.num_samples)
        samples = np.empty_like(positions)
        windows = np.minimum(within // self._window_sequences, self._num_windows - 1)
        for epoch, window in np.unique(np.stack([epochs, windows], 1), axis=0).tolist():
            here = (epochs == epoch) & (windows == window)
            samples[here] = self._in_window(within[here], epoch, window)
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
        key = stream_key(self.seed, "order/window", self.sequence_length, epoch, window)
        shuffled = permute(within - first_block * self.block_sequences, size, key)
        slots, offsets = np.divmod(shuffled, self.block_sequences)
        samples = blocks * self.block_sequences + shuffled - num_blocks * self.block_sequences
        in_block = slots < num_blocks
        if in_block.any():
            key = stream_key(self.seed, "order/blocks", self.sequence_length, epoch)
            chosen = permute(first_block + slots[in_block], blocks, key)
            samples[in_block] = chosen * self.block_sequences + offsets[in_block]
        return samples
