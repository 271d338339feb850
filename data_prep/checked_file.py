"""A file of tokens none of whose bytes is handed out before it was compared.

CheckedFile   reads into memory of the caller, and compares what lies there: a block (4 MiB) with
              the manifest's sha256 the first time, a page (32 KiB) with the XXH3 that it had in the
              hashed block every later time
OpenFiles     a bounded number of descriptors, since a terabyte has more shards than a process may
              open

What is compared is the copy that the caller keeps, never the file behind it: there is no moment
between hashing and use at which the bytes can become others. Why sums of pages: a run reads an
epoch for days, while the operating system drops its pages and fetches them anew from the disk. What
was right at its first use may be wrong at its second. XXH3 misses an error once in 2^64 times,
costs a thirtieth of sha256 and a terabyte 256 MiB of memory, and serves a reader that wants a page
without the rest of its block. Nobody's malice is behind such errors: what somebody writes changes
the file's time, and the manifest's sha256 is asked again.

A file that was written to since (another inode, size or time of change) counts as never checked.
`data_prep.block_cache` keeps what was checked and holds the lock under which all this happens, but
for the reading and hashing of blocks, which several threads do at once.
"""

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES
from data_prep.npy_files import CURE

PAGE_BYTES = 32 << 10
PAGES_PER_BLOCK = BLOCK_BYTES // PAGE_BYTES
_NO_BYTES = np.uint64(xxhash.xxh3_64_intdigest(b""))
_RUN_BYTES = 8 * PAGE_BYTES  # read, and compared while a core's own cache holds them
_MAX_OPEN_FILES = 128  # of the 1,024 that a process usually may have


