"""Megatron's pair of files, PREFIX.bin and PREFIX.idx: written, and read document by document.

- `MegatronWriter`: appends documents; both files get their names when everything is on disk.
- `MegatronReader`: the documents of a pair, mapped into memory; a pair that cannot be is refused.

The layout is that of megatron-core 0.16 (`core/datasets/indexed_dataset.py`), all little endian.
The .bin is the tokens end to end. The .idx is 9 bytes of magic, a version (uint64, 1), a code of
the tokens' type (uint8), the number of sequences and of document ends (uint64 each), then the
length of each sequence in tokens (int32), its offset in bytes (int64), and the ends of the
documents, counted in sequences, with a 0 in front (int64). We write a sequence a document; others
may write more.
"""

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.manifest import sync_folder

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_SMALL_VOCABULARY = 65_500
"""Below it Megatron stores tokens in two bytes (`DType.optimal_dtype`)."""


class MegatronWriter:
    """A pair of files that grows by documents; use as a context manager.

    Args:
        prefix: the pair without its suffixes.
        vocab_size: ids are below it; it decides the type of the tokens.

    Raises:
        UserError: one of the two exists, or the folder cannot be written.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._bin, self._idx = prefix.with_name(f"{prefix.name}.bin"), _index_path(prefix)
        for path in (self._bin, self._idx):
            if path.exists():
                raise UserError(f"{path} exists; choose another prefix, or remove it")
        self._code = 8 if vocab_size < _SMALL_VOCABULARY else 4
        self._partials = [
            path.with_name(f"{path.name}.{os.getpid()}.partial") for path in (self._bin, self._idx)
        ]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partials[0].open("wb", buffering=1 << 20)
        self._lengths: list[NDArray[np.int32]] = []

    def append(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        """Write documents.

        Args:
            ids: their ids, end to end, uint32.
            lengths: tokens of each, int64; below 2^31.
        """
        self._file.write(ids.astype(_DTYPES[self._code]).tobytes())
        self._lengths.append(lengths.astype("<i4"))

    def finish(self) -> int:
        """Put both files on disk under their names.

        Returns:
            Their bytes.
        """
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        sizes = lengths.astype("<i8") * _DTYPES[self._code].itemsize
        with self._partials[1].open("wb") as index:
            count = len(lengths)
            index.write(_HEADER.pack(_MAGIC, _VERSION, self._code, count, count + 1))
            for array in (lengths, np.cumsum(sizes) - sizes, np.arange(count + 1, dtype="<i8")):
                index.write(array.tobytes())
            index.flush()
            os.fsync(index.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for partial, path in zip(self._partials, (self._bin, self._idx), strict=True):
            partial.replace(path)
        sync_folder(self._bin.parent)
        return self._bin.stat().st_size + self._idx.stat().st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for partial in self._partials:
            partial.unlink(missing_ok=True)


class MegatronReader:
    """The documents of a pair.

    Args:
        prefix: the pair without its suffixes.

    Raises:
        UserError: a file is missing, is no such file, or the two do not fit together.
    """

    def __init__(self, prefix: Path) -> None:
        self._path = prefix.with_name(f"{prefix.name}.bin")
        index_path = _index_path(prefix)
        try:
            index = index_path.read_bytes()
            self.num_bytes = self._path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}); name a pair of Megatron's "
                f"files by what stands before .bin and .idx"
            ) from error
        if len(index) < _HEADER.size or not index.startswith(_MAGIC):
            raise UserError(f"{index_path} is not an index of Megatron's (MMIDIDX); write it anew")
        _, version, code, sequences, ends = _HEADER.unpack_from(index)
        if version != _VERSION or code not in _DTYPES:
            raise UserError(
                f"{index_path} has version {version} and tokens of type {code}; read are version "
                f"{_VERSION} and whole numbers (types {', '.join(map(str, _DTYPES))})"
            )
        self.dtype = _DTYPES[code]
        # Multimodal data has a byte a sequence behind these; its tokens are no text.
        if len(index) != _HEADER.size + 12 * sequences + 8 * ends or not ends:
            raise UserError(
                f"{index_path} has {len(index)} bytes, its header promises "
                f"{_HEADER.size + 12 * sequences + 8 * ends}; it was cut off, or is not text alone"
            )
        offset = _HEADER.size
        self._lengths = np.frombuffer(index, "<i4", sequences, offset)
        pointers = np.frombuffer(index, "<i8", sequences, offset + 4 * sequences)
        self._ends = np.frombuffer(index, "<i8", ends, offset + 12 * sequences)
        starts = np.cumsum(self._lengths, dtype=np.int64) - self._lengths
        self.num_tokens = int(self._lengths.sum(dtype=np.int64))
        are_in_order = np.array_equal(pointers, starts * self.dtype.itemsize)
        if not are_in_order or self.num_tokens * self.dtype.itemsize != self.num_bytes:
            raise UserError(
                f"{index_path} does not fit {self._path.name} ({self.num_bytes} bytes for "
                f"{self.num_tokens} tokens of {self.dtype.itemsize}); copy both again"
            )
        ordered = (np.diff(self._ends) >= 0).all() and self._ends[0] == 0
        if not ordered or self._ends[-1] != sequences:
            raise UserError(f"{index_path} has document ends in no order; write it anew")

    @property
    def num_documents(self) -> int:
        """Documents of the pair, empty ones included."""
        return len(self._ends) - 1

    def documents(self) -> Iterator[NDArray[np.integer]]:
        """Read the documents in order.

        Yields:
            The tokens of each, mapped: they are read when they are used.
        """
        token_ends = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        bounds = token_ends[self._ends].tolist()
        if not self.num_bytes:  # which cannot be mapped
            tokens: NDArray[np.integer] = np.empty(0, self.dtype)
        else:
            tokens = np.memmap(self._path, self.dtype, "r")
        for start, end in pairwise(bounds):
            yield tokens[start:end]


def _index_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.idx")
