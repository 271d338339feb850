"""Checked tokens in memory: what the next batches need, gathered row by row without a loop.

A cache holds extents (1 MiB) of the token files of a dataset side by side in one array, so that the
rows of a batch, wherever they lie, are one indexing operation. Space for an extent is taken from
the one that was used longest ago. Its pages (32 KiB) come by one of two ways, both of them compared
where they then lie (`data_prep.checked_file`):

    first use of a block    all its 4 MiB are read and hashed, once a process, by several threads
    any later use           the pages that are wanted, each with its sum; the gaps between them too
                            where those are few

A rank of many uses only a few rows of a block: reading pages keeps its cost proportional to its
rows, whatever the number of ranks. The order of training (`pipeline.sample_order`) wanders through
64 MiB for a long time; with its neighbours' ends that is about 130 extents, half of the default.

Blocks of rows that are announced are hashed by threads while others are used
(`data_prep.hashing_ahead`).

Tokens are asked for by position: `first_position(file)` + their place in the file, header included.

Letters: B runs of tokens, N tokens in each, R rows of the caller.
"""

import threading
from bisect import bisect_right
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.checked_file import PAGE_BYTES, PAGES_PER_BLOCK, CheckedFile
from data_prep.errors import CorruptError
from data_prep.hashing_ahead import HashingAhead
from data_prep.manifest import BLOCK_BYTES
from data_prep.run_copies import copy_runs

CACHE_BYTES = 256 << 20
"""Tokens that a dataset keeps in memory at most."""
EXTENT_BYTES = 1 << 20
_TOKEN_BYTES = 4
_EXTENT_TOKENS = EXTENT_BYTES // _TOKEN_BYTES
_PAGE_TOKENS = PAGE_BYTES // _TOKEN_BYTES
_PAGES_PER_EXTENT = EXTENT_BYTES // PAGE_BYTES
_EXTENT_SHIFT, _IN_EXTENT = _EXTENT_TOKENS.bit_length() - 1, _EXTENT_TOKENS - 1
_PAGE_SHIFT = _PAGE_TOKENS.bit_length() - 1
_EXTENTS_PER_BLOCK = BLOCK_BYTES // EXTENT_BYTES
NOWHERE = -1
"""The position of a run that is not asked for."""
_READ_AHEAD = 8  # extents, of as many blocks at most
_BLOCKS_AT_ONCE = 4  # that threads read and hash: the disk and the processor then work side by side