class OpenFiles:
    """Reads from many files and keeps the last ones open; safe to share between threads.

    Args:
        limit: descriptors that are kept open.
    """

    def __init__(self, limit: int = _MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, _Descriptor] = OrderedDict()

    def read_into(self, path: str, offset: int, into: memoryview) -> int:
        """Read from a file, opening it if need be.

        Args:
            path: the file.
            offset: first byte.
            into: bytes [wanted], contiguous.

        Returns:
            How many bytes were read; fewer than wanted at the end of the file.

        Raises:
            OSError: the file cannot be opened or read.
        """
        with self._lock:
            descriptor = self._open(path)
        done = os.preadv(descriptor.number, [into], offset)
        while 0 < done < len(into):
            count = os.preadv(descriptor.number, [into[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def announce(self, path: str, offset: int, count: int) -> None:
        """Let the operating system fetch what will be read soon, without waiting for it.

        Args:
            path: the file, opened if need be.
            offset: first byte.
            count: bytes.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            descriptor = self._open(path)
        # Asking for what is there already costs twenty times as much as looking at both its ends.
        if not (_is_there(descriptor, offset) and _is_there(descriptor, offset + count - 1)):
            os.posix_fadvise(descriptor.number, offset, count, os.POSIX_FADV_WILLNEED)

    def version(self, path: str) -> tuple[int, int, int, int]:
        """Tell a file from what it was before somebody wrote to it, or put another in its place.

        Args:
            path: the file, opened if need be.

        Returns:
            Device, inode, bytes and the time of the last change in nanoseconds.

        Raises:
            OSError: the file cannot be opened.
        """
        with self._lock:
            found = os.fstat(self._open(path).number)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _open(self, path: str) -> "_Descriptor":
        if path not in self._descriptors:
            descriptor = _Descriptor(path)
            if len(self._descriptors) >= self._limit:
                self._descriptors.popitem(last=False)
            self._descriptors[path] = descriptor
        self._descriptors.move_to_end(path)
        return self._descriptors[path]


class _Descriptor:
    """An open file, closed with the last reference: its number is not reused while it is read."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


def _is_there(descriptor: _Descriptor, offset: int) -> bool:
    """Whether a byte can be read without waiting for a disk; no where nobody can tell."""
    try:
        return os.preadv(descriptor.number, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it is not, or the file system has no such question
        return False


class CheckedFile:
    """Compares the bytes of one token file; its caller sees to it that one thread does so at once.

    Args:
        path: the file.
        block_sha256s: sha256 of each 4 MiB block, from the manifest.
        files: where open files are kept.
    """

    def __init__(self, path: Path, block_sha256s: Sequence[str], files: OpenFiles) -> None:
        self._path = str(path)
        self._block_sha256s = block_sha256s
        self._files = files
        self._version: tuple[int, int, int, int] | None = None
        self._is_checked = bytearray(len(block_sha256s))
        self._page_sums: NDArray[np.uint64] | None = None

    @property
    def num_blocks(self) -> int:
        """4 MiB blocks of the file, the last one shorter."""
        return len(self._block_sha256s)

    def has_changed(self) -> bool:
        """Look whether somebody wrote to the file since the last look.

        Returns:
            True if so; no block of it counts as checked any more. What the first look finds is no
            change.

        Raises:
            CorruptError: the file cannot be opened.
        """
        try:
            version = self._files.version(self._path)
        except OSError as error:
            raise self._unreadable(error) from error
        if version == self._version:
            return False
        is_first, self._version = self._version is None, version
        self._is_checked = bytearray(self.num_blocks)
        return not is_first

    def is_checked(self, block: int) -> bool:
        """Whether a block had the manifest's sha256, so that its pages may be read alone."""
        return bool(self._is_checked[block])

    def announce(self, first_page: int, end_page: int) -> None:
        """Say which pages will be read soon; of an unchecked block that is the whole block.

        Args:
            first_page: counted from the beginning of the file.
            end_page: one past the last page, in the same block.

        Raises:
            CorruptError: the file cannot be opened.
        """
        block = first_page // PAGES_PER_BLOCK
        if not self._is_checked[block]:
            first_page, end_page = block * PAGES_PER_BLOCK, (block + 1) * PAGES_PER_BLOCK
        try:
            count = (end_page - first_page) * PAGE_BYTES
            self._files.announce(self._path, first_page * PAGE_BYTES, count)
        except OSError as error:
            raise self._unreadable(error) from error

    def read_block(self, block: int, into: memoryview) -> NDArray[np.uint64]:
        """Read a block and compare it with the manifest; several threads may do so at once.

        Args:
            block: which one.
            into: bytes [4 MiB]; what it holds after an error must not be used.

        Returns:
            Sums of its pages for `accept`, uint64 [at most 128].

        Raises:
            CorruptError: naming the file and the block.
        """
        content = into[: self._read(block * BLOCK_BYTES, into)]
        if hashlib.sha256(content).hexdigest() != self._block_sha256s[block]:
            raise CorruptError(
                f"{self._path}: block {block} (bytes from {block * BLOCK_BYTES}) does not have the "
                f"sha256 of the manifest. {CURE}"
            )
        return np.array(_page_sums(content, len(content)), np.uint64)

    def accept(self, block: int, sums: NDArray[np.uint64]) -> None:
        """Count a block as checked from here on.

        Args:
            block: which one.
            sums: what `read_block` returned for it.
        """
        if self._page_sums is None:
            # Zeros cost no memory before something is written to them.
            self._page_sums = np.zeros(self.num_blocks * PAGES_PER_BLOCK, np.uint64)
        first = block * PAGES_PER_BLOCK
        self._page_sums[first : first + PAGES_PER_BLOCK] = _NO_BYTES
        self._page_sums[first : first + len(sums)] = sums
        self._is_checked[block] = 1

    def read_pages(self, first_page: int, into: memoryview) -> None:
        """Read pages of one checked block and compare them with what they were in it.

        Args:
            first_page: counted from the beginning of the file.
            into: bytes [pages x 32 KiB]; what it holds after an error must not be used.

        Raises:
            CorruptError: naming the file and the bytes.
        """
        block = first_page // PAGES_PER_BLOCK
        assert self._page_sums is not None, "no block has been checked"
        assert self._is_checked[block], "its pages cannot be compared with anything"
        for start in range(0, len(into), _RUN_BYTES):
            run, first = into[start : start + _RUN_BYTES], first_page + start // PAGE_BYTES
            # Of a file that ends early there are pages without a byte: they too are compared.
            content = run[: self._read(first * PAGE_BYTES, run)]
            expected = self._page_sums[first : first + len(run) // PAGE_BYTES].tolist()
            found = _page_sums(content, len(run))
            if found != expected:
                page = first + [a == b for a, b in zip(found, expected, strict=True)].index(False)
                raise CorruptError(
                    f"{self._path}: bytes from {page * PAGE_BYTES} (block {block}) are not what "
                    f"they were when they were first read. {CURE}"
                )

    def _read(self, offset: int, into: memoryview) -> int:
        try:
            return self._files.read_into(self._path, offset, into)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CorruptError:
        return CorruptError(f"{self._path}: cannot be read ({error.strerror}). {CURE}")


def _page_sums(content: memoryview, wanted: int) -> list[int]:
    """Sums of the pages in so many bytes, of which the last ones may be missing."""
    starts = range(0, wanted, PAGE_BYTES)
    return [xxhash.xxh3_64_intdigest(content[n : n + PAGE_BYTES]) for n in starts]
