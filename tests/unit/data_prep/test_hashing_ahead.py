"""Blocks that are announced: hashed by threads, once, and with the same tokens and errors."""

import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import hashing_ahead
from data_prep.block_cache import EXTENT_BYTES
from data_prep.checked_file import CheckedFile
from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES
from tests.two_token_files import BLOCK, PLACES, block_hashes, cache_of, flip, gather


@pytest.fixture
def hashed_by(monkeypatch):
    """Which thread hashed each block."""
    names, really = {}, CheckedFile.read_block

    def read_block(self, block, into):
        try:
            return really(self, block, into)
        finally:
            names.setdefault(block, []).append(threading.current_thread().name)

    monkeypatch.setattr(CheckedFile, "read_block", read_block)
    return names


def test_blocks_that_are_announced_are_hashed_once_and_by_threads(
    originals, tokens, hashes, hashed_by
):
    cache = cache_of(originals, hashes)
    places = np.array([50, BLOCK + 50, 2 * BLOCK + 8, 70])
    for _ in range(2):
        assert cache.announce(places)
    assert np.array_equal(gather(cache, places, 8), [tokens[0][n : n + 8] for n in places])
    assert np.array_equal(cache.read(BLOCK - 9, BLOCK + 9), tokens[0][BLOCK - 9 : BLOCK + 9])
    assert cache.announce(places)
    cache.stop_announced()
    assert {block: len(names) for block, names in hashed_by.items()} == {0: 1, 1: 1, 2: 1}
    assert all(name.startswith("hashing-ahead") for names in hashed_by.values() for name in names)
    assert not [t for t in threading.enumerate() if t.name.startswith("hashing-ahead")]
    assert cache.announce(np.array([cache.first_position(1)])), "and again after it was stopped"
    cache.stop_announced()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), PLACES, PLACES), min_size=1, max_size=8))
def test_announcing_anything_changes_nothing_that_is_read(originals, tokens, hashes, wishes):
    cache = cache_of(originals, hashes, extents=3)
    for is_read, *ends in wishes:
        start, end = sorted(ends)
        if is_read:
            assert np.array_equal(cache.read(start, end), tokens[0][start:end])
        else:
            cache.announce(np.array([start, end]))
    cache.stop_announced()


@pytest.mark.parametrize("read", ["gather", "read"])
def test_damage_that_is_found_ahead_is_raised_by_whoever_needs_the_block(
    paths, tokens, hashes, read
):
    flip(paths[0], BLOCK_BYTES + 11)
    cache = cache_of(paths, hashes)

    def at(place):
        return gather(cache, [place], 8)[0] if read == "gather" else cache.read(place, place + 8)

    assert cache.announce(np.array([50, BLOCK + 50]))
    assert np.array_equal(at(50), tokens[0][50:58])
    with pytest.raises(CorruptError, match=r"0: block 1 \(bytes from 4194304\) does not have"):
        at(BLOCK + 50)
    flip(paths[0], BLOCK_BYTES + 11)
    assert cache.announce(np.array([BLOCK + 50]))
    assert np.array_equal(at(BLOCK + 50), tokens[0][BLOCK + 50 : BLOCK + 58])
    cache.stop_announced()
    paths[0].unlink()
    assert cache_of(paths, hashes).announce(np.array([50])), "raised where it is read, and not here"
    cache.stop_announced()


def test_what_was_wrong_only_when_it_was_read_ahead_is_read_again(paths, tokens, hashes, hashed_by):
    flip(paths[0], 17)
    cache = cache_of(paths, hashes)
    cache.announce(np.array([50]))
    while not hashed_by:
        time.sleep(0.01)
    flip(paths[0], 17)
    assert np.array_equal(gather(cache, [50], 8)[0], tokens[0][50:58])
    cache.stop_announced()


def test_what_was_found_before_somebody_wrote_does_not_count(paths, hashes, hashed_by):
    cache = cache_of(paths, hashes)
    cache.announce(np.array([50]))
    while not hashed_by:
        time.sleep(0.01)
    flip(paths[0], 17)
    os.utime(paths[0], ns=(0, 1))
    with pytest.raises(CorruptError, match=r"0: block 0 \(bytes from 0\) does not have"):
        gather(cache, [50], 8)
    assert len(hashed_by[0]) == 2
    cache.stop_announced()


def test_so_many_blocks_are_begun_and_no_more(tmp_path, hashed_by, monkeypatch):
    """What they cost is a buffer a thread, however many were announced."""
    monkeypatch.setattr(hashing_ahead, "BLOCKS_AHEAD", 5)
    monkeypatch.setattr(hashing_ahead, "READING_THREADS", 2)
    content = bytes(9 * BLOCK_BYTES)
    (tmp_path / "long").write_bytes(content)
    cache = cache_of([tmp_path / "long"], [block_hashes(content)], extents=4)
    places = np.arange(9) * BLOCK
    tracemalloc.start()
    try:
        assert not cache.announce(places)
        assert not cache.announce(places)
        cache.stop_announced()
        assert not cache.announce(places)
        gather(cache, places[:2], 8)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    slots, buffers = 4 * EXTENT_BYTES, 2 * 2 * BLOCK_BYTES  # of the threads stopped and new
    assert peak_bytes < slots + buffers + BLOCK_BYTES // 2
    assert not cache.announce(places[2:]), "two are needed no more, and four are left"
    assert cache.announce(places[2:7])
    assert np.array_equal(gather(cache, places, 8), np.zeros((9, 8)))
    cache.stop_announced()
    assert set(hashed_by) == set(range(9))