class BlockCache:
    """Checked tokens of some files; safe to share between threads.

    Args:
        files: the token files; positions count through them in this order.
        limit_bytes: memory for tokens; at least one extent is kept.
    """

    def __init__(self, files: list[CheckedFile], limit_bytes: int = CACHE_BYTES) -> None:
        extents = np.array([0, *(file.num_blocks for file in files)]) * _EXTENTS_PER_BLOCK
        self._files = files
        self._first_extents = np.cumsum(extents)
        self._file_starts: list[int] = self._first_extents.tolist()
        total = int(self._first_extents[-1])
        self._num_slots = max(1, min(limit_bytes // EXTENT_BYTES, total))
        self._lock = threading.Lock()
        self._slot_of_extent = np.full(total, NOWHERE, np.int32)
        self._extent_of_slot = np.full(self._num_slots, NOWHERE, np.int64)
        self._is_present = np.zeros((self._num_slots, _PAGES_PER_EXTENT), bool)
        self._last_use = np.zeros(self._num_slots, np.int64)
        self._clock = 0
        self._memory = np.empty(0, np.uint32)
        self._tokens = self._memory  # without its first and last token, which nothing is put into
        self._ahead = HashingAhead(files)
        self._hashed = np.empty(0, np.uint8)
        self._hashed_block = (NOWHERE, NOWHERE)

    def first_position(self, file: int) -> int:
        """Give the position of a file's first byte, counted in tokens.

        Args:
            file: index of the file.

        Returns:
            Its position.
        """
        return self._file_starts[file] * _EXTENT_TOKENS

    def read(self, start: int, end: int) -> NDArray[np.uint32]:
        """Copy the tokens of one file.

        Args:
            start: first position.
            end: one past the last position, inside of the same file.

        Returns:
            uint32 [end - start].

        Raises:
            CorruptError: the file is not what was written; the message names it.
        """
        tokens = np.empty(end - start, np.uint32)
        with self._lock:
            if len(tokens):
                self._forget_what_changed(np.array([start // _EXTENT_TOKENS]))
            self._copy_run(start, tokens)
        return tokens

    def announce(self, positions_B: NDArray[np.int64]) -> bool:
        """Have threads hash the blocks of what will be gathered soon.

        What they cannot read is left to `gather`, and the error with it.

        Args:
            positions_B: int64 [B], where runs of tokens begin.

        Returns:
            False where too many blocks are begun already; to be announced again later.
        """
        blocks = positions_B // (BLOCK_BYTES // _TOKEN_BYTES)
        first = int(blocks.min(initial=0))
        extents = (np.flatnonzero(np.bincount(blocks - first)) + first) * _EXTENTS_PER_BLOCK
        with self._lock:
            try:
                self._forget_what_changed(extents)
            except CorruptError:  # it comes again with the reading, and is raised there
                return True
            places = (self._place_of(extent) for extent in extents.tolist())
            return all(self._ahead.begin(file, page // PAGES_PER_BLOCK) for file, page in places)

    def stop_announced(self) -> None:
        """Hash nothing ahead any more, and wait for the threads that do."""
        with self._lock:
            self._ahead.stop()

    def _copy_run(self, start: int, out_N: NDArray[np.uint32]) -> None:
        """Copy tokens of one file, extent by extent."""
        done = 0
        while done < len(out_N):
            extent, offset = divmod(start + done, _EXTENT_TOKENS)
            count = min(len(out_N) - done, _EXTENT_TOKENS - offset)
            first, last = offset // _PAGE_TOKENS, (offset + count - 1) // _PAGE_TOKENS
            slot = int(self._slot_of_extent[extent])
            if slot == NOWHERE or not self._is_present[slot, first : last + 1].all():
                self._bring(extent, np.arange(first, last + 1))
            place = self._slot_for(extent) * _EXTENT_TOKENS + offset
            out_N[done : done + count] = self._tokens[place : place + count]
            done += count

    @staticmethod
    def are_in_one_extent(positions_B: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
        """Say which rows are gathered all at once; the others are copied one by one.

        Args:
            positions_B: int64 [B], where rows begin.
            count: tokens of a row.

        Returns:
            bool [B]: inside of one extent, and on two pages at most.
        """
        inside_B = positions_B & _IN_EXTENT <= _EXTENT_TOKENS - count
        return inside_B & (0 < count <= _PAGE_TOKENS)

    def gather(
        self,
        positions_B: NDArray[np.int64],
        count: int,
        edges: tuple[int, int],
        rows_at_once: int,
    ) -> list[NDArray[np.uint32]]:
        """Copy runs of tokens into rows, with one more token on either side.

        Args:
            positions_B: int64 [B], where runs begin; each lies inside of one file. A row at
                `NOWHERE` is for the caller to fill.
            count: N, tokens of a run.
            edges: what stands before and behind every run.
            rows_at_once: rows of an array; half a megabyte of them stays in a core's own cache.

        Returns:
            uint32 [rows_at_once, 1 + N + 1] each, in the order of the runs, the last one shorter.

        Raises:
            CorruptError: a file is not what was written; the message names it.
        """
        is_asked_B = positions_B != NOWHERE
        is_whole_B = is_asked_B & self.are_in_one_extent(positions_B, count)
        with self._lock:
            self._forget_what_changed(positions_B[is_asked_B] >> _EXTENT_SHIFT)
            whole = np.flatnonzero(is_whole_B)
            positions = positions_B[whole]
            starts, is_here = self._find(positions, count)
            if not is_here.all() and len(np.unique(positions >> _EXTENT_SHIFT)) <= self._num_slots:
                self._bring_some(positions[~is_here], count)
                starts, is_here = self._find(positions, count)
            if len(whole) and is_here.all():
                starts_B = np.zeros(len(positions_B), np.int64)
                starts_B[whole] = starts
                parts = copy_runs(self._memory, starts_B, count, edges, rows_at_once)
            else:
                rows = np.empty((len(positions_B), 1 + count + 1), np.uint32)
                rows[:, 0], rows[:, -1] = edges
                self._gather_by_turns(positions_B, whole, rows[:, 1:-1])
                parts = [rows[n : n + rows_at_once] for n in range(0, len(rows), rows_at_once)]
            for number in np.flatnonzero(is_asked_B & ~is_whole_B).tolist():
                part, row = divmod(number, rows_at_once)
                self._copy_run(int(positions_B[number]), parts[part][row, 1:-1])
        return parts

    def _gather_by_turns(
        self, positions_B: NDArray[np.int64], left: NDArray[np.int64], out_BN: NDArray[np.uint32]
    ) -> None:
        """Copy runs of which there is no space for all: those that are here, then others."""
        while len(left):
            starts, is_here = self._find(positions_B[left], out_BN.shape[1])
            here, left = left[is_here], left[~is_here]
            if len(here):
                (rows,) = copy_runs(
                    self._memory, starts[is_here], out_BN.shape[1], (0, 0), len(here)
                )
                out_BN[here] = rows[:, 1:-1]
            self._bring_some(positions_B[left], out_BN.shape[1])

    def _find(
        self, positions_B: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where runs would begin in memory, and which of them are there; those are used now."""
        slots_B = self._slot_of_extent.take(positions_B >> _EXTENT_SHIFT).astype(np.int64)
        starts_B = (slots_B << _EXTENT_SHIFT) + (positions_B & _IN_EXTENT)
        # A slot of -1 looks at the last one, whose answer does not count.
        is_present = self._is_present.ravel()
        is_here_B = is_present.take(starts_B >> _PAGE_SHIFT)
        is_here_B &= is_present.take((starts_B + (count - 1)) >> _PAGE_SHIFT)
        is_here_B &= slots_B != NOWHERE
        self._clock += 1
        self._last_use[slots_B if is_here_B.all() else slots_B[is_here_B]] = self._clock
        return starts_B, is_here_B

    def _bring_some(self, positions_B: NDArray[np.int64], count: int) -> None:
        """Bring the pages of some runs, of as many extents as there is space for at once."""
        extents, offsets = np.divmod(positions_B, _EXTENT_TOKENS)
        first_pages, last_pages = offsets // _PAGE_TOKENS, (offsets + count - 1) // _PAGE_TOKENS
        distinct, which = np.unique(extents, return_inverse=True)
        is_wanted = np.zeros((len(distinct), _PAGES_PER_EXTENT), bool)
        is_wanted[which, first_pages] = is_wanted[which, last_pages] = True
        _close_gaps(is_wanted)
        unchecked: dict[tuple[int, int], list[int]] = {}
        wanted = []
        for extent, pages in zip(distinct.tolist()[: self._num_slots], is_wanted, strict=False):
            file, first_page = self._place_of(extent)
            block = first_page // PAGES_PER_BLOCK
            self._ahead.finish(file, block)
            if self._files[file].is_checked(block):
                wanted.append((extent, np.flatnonzero(pages)))
            else:
                unchecked.setdefault((file, block), []).append(extent)
        self._hash_blocks(unchecked)
        announced = 0
        for number, (extent, pages) in enumerate(wanted):
            # The disk reads what comes next while this is compared.
            while announced < min(len(wanted), number + _READ_AHEAD):
                self._announce(*wanted[announced])
                announced += 1
            self._bring(extent, pages)

    def _hash_blocks(self, unchecked: dict[tuple[int, int], list[int]]) -> None:
        """Read and hash blocks for the first time, side by side, and keep some of their extents."""
        if not unchecked:
            return
        count = min(_BLOCKS_AT_ONCE, len(unchecked))
        free = list(np.empty((count, BLOCK_BYTES), np.uint8))
        running: deque[tuple[tuple[int, int], NDArray[np.uint8], Future[NDArray[np.uint64]]]]
        running, waiting = deque(), deque(unchecked)
        with ThreadPoolExecutor(count) as pool:
            while waiting or running:
                while waiting and free:
                    file, block = waiting.popleft()
                    into = free.pop()
                    job = pool.submit(self._files[file].read_block, block, into.data)
                    running.append(((file, block), into, job))
                (file, block), content, job = running.popleft()
                self._files[file].accept(block, job.result())
                for extent in unchecked[file, block]:
                    slot = self._slot_for(extent)
                    start = extent * EXTENT_BYTES % BLOCK_BYTES
                    self._bytes_of(slot)[:] = content[start : start + EXTENT_BYTES]
                    self._is_present[slot] = True
                free.append(content)

    def _announce(self, extent: int, pages: NDArray[np.int64]) -> None:
        file, first_page = self._place_of(extent)
        self._files[file].announce(first_page + int(pages[0]), first_page + int(pages[-1]) + 1)

    def _bring(self, extent: int, pages: NDArray[np.int64]) -> None:
        """See to it that pages of an extent are present."""
        slot = self._slot_for(extent)
        missing = pages[~self._is_present[slot, pages]]
        if not len(missing):
            return
        number, first_page = self._place_of(extent)
        file, block = self._files[number], first_page // PAGES_PER_BLOCK
        content = self._bytes_of(slot)
        self._ahead.finish(number, block)
        if self._hashed_block != (number, block) and not file.is_checked(block):
            self._hash(number, block)
        if self._hashed_block == (number, block):
            start = first_page % PAGES_PER_BLOCK * PAGE_BYTES
            content[:] = self._hashed[start : start + EXTENT_BYTES]
            self._is_present[slot] = True
            return
        first = int(missing[0])
        for page, following in pairwise([*missing.tolist(), NOWHERE]):
            if following != page + 1:
                run = content[first * PAGE_BYTES : (page + 1) * PAGE_BYTES]
                file.read_pages(first_page + first, run.data)
                self._is_present[slot, first : page + 1] = True
                first = following

    def _slot_for(self, extent: int) -> int:
        """The slot of an extent, which is used now; an empty one where it has none."""
        if not len(self._tokens):
            self._memory = np.empty(1 + self._num_slots * _EXTENT_TOKENS + 1, np.uint32)
            self._tokens = self._memory[1:-1]
        slot = int(self._slot_of_extent[extent])
        if slot == NOWHERE:
            slot = self._free_slot()
            self._slot_of_extent[extent], self._extent_of_slot[slot] = slot, extent
        self._clock += 1
        self._last_use[slot] = self._clock
        return slot

    def _hash(self, file: int, block: int) -> None:
        """Read a whole block for the first time; it stays until the next one comes."""
        if not len(self._hashed):
            self._hashed = np.empty(BLOCK_BYTES, np.uint8)
        self._hashed_block = (NOWHERE, NOWHERE)
        self._files[file].accept(block, self._files[file].read_block(block, self._hashed.data))
        self._hashed_block = (file, block)

    def _free_slot(self) -> int:
        """Take the slot that was used longest ago."""
        slot = int(self._last_use.argmin())
        self._empty(slot)
        return slot

    def _empty(self, slot: int) -> None:
        extent = self._extent_of_slot[slot]
        if extent != NOWHERE:
            self._slot_of_extent[extent] = NOWHERE
        self._extent_of_slot[slot] = NOWHERE
        self._is_present[slot] = False
        self._last_use[slot] = 0

    def _forget_what_changed(self, extents: NDArray[np.int64]) -> None:
        """Drop what is kept of files that somebody wrote to since; all of it is checked anew."""
        if len(self._files) == 1:
            touched = [0]
        else:
            indices = np.searchsorted(self._first_extents, extents, side="right") - 1
            touched = np.flatnonzero(np.bincount(indices)).tolist()
        for file in touched:
            if self._files[file].has_changed():
                self._ahead.drop(file)
                first, end = self._first_extents[file : file + 2]
                of_file = (self._extent_of_slot >= first) & (self._extent_of_slot < end)
                for slot in np.flatnonzero(of_file).tolist():
                    self._empty(slot)
                if self._hashed_block[0] == file:
                    self._hashed_block = (NOWHERE, NOWHERE)

    def _place_of(self, extent: int) -> tuple[int, int]:
        """The file of an extent, and its first page there."""
        file = bisect_right(self._file_starts, extent) - 1
        return file, (extent - self._file_starts[file]) * _PAGES_PER_EXTENT

    def _bytes_of(self, slot: int) -> NDArray[np.uint8]:
        tokens = self._tokens[slot * _EXTENT_TOKENS : (slot + 1) * _EXTENT_TOKENS]
        return tokens.view(np.uint8)


def _close_gaps(is_wanted: NDArray[np.bool_]) -> None:
    """Want the pages in between too where a quarter of them are wanted already.

    They are soon asked for, and one call for all costs less than one for each run.

    Args:
        is_wanted: bool [extents, pages], changed in place.
    """
    place = np.arange(is_wanted.shape[1])
    first = is_wanted.argmax(axis=1)[:, None]
    last = is_wanted.shape[1] - 1 - is_wanted[:, ::-1].argmax(axis=1)[:, None]
    is_dense = 4 * is_wanted.sum(axis=1, keepdims=True) > last - first
    is_wanted |= is_dense & (first <= place) & (place <= last)
