"""Two files of random tokens, a cache over them, and damage as disks do it."""

import hashlib
import os

import numpy as np
from hypothesis import strategies as st

from data_prep.block_cache import EXTENT_BYTES, BlockCache
from data_prep.checked_file import PAGE_BYTES, CheckedFile, OpenFiles
from data_prep.manifest import BLOCK_BYTES

# Two files: 2 blocks and 100 bytes, 1 page and a bit.
COUNTS = ((2 * BLOCK_BYTES + 100) // 4, (PAGE_BYTES + 12) // 4)
BLOCK, EXTENT, PAGE = BLOCK_BYTES // 4, EXTENT_BYTES // 4, PAGE_BYTES // 4


EDGES = [0, PAGE, EXTENT, BLOCK, BLOCK + EXTENT, 2 * BLOCK, COUNTS[0]]
PLACES = st.one_of(
    st.integers(0, COUNTS[0]),
    st.tuples(st.sampled_from(EDGES), st.integers(-2, 2)).map(sum),
).map(lambda place: min(max(place, 0), COUNTS[0]))


def block_hashes(content):
    starts = range(0, len(content), BLOCK_BYTES)
    return [hashlib.sha256(content[n : n + BLOCK_BYTES]).hexdigest() for n in starts]


def flip(path, position):
    """Change a bit as a disk does: nobody wrote, so the time of the last change stays."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cache_of(paths, hashes, extents=100):
    open_files = OpenFiles()
    files = [CheckedFile(path, sums, open_files) for path, sums in zip(paths, hashes, strict=True)]
    return BlockCache(files, extents * EXTENT_BYTES)


def gather(cache, positions, count):
    """The rows, three at a time, between what stands before and behind them."""
    parts = cache.gather(np.asarray(positions), count, (7, 8), 3)
    assert [len(part) for part in parts[:-1]] == [3] * (len(parts) - 1)
    rows = np.concatenate(parts)
    assert rows.dtype == np.uint32
    assert len(rows) == len(positions)
    assert (rows[:, 0] == 7).all()
    assert (rows[:, -1] == 8).all()
    return rows[:, 1:-1]
