"""Flat .npy files with a constant header: streamed out, hashed in blocks, looked at cheaply.

npy_header    the 128 bytes in front of the values
NpyStream     appends to a `.partial`, then patches the header, hashes, syncs and renames
check_npy     size and header against the manifest; the values are not read
"""

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES

HEADER_BYTES = 128
CURE = "Restore it from a copy, or delete the folder and build the dataset again"


def npy_header(dtype: np.dtype, count: int) -> bytes:
    """The .npy header (version 1.0) of a flat array, always 128 bytes.

    Spelled out here, because NumPy may pad differently from release to release, while equal input
    must give equal files; and because a constant size lets a stream patch it at its end.

    Args:
        dtype: little-endian type of the values.
        count: number of values.

    Returns:
        128 bytes that every reader of .npy files understands.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    body = text.encode("ascii").ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


class NpyStream:
    """A flat .npy file of a length not yet known, written front to back.

    Args:
        path: the finished file; until then it is a `.partial` beside it.
        dtype: little-endian type of the values.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        # The process id keeps a leftover worker of a killed build off our file.
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._dtype = dtype
        self._file: BinaryIO = self._partial.open("w+b", buffering=2**20)
        self._file.write(npy_header(dtype, 0))
        self.count = 0

    def append(self, values: NDArray[np.integer] | list[int]) -> None:
        """Append values, converted to the type of the file."""
        array = np.asarray(values, self._dtype)
        self._file.write(array.data)
        self.count += array.size

    def finish(self) -> tuple[str, tuple[str, ...]]:
        """Patch the header, hash what the file system holds, put it on disk and rename it.

        Returns:
            sha256 of the whole file, and of each 4 MiB block of it.
        """
        self._file.seek(0)
        self._file.write(npy_header(self._dtype, self.count))
        self._file.flush()
        hashes = hash_blocks(self._file)
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        return hashes

    def abort(self) -> None:
        """Close the file and remove the partial; nothing happens after `finish`."""
        # On a full disk closing fails too, because it writes what is buffered.
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)


def hash_blocks(file: BinaryIO) -> tuple[str, tuple[str, ...]]:
    """Hash a file from its beginning.

    Args:
        file: a binary file that can seek.

    Returns:
        sha256 of the whole file, and of each 4 MiB block of it.
    """
    file.seek(0)
    whole, blocks = hashlib.sha256(), []
    while block := file.read(BLOCK_BYTES):
        whole.update(block)
        blocks.append(hashlib.sha256(block).hexdigest())
    return whole.hexdigest(), tuple(blocks)


def check_npy(path: Path, dtype: np.dtype, count: int) -> None:
    """Compare size and header of a flat .npy file with what they must be.

    Args:
        path: the file.
        dtype: type of its values.
        count: number of its values.

    Raises:
        CorruptError: naming the file and what differs.
    """
    check_size(path, HEADER_BYTES + count * dtype.itemsize)
    try:
        with path.open("rb", buffering=0) as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror}). {CURE}") from error
    if header != npy_header(dtype, count):
        raise CorruptError(f"{path}: its header is not that of {count} {dtype.name}. {CURE}")


def check_size(path: Path, num_bytes: int) -> None:
    """Compare the size of a file with what it must be, without opening it.

    Args:
        path: the file.
        num_bytes: the size in the manifest.

    Raises:
        CorruptError: the file is missing, is no ordinary file or has another size.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror}). {CURE}") from error
    if not stat.S_ISREG(found.st_mode):
        # A named pipe has a size too, 0, and is waited for as long as nobody writes to it.
        raise CorruptError(f"{path}: not an ordinary file. {CURE}")
    if found.st_size != num_bytes:
        raise CorruptError(
            f"{path}: {found.st_size} bytes, but the manifest says {num_bytes}. {CURE}"
        )


def read_whole(path: Path) -> bytes:
    """The content of a file that the manifest promises.

    Raises:
        CorruptError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read ({error.strerror}). {CURE}") from error
