"""Blocks that will soon be read for the first time, hashed by a few threads meanwhile.

    begin     a thread reads a block and compares it with the manifest
    finish    it is waited for, and the block counts as checked from then on

Nothing of a block is kept but the sums of its pages: who needs its tokens reads those pages, which
the operating system has just fetched, and compares them (`data_prep.checked_file`). So a block that
was hashed ahead costs no memory of the process; the threads have 4 MiB each. What a thread found
wrong is found again, and raised, by whoever needs the block.

A thread changes nothing that others see. What it found is entered by whoever finishes it, under the
lock of `data_prep.block_cache`, so that nobody who waits for a thread waits for that lock.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from data_prep.checked_file import CheckedFile
from data_prep.manifest import BLOCK_BYTES

READING_THREADS = 8
"""More than processors, so that the disk always has something to read."""
BLOCKS_AHEAD = 96
"""That are begun and not yet needed: a window of the default order and half of the next, 384 MiB
that the operating system should be able to keep."""


class HashingAhead:
    """Hashes blocks of some files in threads; not safe to share between them.

    Args:
        files: the token files.
    """

    def __init__(self, files: Sequence[CheckedFile]) -> None:
        self._files = files
        self._sums: dict[tuple[int, int], Future[NDArray[np.uint64]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._of_thread = threading.local()

    def begin(self, file: int, block: int) -> bool:
        """Have a block hashed, unless it was checked or begun already.

        Args:
            file: index of its file.
            block: which one.

        Returns:
            False where too many are begun; to be asked for again later.
        """
        if (file, block) in self._sums or self._files[file].is_checked(block):
            return True
        if len(self._sums) >= BLOCKS_AHEAD:
            return False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READING_THREADS, "hashing-ahead")
        self._sums[file, block] = self._pool.submit(self._hash, self._files[file], block)
        return True

    def finish(self, file: int, block: int) -> None:
        """Wait for a block if it was begun; it counts as checked if it is what was written.

        Args:
            file: index of its file.
            block: which one.
        """
        sums = self._sums.pop((file, block), None)
        if sums is not None and sums.exception() is None:
            self._files[file].accept(block, sums.result())

    def drop(self, file: int) -> None:
        """Use nothing that was found in a file.

        Args:
            file: its index.
        """
        for key in [key for key in self._sums if key[0] == file]:
            self._sums.pop(key).cancel()

    def stop(self) -> None:
        """Drop everything, and wait for the threads."""
        pool, self._pool = self._pool, None
        self._sums.clear()
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _hash(self, file: CheckedFile, block: int) -> NDArray[np.uint64]:
        if not hasattr(self._of_thread, "content"):
            self._of_thread.content = np.empty(BLOCK_BYTES, np.uint8)
        return file.read_block(block, self._of_thread.content.data)
