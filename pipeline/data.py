"""From a split's token stream to batches: every batch is a function of the step.

    1. A sequence is [CLS] + (L - 2) tokens + [SEP], cut from the concatenated documents of the
       split without regard to their ends (the published packing). The last is short and padded.
    2. `SampleOrder` permutes the sequences of an epoch in O(1) memory: blocks of neighbours are
       permuted, then the samples within a window of blocks, so that a cold disk reads runs.
    3. `TrainBatches.at_step(s)` cuts [s * batch, (s + 1) * batch) of the endless order into micro
       batches by rank; another world size cuts the same samples.
    4. `Prefetcher` asks for the next steps in a thread. Resuming is asking for another step.

Example with 10 sequences, blocks of 2 and windows of 2 blocks: blocks in order (3 0 4 1 2), windows
(3 0) and (4 1 2); position 5 of the epoch is some sample of blocks 4, 1, 2.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from data_prep.manifest import Split
from data_prep.shards import Dataset
from pipeline.counter_rng import WORD, philox4x32, sample_words, stream_key

PAD_ID, CLS_ID, SEP_ID, UNK_ID = 0, 1, 2, 3
_FEISTEL_ROUNDS = 6

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SequenceBatch:
    """A micro batch on the host or on a device."""

    input_ids_BL: torch.Tensor
    """int64 [B, L], padded with 0."""
    lengths_B: torch.Tensor
    """int64 [B]: tokens of each sequence, [CLS] and [SEP] included."""
    sample_words_B2: torch.Tensor
    """int64 [B, 2]: (epoch, sample) as counter words."""
    is_full: bool
    """No sequence is padded, so that attention needs no mask."""

    def attention_mask(self) -> torch.Tensor | None:
        """Mark the real tokens.

        Returns:
            bool [B, L], or None where every token is real.
        """
        if self.is_full:
            return None
        positions_L = torch.arange(self.input_ids_BL.shape[1], device=self.lengths_B.device)
        return positions_L[None, :] < self.lengths_B[:, None]

    def to(self, device: torch.device) -> "SequenceBatch":
        """Copy to a device without waiting for the copy.

        Args:
            device: Where to.

        Returns:
            The batch there.
        """
        if device.type == "cpu":
            return self
        tensors = (self.input_ids_BL, self.lengths_B, self.sample_words_B2)
        moved = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        return SequenceBatch(moved[0], moved[1], moved[2], self.is_full)


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


class SequenceStream:
    """The sequences of one split of a dataset."""

    def __init__(self, dataset: Dataset, split: Split, sequence_length: int) -> None:
        """Look at a split without reading it.

        Args:
            dataset: An open dataset.
            split: "train" or "heldout".
            sequence_length: L, with [CLS] and [SEP].
        """
        self._dataset = dataset
        self._split: Split = split
        self._content = sequence_length - 2
        self.sequence_length = sequence_length
        self.num_tokens = dataset.split_tokens(split)
        self.num_sequences = -(-self.num_tokens // self._content)

    def batch(self, samples: Int64Array, epochs: Int64Array) -> SequenceBatch:
        """Read sequences.

        Args:
            samples: int64 [B], indices of sequences.
            epochs: int64 [B], the epoch each is read in.

        Returns:
            The batch, on the host.

        Raises:
            CorruptError: A block of a shard, hashed at its first use, is not what was written.
        """
        ids_BL = np.full((len(samples), self.sequence_length), PAD_ID, np.int64)
        lengths_B = np.empty(len(samples), np.int64)
        for row, sample in enumerate(samples.tolist()):
            start = sample * self._content
            tokens = self._dataset.read(
                self._split, start, min(start + self._content, self.num_tokens)
            )
            ids_BL[row, 0] = CLS_ID
            ids_BL[row, 1 : 1 + len(tokens)] = tokens
            ids_BL[row, 1 + len(tokens)] = SEP_ID
            lengths_B[row] = len(tokens) + 2
        words = [sample_words(e, s) for e, s in zip(epochs.tolist(), samples.tolist(), strict=True)]
        return SequenceBatch(
            torch.from_numpy(ids_BL),
            torch.from_numpy(lengths_B),
            torch.tensor(words, dtype=torch.int64),
            is_full=bool((lengths_B == self.sequence_length).all()),
        )


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of one rank, as a function of the step."""

    stream: SequenceStream
    order: SampleOrder
    train_batch_size: int
    micro_batch_size: int
    world_size: int
    rank: int

    def first_sample(self, step: int) -> int:
        """Give the position in the endless order at which a step begins.

        Args:
            step: Completed optimizer steps.

        Returns:
            The position of the step's first sample.
        """
        return step * self.train_batch_size

    def epochs_at(self, step: int) -> float:
        """Give the passes over the data after so many steps.

        Args:
            step: Completed optimizer steps.

        Returns:
            Epochs, with fraction.
        """
        return self.first_sample(step) / self.stream.num_sequences

    def at_step(self, step: int) -> list[SequenceBatch]:
        """Read this rank's micro batches of one optimizer step.

        Args:
            step: Completed optimizer steps before this one.

        Returns:
            One batch a micro step. Over all ranks and micro steps they hold the positions
            [first_sample(step), first_sample(step + 1)) once each.
        """
        per_micro_step = self.micro_batch_size * self.world_size
        first = self.first_sample(step) + self.rank * self.micro_batch_size
        starts = np.arange(first, first + self.train_batch_size, per_micro_step, dtype=np.int64)
        # One call for the whole step: the order's cost is that of calls, not of samples.
        positions = (starts[:, None] + np.arange(self.micro_batch_size, dtype=np.int64)).ravel()
        epochs, samples = self.order.samples(positions)
        return [
            self.stream.batch(of_micro_step, in_epochs)
            for of_micro_step, in_epochs in zip(
                np.split(samples, len(starts)), np.split(epochs, len(starts)), strict=True
            )
        ]


