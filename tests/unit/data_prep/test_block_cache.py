"""Checked tokens in memory: what is handed out is what was compared, whatever the cache does."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import checked_file
from data_prep.block_cache import EXTENT_BYTES, BlockCache
from data_prep.checked_file import PAGE_BYTES, CheckedFile
from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES
from tests.two_token_files import (
    BLOCK,
    COUNTS,
    EXTENT,
    PAGE,
    PLACES,
    block_hashes,
    cache_of,
    flip,
    gather,
)


@pytest.fixture
def counted(monkeypatch):
    """How often each block was hashed, and the runs of pages that were read."""
    blocks, pages = [], []

    def note(name, calls, size):
        really = getattr(CheckedFile, name)

        def call(self, first, into):
            calls.append((first, len(into) // size))
            return really(self, first, into)

        monkeypatch.setattr(CheckedFile, name, call)

    note("read_block", blocks, BLOCK_BYTES)
    note("read_pages", pages, PAGE_BYTES)
    return blocks, pages


@settings(max_examples=40)
@given(st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=4), st.sampled_from([1, 2, 100]))
def test_a_read_is_a_slice(originals, tokens, hashes, ranges, extents):
    cache = cache_of(originals, hashes, extents)
    for start, end in map(sorted, ranges):
        found = cache.read(start, end)
        assert found.dtype == np.uint32
        assert np.array_equal(found, tokens[0][start:end])
    first = cache.first_position(1)
    assert np.array_equal(cache.read(first, first + COUNTS[1]), tokens[1])


@pytest.mark.parametrize("extents", [1, 2, 5, 100])
@pytest.mark.parametrize("count", [1, 37, 510, PAGE])
def test_gathered_rows_are_slices(originals, tokens, hashes, extents, count):
    cache, rng = cache_of(originals, hashes, extents), np.random.default_rng(count)
    for batch in (1, 7, 300, 300):
        places = rng.integers(0, COUNTS[0] - count, batch)
        places[: batch // 2] = np.sort(places[: batch // 2])
        places = places[BlockCache.are_in_one_extent(places, count)]
        expected = [tokens[0][place : place + count] for place in places]
        if count < COUNTS[1]:
            places = np.append(places, cache.first_position(1) + 3)
            expected.append(tokens[1][3 : 3 + count])
        assert np.array_equal(gather(cache, places, count), expected)


def test_rows_that_can_be_gathered():
    def are(places, count):
        return BlockCache.are_in_one_extent(np.array(places), count).tolist()

    assert are([0, EXTENT - 10, EXTENT - 9, EXTENT], 10) == [True, True, False, True]
    assert are([5], PAGE) == [True]
    assert are([5], PAGE + 1) == [False]
    assert are([5], 0) == [False]


def test_nothing_is_gathered_of_no_rows(originals, hashes):
    assert cache_of(originals, hashes).gather(np.empty(0, np.int64), 10, (7, 8), 3) == []


def test_a_block_is_hashed_once_and_pages_are_read_alone_afterwards(originals, hashes, counted):
    blocks, pages = counted
    cache = cache_of(originals, hashes, extents=2)
    gather(cache, [10, BLOCK + 10, 20, EXTENT + 10], 8)
    assert blocks == [(0, 1), (1, 1)]
    assert pages == []
    gather(cache, [2 * BLOCK + 3], 8)  # takes the place of two extents, and of the hashed block
    gather(cache, [cache.first_position(1)], 8)
    assert blocks == [(0, 1), (1, 1), (2, 1), (0, 1)]
    places = [5, 9 * PAGE - 4, 30 * PAGE, 9 * PAGE + 1]
    gather(cache, places, 8)
    assert (blocks[4:], pages) == ([], [(0, 1), (8, 2), (30, 1)])
    cache.read(PAGE - 1, 4 * PAGE)
    assert (blocks[4:], pages[3:]) == ([], [(1, 3)])
    gather(cache, places, 8)
    assert (len(blocks), len(pages)) == (4, 4)


def test_few_pages_between_wanted_ones_are_read_with_them(originals, hashes, counted):
    _, pages = counted
    cache = cache_of(originals, hashes, extents=1)
    gather(cache, [0], 8)
    gather(cache, [EXTENT], 8)
    del pages[:]
    gather(cache, [3 * PAGE, 6 * PAGE + 1, 4 * PAGE], 8)
    assert pages == [(3, 4)]
    gather(cache, [10 * PAGE, 14 * PAGE], 8)
    assert pages[1:] == [(10, 5)]
    gather(cache, [20 * PAGE, 28 * PAGE], 8)
    assert pages[2:] == [(20, 1), (28, 1)]


def test_rows_across_extents_and_blocks_are_slices(originals, tokens, hashes, counted):
    blocks, pages = counted
    places = [EXTENT - 1, BLOCK - 5, 0, 2 * BLOCK - 7, EXTENT - 4]
    expected = [tokens[0][place : place + 8] for place in places]
    for extents in (1, 2, 100):
        cache = cache_of(originals, hashes, extents)
        for _ in range(2):
            assert np.array_equal(gather(cache, places, 8), expected)
    assert blocks[-3:] == [(0, 1), (1, 1), (2, 1)]
    del pages[:]
    gather(cache, places, 8)
    assert not pages


def test_the_extent_that_was_used_longest_ago_makes_room(originals, hashes, counted):
    _, pages = counted
    cache = cache_of(originals, hashes, extents=3)
    for extent in range(4, 8):  # all of a block, and then only three of them are left
        gather(cache, [extent * EXTENT], 8)
    gather(cache, [2 * BLOCK], 8)  # another block is the one that was hashed last
    del pages[:]
    gather(cache, [6 * EXTENT, 7 * EXTENT, 2 * BLOCK], 8)
    assert pages == []
    gather(cache, [6 * EXTENT], 8)
    gather(cache, [4 * EXTENT], 8)  # instead of 7
    gather(cache, [6 * EXTENT, 2 * BLOCK], 8)
    assert len(pages) == 1
    gather(cache, [7 * EXTENT], 8)
    assert len(pages) == 2


def test_memory_is_bounded(originals, hashes):
    cache = cache_of(originals, hashes, extents=3)
    for extent in range(8):
        gather(cache, [extent * EXTENT], 8)
    assert cache._tokens.nbytes == 3 * EXTENT_BYTES
    small = cache_of(originals[1:], hashes[1:])
    small.read(0, 8)
    assert small._tokens.nbytes == BLOCK_BYTES, "no more than the files hold"


@pytest.mark.parametrize("read", ["gather", "read"])
def test_what_rots_on_the_disk_is_not_handed_out(paths, tokens, hashes, read):
    """In memory is the copy that was checked; what is fetched again is compared again."""
    cache = cache_of(paths, hashes, extents=1)

    def at(place):
        return gather(cache, [place], 8)[0] if read == "gather" else cache.read(place, place + 8)

    at(0)
    place = EXTENT // 2
    flip(paths[0], 4 * place + 3)
    assert np.array_equal(at(place), tokens[0][place : place + 8])
    at(2 * BLOCK)
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"0: bytes from \d+ \(block 0\) are not what they"):
            at(place)
    # Neighbours are untouched, and so is the page once the disk gives it back as it was.
    assert np.array_equal(at(0), tokens[0][:8])
    flip(paths[0], 4 * place + 3)
    assert np.array_equal(at(place), tokens[0][place : place + 8])


@pytest.mark.parametrize("read", ["gather", "read"])
def test_what_somebody_writes_is_compared_with_the_manifest(paths, tokens, hashes, read):
    cache = cache_of(paths, hashes)

    def at(place):
        return gather(cache, [place], 8)[0] if read == "gather" else cache.read(place, place + 8)

    at(0)
    flip(paths[0], 17)
    os.utime(paths[0], ns=(0, 1))
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"0: block 0 \(bytes from 0\) does not have"):
            at(0)
    assert np.array_equal(at(BLOCK), tokens[0][BLOCK : BLOCK + 8])
    flip(paths[0], 17)
    os.utime(paths[0], ns=(0, 2))
    assert np.array_equal(at(0), tokens[0][:8])


def test_the_bytes_that_were_hashed_are_the_bytes_that_are_handed_out(
    paths, tokens, hashes, monkeypatch
):
    """No moment between hashing and use: a file that changes then changes nothing."""
    really = hashlib.sha256

    def write_and_hash(content):
        paths[0].write_bytes(bytes(len(tokens[0]) * 4))
        return really(content)

    monkeypatch.setattr(checked_file.hashlib, "sha256", write_and_hash)
    cache = cache_of(paths, hashes)
    assert np.array_equal(gather(cache, [100], 8)[0], tokens[0][100:108])
    os.utime(paths[0], ns=(0, 1))
    with pytest.raises(CorruptError, match="block 0"):
        gather(cache, [100], 8)


def test_a_file_that_is_cut_while_it_is_read_is_refused(paths, hashes, monkeypatch):
    cache = cache_of(paths, hashes, extents=1)
    gather(cache, [0], 8)
    gather(cache, [2 * BLOCK], 8)
    os.truncate(paths[0], 50)
    monkeypatch.setattr(CheckedFile, "has_changed", lambda _: False)
    with pytest.raises(CorruptError, match="bytes from 0"):
        gather(cache, [0], 8)
    with pytest.raises(CorruptError, match="block 1"):
        gather(cache, [BLOCK], 8)


def test_threads_share_a_cache_that_is_too_small_for_them(originals, tokens, hashes):
    cache = cache_of(originals, hashes, extents=3)
    start = threading.Barrier(4)

    def is_right(seed):
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(20):
            places = rng.integers(0, COUNTS[0] - 100, 40)
            places = places[BlockCache.are_in_one_extent(places, 100)]
            expected = [tokens[0][place : place + 100] for place in places]
            if not np.array_equal(gather(cache, places, 100), expected):
                return False
            first = int(places[0])
            if not np.array_equal(cache.read(first, first + 9000), tokens[0][first : first + 9000]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_damaged_block_among_those_that_are_hashed_at_once(paths, tokens, hashes, bad):
    """Each thread compares its own block: the damaged one is named, the others can be used."""
    flip(paths[0], bad * BLOCK_BYTES + 11)
    cache = cache_of(paths, hashes)
    places = np.array([50, BLOCK + 50, 2 * BLOCK + 8])
    for _ in range(2):
        with pytest.raises(CorruptError, match=rf"0: block {bad} \(bytes from"):
            gather(cache, places, 8)
    sound = np.delete(places, bad)
    assert np.array_equal(gather(cache, sound, 8), [tokens[0][n : n + 8] for n in sound])
    flip(paths[0], bad * BLOCK_BYTES + 11)
    assert np.array_equal(gather(cache, places, 8), [tokens[0][n : n + 8] for n in places])


def test_more_blocks_than_threads_are_hashed_once_each(tmp_path, counted):
    blocks, _ = counted
    values = np.random.default_rng(5).integers(0, 2**32, 9 * BLOCK, np.uint32)
    (tmp_path / "long").write_bytes(values.tobytes())
    cache = cache_of([tmp_path / "long"], [block_hashes(values.tobytes())], extents=64)
    places = np.random.default_rng(6).integers(0, len(values) - 8, 500)
    assert np.array_equal(gather(cache, places, 8), [values[n : n + 8] for n in places])
    assert sorted(blocks) == [(n, 1) for n in range(9)]
