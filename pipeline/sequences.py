"""A split's tokens as sequences: cut, read by the batch, moved to the device.

    SequenceBatch    a micro batch: ids, lengths, identities of samples
    SequenceStream   the sequences of a split; reads many of them at once

A sequence is [CLS] + (L - 2) tokens + [SEP], cut from the concatenated documents of the split
without regard to their ends (the published packing). The last is short and padded.

The host holds ids (int32), lengths and identities, nothing else: positions, masks and labels are
made on the device.

Letters: B sequences, L sequence length.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from data_prep.errors import CorruptError
from data_prep.manifest import Split
from data_prep.shards import Dataset
from pipeline.counter_rng import sample_words
from pipeline.mixture import source_runs
from pipeline.sample_order import Int64Array

PAD_ID, CLS_ID, SEP_ID, UNK_ID = 0, 1, 2, 3
_BYTES_AT_ONCE = 512 << 10  # copied together: a core's own cache holds them


@dataclass(frozen=True)
class SequenceBatch:
    """A micro batch on the host or on a device."""

    input_ids_BL: torch.Tensor
    """int64 [B, L], padded with 0; int32 in a batch of training until `to` has moved it."""
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

    def pinned(self) -> "SequenceBatch":
        """Copy to memory that a GPU can fetch from by itself, which torch uses again and again.

        Returns:
            The batch there.
        """
        return SequenceBatch(
            self.input_ids_BL.pin_memory(),
            self.lengths_B.pin_memory(),
            self.sample_words_B2.pin_memory(),
            self.is_full,
        )

    def to(self, device: torch.device) -> "SequenceBatch":
        """Copy to a device without waiting for the copy.

        Args:
            device: Where to.

        Returns:
            The batch there, its ids as int64.
        """
        # Of what is pinned already there is no second copy.
        source = self.pinned() if device.type == "cuda" else self
        tensors = (source.input_ids_BL, source.lengths_B, source.sample_words_B2)
        ids_BL, lengths_B, words_B2 = (t.to(device, non_blocking=True) for t in tensors)
        # In two steps: a copy that also converts would do so on the host.
        return SequenceBatch(ids_BL.long(), lengths_B, words_B2, self.is_full)


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

    def source_runs(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Tell which sequences belong to which source.

        Returns:
            As `mixture.source_runs`.
        """
        shards = [reader.info for reader in self._dataset.readers(self._split)]
        return source_runs(shards, self._content)

    def source_weights(self) -> dict[str, float]:
        """Look up what the dataset's recipe says of its sources.

        Returns:
            Source -> weight, for those whose weight is not 1.
        """
        sources = self._dataset.manifest.sources
        return {source.name: source.weight for source in sources if source.weight != 1.0}

    def source_tokens(self) -> dict[str, int]:
        """Count the tokens of each source.

        Returns:
            Source, in the order of its first shard -> tokens of the split.
        """
        tokens: Counter[str] = Counter()
        for reader in self._dataset.readers(self._split):
            tokens[reader.info.source] += reader.info.num_tokens
        return dict(tokens)

    def batch(self, samples: Int64Array, epochs: Int64Array) -> SequenceBatch:
        """Read sequences.

        Args:
            samples: int64 [B], indices of sequences.
            epochs: int64 [B], the epoch each is read in.

        Returns:
            The batch, on the host, its ids as int64.

        Raises:
            CorruptError: A block of a shard, hashed at its first use, is not what was written; the
                message names the sample and its tokens.
        """
        if not len(samples):
            nothing = torch.empty(0, dtype=torch.int64)
            ids_BL, words_B2 = nothing.view(0, self.sequence_length), nothing.view(0, 2)
            return SequenceBatch(ids_BL, nothing, words_B2, is_full=True)
        (batch,) = self.micro_batches(samples, epochs, len(samples))
        return batch.to(torch.device("cpu"))

    def micro_batches(
        self, samples: Int64Array, epochs: Int64Array, size: int
    ) -> list[SequenceBatch]:
        """Read the sequences of several batches at once.

        Args:
            samples: int64 [n], indices of sequences.
            epochs: int64 [n], the epoch each is read in.
            size: Sequences of a batch, by which n is divisible.

        Returns:
            The batches, on the host, their ids as int32.

        Raises:
            CorruptError: As for `batch`.
        """
        starts = samples * self._content
        lengths = np.minimum(self.num_tokens - starts, self._content) + 2
        is_short = lengths < self.sequence_length
        try:
            parts = self._read(samples, is_short, self._rows_at_once(size))
        except Exception:
            for sample in samples.tolist():  # one at a time, until one of them says whose it is
                self._tokens(sample)
            raise
        short_rows = np.flatnonzero(is_short)
        with_padding = set((short_rows // size).tolist()) if len(short_rows) else set()
        each = zip(
            [ids for part in parts for ids in _split(part.view(np.int32), size)],
            _split(lengths, size),
            _split(_identities(epochs, samples), size),
            strict=True,
        )
        return [SequenceBatch(*tensors, n not in with_padding) for n, tensors in enumerate(each)]

    def _rows_at_once(self, size: int) -> int:
        """Rows of whole batches that are copied together."""
        return max(1, _BYTES_AT_ONCE // (4 * self.sequence_length * size)) * size

    def announce(self, samples: Int64Array) -> bool:
        """Have threads read and hash the blocks that `micro_batches` will soon need.

        Args:
            samples: int64 [n], indices of sequences.

        Returns:
            False where too many blocks are on their way; to be announced again later.
        """
        starts = samples * self._content
        whole = starts[starts + self._content <= self.num_tokens]
        return self._dataset.announce_rows(self._split, whole, self._content)

    def stop_announced(self) -> None:
        """Read nothing ahead any more, and wait for the threads that do."""
        self._dataset.stop_announced()

    def _read(
        self, samples: Int64Array, is_short: npt.NDArray[np.bool_], rows_at_once: int
    ) -> list[npt.NDArray[np.uint32]]:
        """Read rows with [CLS] and [SEP], some at a time."""
        edges = (CLS_ID, SEP_ID)
        if not is_short.any():
            starts = samples * self._content
            return self._dataset.read_rows(self._split, starts, self._content, edges, rows_at_once)
        # The sequence that ends the split is padded.
        whole = np.flatnonzero(~is_short)
        ids = np.full((len(samples), self.sequence_length), PAD_ID, np.uint32)
        if len(whole):
            starts = samples[whole] * self._content
            (ids[whole],) = self._dataset.read_rows(
                self._split, starts, self._content, edges, len(whole)
            )
        for row in np.flatnonzero(is_short).tolist():
            tokens = self._tokens(int(samples[row]))
            ids[row, : 2 + len(tokens)] = [CLS_ID, *tokens, SEP_ID]
        return [ids[n : n + rows_at_once] for n in range(0, len(ids), rows_at_once)]

    def token_range(self, sample: int) -> tuple[int, int]:
        """Give the tokens of a sequence, counted over the split.

        Args:
            sample: Index of the sequence.

        Returns:
            (first token, token before which it ends), without [CLS] and [SEP].
        """
        start = sample * self._content
        return start, min(start + self._content, self.num_tokens)

    def _tokens(self, sample: int) -> npt.NDArray[np.uint32]:
        """Read one sequence's tokens; an error says whose they are."""
        start, end = self.token_range(sample)
        try:
            return self._dataset.read(self._split, start, end)
        except CorruptError as error:
            raise CorruptError(f"{error} ({self._whose(sample)})") from error
        except Exception as error:
            error.add_note(f"while reading {self._whose(sample)}")
            raise

    def _whose(self, sample: int) -> str:
        start, end = self.token_range(sample)
        return f"{self._split} sample {sample}, tokens {start:,} to {end - 1:,} of the split"


def _identities(epochs: Int64Array, samples: Int64Array) -> Int64Array:
    """Pack the identities of samples into counter words, int64 [n, 2]."""
    # The arithmetic of one sample is that of arrays of them.
    return np.stack(sample_words(cast(Any, epochs), cast(Any, samples)), axis=1)


def _split(rows: npt.NDArray[Any], size: int) -> tuple[torch.Tensor, ...]:
    """Rows as tensors of some each, which share their memory."""
    return torch.from_numpy(rows).view(-1, size, *rows.shape[1:]).unbind()