def heldout_batches(
    stream: SequenceStream, max_sequences: int, batch_size: int, world_size: int, rank: int
) -> Iterator[tuple[SequenceBatch, bool]]:
    """Read this rank's share of the first held-out sequences, the same ones every time.

    Every rank gets as many batches as the others, because a forward pass of a sharded model is a
    collective; one that has run out repeats the first sequence, marked as not real.

    Args:
        stream: The held-out split.
        max_sequences: How many sequences all ranks read together.
        batch_size: Sequences in one batch; the last one may be smaller.
        world_size: Number of ranks.
        rank: This rank.

    Yields:
        (batch, whether it counts).
    """
    count = min(max_sequences, stream.num_sequences)
    for round_start in range(0, count, world_size * batch_size):
        start = round_start + rank * batch_size
        is_real = start < count
        samples = np.arange(start, min(start + batch_size, count)) if is_real else np.zeros(1)
        samples = samples.astype(np.int64)
        yield stream.batch(samples, np.zeros_like(samples)), is_real


class Prefetcher:
    """Reads the batches of the next steps in a thread while the device computes."""

    def __init__(self, batches: TrainBatches, first_step: int, last_step: int, depth: int = 4):
        """Start reading.

        Args:
            batches: What to read.
            first_step: First step to read.
            last_step: Step before which to stop.
            depth: Steps to read ahead.
        """
        self._queue: queue.Queue[list[SequenceBatch] | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(batches, first_step, last_step), name="prefetch", daemon=True
        )
        self._thread.start()

    def _read(self, batches: TrainBatches, first_step: int, last_step: int) -> None:
        item: list[SequenceBatch] | Exception
        for step in range(first_step, last_step):
            try:
                item = batches.at_step(step)
            except Exception as error:  # carried to the training thread, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, Exception):
                return

    def next(self) -> list[SequenceBatch]:
        """Wait for the next step's micro batches.

        Returns:
            One batch a micro step, in step order.

        Raises:
            CorruptError: The data that was read is not what was written.
        """
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join()
