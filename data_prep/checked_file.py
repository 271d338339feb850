"""A file of tokens whose bytes are compared every time that they are handed out.

CheckedFile   a block (4 MiB) must have the manifest's sha256 before its first byte is used; from
              then on every page (32 KiB) must have the CRC-32 that it had in the hashed block
OpenFiles     a bounded number of descriptors, since a terabyte has more shards than a process may
              open

Why again at every read: a run reads an epoch for days, while the operating system drops its pages
and fetches them anew from the disk. What was right at its first use may be wrong at its second, and
a memory map would serve it without a word. CRC-32 finds every single flipped bit and every error
burst of up to 32 bits; it costs a sequence a few microseconds and a terabyte 128 MiB of memory.
"""

import hashlib
import os
import threading
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES
from data_prep.npy_files import CURE

PAGE_BYTES = 32 << 10
_PAGES_PER_BLOCK = BLOCK_BYTES // PAGE_BYTES
_MAX_OPEN_FILES = 128  # of the 1,024 that a process usually may have


class OpenFiles:
    """Reads from many files and keeps the last ones open; safe to share between threads.

    Args:
        limit: descriptors that are kept open.
    """

    def __init__(self, limit: int = _MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._descriptors)

    def pread(self, path: str, count: int, offset: int) -> bytes:
        """Read from a file, opening it if need be.

        Args:
            path: the file.
            count: bytes wanted.
            offset: first byte.

        Returns:
            The bytes; fewer at the end of the file.

        Raises:
            OSError: the file cannot be opened or read.
        """
        # Under the lock to the end: a descriptor that another thread closes may be reused.
        with self._lock:
            if path not in self._descriptors:
                descriptor = os.open(path, os.O_RDONLY)
                if len(self._descriptors) >= self._limit:
                    os.close(self._descriptors.popitem(last=False)[1])
                self._descriptors[path] = descriptor
            self._descriptors.move_to_end(path)
            return os.pread(self._descriptors[path], count, offset)


class CheckedFile:
    """Bytes of one token file, none of them unchecked; safe to share between threads.

    Args:
        path: the file.
        block_sha256s: sha256 of each 4 MiB block, from the manifest.
        files: where open files are kept.
    """

    def __init__(self, path: Path, block_sha256s: Sequence[str], files: OpenFiles) -> None:
        self._path = str(path)
        self._block_sha256s = block_sha256s
        self._files = files
        self._lock = threading.Lock()
        self._is_checked = bytearray(len(block_sha256s))
        self._page_sums: NDArray[np.uint32] | None = None

    def read(self, start: int, end: int) -> memoryview:
        """Read bytes [start, end).

        Args:
            start: first byte, counted from the beginning of the file.
            end: one past the last byte, behind `start`.

        Returns:
            The bytes.

        Raises:
            CorruptError: naming the file and what is wrong in it.
        """
        first_block, last_block = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        if self._is_checked.count(1, first_block, last_block + 1) <= last_block - first_block:
            with self._lock:
                for block in range(first_block, last_block + 1):
                    if not self._is_checked[block]:
                        self._check_block(block)
        assert self._page_sums is not None
        first = start // PAGE_BYTES
        content = memoryview(self._pread((end - 1) // PAGE_BYTES + 1 - first, first))
        for page in range(first, (end - 1) // PAGE_BYTES + 1):
            begin = (page - first) * PAGE_BYTES
            if zlib.crc32(content[begin : begin + PAGE_BYTES]) != self._page_sums[page]:
                raise CorruptError(
                    f"{self._path}: bytes from {page * PAGE_BYTES} (block "
                    f"{page // _PAGES_PER_BLOCK}) are not what they were when they were first "
                    f"read. {CURE}"
                )
        return content[start - first * PAGE_BYTES : end - first * PAGE_BYTES]

    def _check_block(self, block: int) -> None:
        content = memoryview(self._pread(_PAGES_PER_BLOCK, block * _PAGES_PER_BLOCK))
        if hashlib.sha256(content).hexdigest() != self._block_sha256s[block]:
            raise CorruptError(
                f"{self._path}: block {block} (bytes from {block * BLOCK_BYTES}) does not have the "
                f"sha256 of the manifest. {CURE}"
            )
        if self._page_sums is None:
            # Zeros cost no memory before something is written to them.
            self._page_sums = np.zeros(len(self._is_checked) * _PAGES_PER_BLOCK, np.uint32)
        for page in range(-(-len(content) // PAGE_BYTES)):
            sum_ = zlib.crc32(content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
            self._page_sums[block * _PAGES_PER_BLOCK + page] = sum_
        self._is_checked[block] = 1

    def _pread(self, num_pages: int, first_page: int) -> bytes:
        try:
            return self._files.pread(self._path, num_pages * PAGE_BYTES, first_page * PAGE_BYTES)
        except OSError as error:
            raise CorruptError(
                f"{self._path}: cannot be read ({error.strerror}). {CURE}"
            ) from error


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
