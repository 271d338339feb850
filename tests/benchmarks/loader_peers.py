"""The same random sequences as everybody stores them, and how the peers read them.

write_dataset      our folder: shards, hashes, manifest; no text and no tokenizer behind it
write_indexed      Megatron's pair of files, PREFIX.bin and PREFIX.idx, a sequence a document
open_indexed       megatron-core's IndexedDataset; where that is not installed, `IndexedTokens`
write_arrow        a folder of Hugging Face `datasets`

Peers store whole sequences, [CLS] and [SEP] included, which we insert when reading: what they need
not do is left to their advantage.

Megatron's format (megatron-core 0.16, core/datasets/indexed_dataset.py): the .bin is the tokens end
to end. The .idx is 9 bytes of magic, a version (uint64, 1), a code of the type (uint8, 4 is int32),
the number of sequences and of document ends (uint64), and the arrays: length of each sequence
(int32), its offset in bytes (int64), the document ends (int64).
"""

import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shard_writer import ShardWriter
from data_prep.shards import Dataset
from pipeline.sequences import CLS_ID, SEP_ID
from tests.small_datasets import bare_manifest

LENGTH = 512
CONTENT = LENGTH - 2
VOCABULARY = 128_000
_MAGIC, _VERSION, _INT32 = b"MMIDIDX\x00\x00", 1, 4
_HEADER = struct.Struct("<9sQBQQ")
_SEQUENCES_AT_ONCE = 4096


def random_tokens(count: int, first: int) -> NDArray[np.uint32]:
    """Some whole sequences without their [CLS] and [SEP], the same whenever they are asked for.

    Args:
        count: How many sequences.
        first: The first one; a multiple of how many are made at once.

    Returns:
        uint32 [count, 510].
    """
    rng = np.random.default_rng(first)
    return rng.integers(4, VOCABULARY, (count, CONTENT), np.uint32)


def parts(num_sequences: int) -> list[NDArray[np.uint32]]:
    """All sequences in pieces, made one after the other."""
    starts = range(0, num_sequences, _SEQUENCES_AT_ONCE)
    return [random_tokens(min(_SEQUENCES_AT_ONCE, num_sequences - n), n) for n in starts]


def write_dataset(folder: Path, num_sequences: int, shards: int = 1) -> Dataset:
    """Write our format; every document is a sequence.

    Args:
        folder: The dataset folder, made here.
        num_sequences: How many.
        shards: Over how many shards.

    Returns:
        The dataset, open.
    """
    folder.mkdir()
    infos, pieces = [], np.array_split(np.arange(-(-num_sequences // _SEQUENCES_AT_ONCE)), shards)
    for number, piece in enumerate(pieces):
        with ShardWriter(folder, f"shard-{number:05d}", "random", "train") as writer:
            for first in (piece * _SEQUENCES_AT_ONCE).tolist():
                count = min(_SEQUENCES_AT_ONCE, num_sequences - first)
                ends = writer.num_tokens + CONTENT * np.arange(1, count + 1)
                writer.write(random_tokens(count, first).ravel())
                writer.end_documents(ends, 4 * CONTENT * count)
            infos.append(writer.finish())
    bare_manifest(infos, vocab_size=VOCABULARY).save(folder)
    return Dataset.open(folder)


def framed(tokens_BN: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Sequences as peers store them, int32 [B, 512]."""
    rows = np.empty((len(tokens_BN), LENGTH), np.int32)
    rows[:, 0], rows[:, 1:-1], rows[:, -1] = CLS_ID, tokens_BN, SEP_ID
    return rows


def write_indexed(prefix: Path, num_sequences: int) -> None:
    """Write Megatron's format.

    Args:
        prefix: Path of both files, without .bin and .idx.
        num_sequences: How many.
    """
    with Path(f"{prefix}.bin").open("wb") as file:
        for first in range(0, num_sequences, _SEQUENCES_AT_ONCE):
            count = min(_SEQUENCES_AT_ONCE, num_sequences - first)
            file.write(framed(random_tokens(count, first)).tobytes())
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, _INT32, num_sequences, num_sequences + 1))
        file.write(np.full(num_sequences, LENGTH, np.int32).tobytes())
        file.write((np.arange(num_sequences, dtype=np.int64) * LENGTH * 4).tobytes())
        file.write(np.arange(num_sequences + 1, dtype=np.int64).tobytes())


class IndexedTokens:
    """Reads Megatron's format as its IndexedDataset does: an index and a map, a view a sequence."""

    def __init__(self, prefix: str) -> None:
        index = np.memmap(f"{prefix}.idx", mode="r")
        magic, version, kind, sequences, _ = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if (magic, version, kind) != (_MAGIC, _VERSION, _INT32):
            raise ValueError(f"{prefix}.idx: not an index of int32 tokens")
        self._index = memoryview(index.data)
        self._lengths = np.frombuffer(self._index, np.int32, sequences, _HEADER.size)
        after = _HEADER.size + self._lengths.nbytes
        self._offsets = np.frombuffer(self._index, np.int64, sequences, after)
        self._content = memoryview(np.memmap(f"{prefix}.bin", mode="r").data)
        self._place = lru_cache(maxsize=8)(self._look_up)

    def _look_up(self, sequence: int) -> tuple[Any, Any]:
        return self._offsets[sequence], self._lengths[sequence]

    def get(self, sequence: int) -> NDArray[np.int32]:
        """A view of one sequence."""
        offset, length = self._place(sequence)
        return np.frombuffer(self._content, np.int32, length, offset)


def open_indexed(prefix: Path) -> tuple[Any, str]:
    """Open Megatron's format.

    Args:
        prefix: Path of both files, without .bin and .idx.

    Returns:
        (something with `get(sequence)`, what it is).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from importlib.metadata import version

            from megatron.core.datasets.indexed_dataset import (  # pyright: ignore[reportMissingImports]
                IndexedDataset,
            )
    except Exception as error:  # its imports reach for much that a loader does not need
        reason = f"{type(error).__name__}: {error}"[:100]
        return IndexedTokens(str(prefix)), f"re-derived, for megatron-core gives {reason}"
    return IndexedDataset(str(prefix)), f"megatron-core {version('megatron-core')}"


def write_arrow(folder: Path, num_sequences: int) -> Any:
    """Write and open a folder of `datasets`.

    Args:
        folder: Made here.
        num_sequences: How many.

    Returns:
        The dataset, without a format.
    """
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    rows = np.concatenate([framed(part) for part in parts(num_sequences)])
    offsets = np.arange(0, rows.size + 1, LENGTH, dtype=np.int32)
    column = pyarrow.ListArray.from_arrays(offsets, rows.ravel())
    datasets.Dataset(pyarrow.table({"input_ids": column})).save_to_disk(folder)
    return datasets.load_from_disk(folder)
