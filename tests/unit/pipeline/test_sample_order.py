"""The order of samples: a permutation of every epoch, in no memory, block by block.

And the skip list: where trained samples lie between the windows that are left out.
"""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sample_order import NOTHING_SKIPPED, SampleOrder, SkipList, SkippedWindow, permute

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 64, 97, 101, 255, 257, 1009]


def order(num_samples, block=4, window=3, seed=5, length=10):
    return SampleOrder(num_samples, seed, length, block, window)


def epoch_of(sample_order, epoch):
    size = sample_order.num_samples
    positions = np.arange(epoch * size, (epoch + 1) * size, dtype=np.int64)
    epochs, samples = sample_order.samples(positions)
    assert (epochs == epoch).all()
    return samples


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_permutation(size):
    index = np.arange(size, dtype=np.int64)
    assert sorted(permute(index, size, (1, 2)).tolist()) == index.tolist()
    backwards = permute(index[::-1].copy(), size, (1, 2))
    assert (backwards[::-1] == permute(index, size, (1, 2))).all(), "a function of each element"


def test_permute_sends_every_element_everywhere():
    """A thousand keys move element 3 to each of 10 places equally often."""
    times = np.zeros(10)
    for key in range(1000):
        times[permute(np.array([3]), 10, (key, 77))[0]] += 1
    assert (np.abs(times - 100) < 5 * (100 * 0.9) ** 0.5).all()


def test_permute_scatters_neighbours():
    where = permute(np.arange(10_000, dtype=np.int64), 10_000, (3, 4))
    correlation = np.corrcoef(np.arange(10_000), where)[0, 1]
    assert abs(correlation) < 5 / 100
    steps = np.abs(np.diff(where))
    assert abs(steps.mean() - 10_000 / 3) < 5 * 2357 / 100  # |difference| of two uniform values


def test_permute_of_a_huge_domain_walks_inside_of_it():
    size = 2**41 + 12345
    index = np.array([0, 1, size - 1, 2**40], dtype=np.int64)
    moved = permute(index, size, (9, 9))
    assert ((moved >= 0) & (moved < size)).all()
    assert len(set(moved.tolist())) == 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("block", "window"), [(1, 7), (4, 3), (16, 2), (2000, 64), (3, 1000)])
def test_every_epoch_holds_every_sample_once(size, block, window):
    sample_order = order(size, block, window)
    for epoch in (0, 7):
        assert sorted(epoch_of(sample_order, epoch).tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**40))
def test_every_epoch_holds_every_sample_once_for_any_sizes(size, block, window, seed):
    samples = epoch_of(order(size, block, window, seed), 2**20)
    assert sorted(samples.tolist()) == list(range(size))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_position_s_sample_does_not_depend_on_what_is_asked_with_it(size, positions):
    sample_order = order(size)
    epochs, samples = sample_order.samples(np.array(positions, np.int64))
    for position, epoch, sample in zip(positions, epochs, samples, strict=True):
        alone = sample_order.samples(np.array([position], np.int64))
        assert (alone[0][0], alone[1][0]) == (epoch, sample)


def test_epochs_seeds_and_lengths_have_other_orders():
    orders = [
        epoch_of(order(200), 0),
        epoch_of(order(200), 1),
        epoch_of(order(200, seed=6), 0),
        epoch_of(order(200, length=12), 0),
    ]
    for left in range(4):
        for right in range(left):
            same = (orders[left] == orders[right]).sum()
            assert same < 1 + 5 * 1**0.5


def test_an_epoch_reads_whole_blocks_window_by_window():
    """What keeps a cold disk fast: each window of the order touches few blocks."""
    samples = epoch_of(order(4 * 30, block=4, window=5), 3)
    windows = samples.reshape(6, 20)
    blocks = [set((w // 4).tolist()) for w in windows]
    assert [len(each) for each in blocks] == [5] * 6
    assert set.union(*blocks) == set(range(30))
    assert any(sorted(each) != list(range(min(each), min(each) + 5)) for each in blocks)


def test_the_order_takes_no_memory():
    sample_order = order(80_000_000, block=512, window=64)
    tracemalloc.start()
    try:
        positions = np.array([0, 79_999_999, 80_000_000, 2**40], np.int64)
        epochs, samples = sample_order.samples(positions)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert epochs.tolist()[:3] == [0, 0, 1]
    assert ((samples >= 0) & (samples < 80_000_000)).all()
    assert peak < 1_000_000


def test_golden_order():
    """A change here changes every run: it needs a new major version."""
    golden = [9, 4, 8, 5, 1, 10, 2, 6, 0, 3, 7]
    assert epoch_of(order(11, block=2, window=2, seed=1), 1).tolist() == golden


WALKED = 300
windows = st.builds(
    lambda length, first, size: SkippedWindow(length, first, first + size),
    st.sampled_from([16, 32]),
    st.integers(0, 120),
    st.integers(1, 40),
)


def walk(skip_list, length):
    """The first positions that are trained on, one by one."""
    mine = [w for w in skip_list.windows if w.sequence_length == length]
    left_out = {p for w in mine for p in range(w.first_position, w.end_position)}
    return [p for p in range(WALKED + len(left_out)) if p not in left_out][:WALKED]


@settings(max_examples=200, deadline=None)
@given(st.lists(windows, max_size=6))
def test_trained_samples_lie_where_a_walk_over_the_windows_finds_them(windows):
    skip_list = SkipList(tuple(windows))
    counts = np.arange(WALKED, dtype=np.int64)
    for length in (16, 32):
        expected = walk(skip_list, length)
        found = skip_list.positions(length, counts)
        assert found.dtype == np.int64
        assert found.tolist() == expected
        backwards = skip_list.positions(length, counts[::-1].copy())
        assert backwards[::-1].tolist() == expected, "a function of each count"


@settings(max_examples=200, deadline=None)
@given(st.lists(windows, max_size=4), st.integers(0, 100), st.integers(0, 40))
def test_a_window_that_is_added_leaves_out_just_the_samples_it_is_of(windows, first, size):
    before = SkipList(tuple(windows))
    window = before.window_of(16, first, first + size)
    if size == 0:
        assert window is None
        return
    after, walked = SkipList((*before.windows, window)), walk(before, 16)
    # Nothing moves that was trained on before; what comes after it begins behind the window.
    assert walk(after, 16)[:first] == walked[:first]
    assert walk(after, 16)[first:][:100] == walked[first + size :][:100]
    assert walk(after, 32) == walk(before, 32)


def test_the_example_of_the_skip_list():
    skip_list = SkipList((SkippedWindow(16, 3, 5),))
    assert skip_list.positions(16, np.arange(5)).tolist() == [0, 1, 2, 5, 6]
    assert skip_list.window_of(16, 2, 4) == SkippedWindow(16, 2, 6)


def test_nothing_skipped_moves_nothing():
    counts = np.array([7, 2**50], np.int64)
    assert NOTHING_SKIPPED.positions(16, counts).tolist() == counts.tolist()
    far = SkipList((SkippedWindow(16, 2**40, 2**41),))
    assert far.positions(16, counts).tolist() == [7, 2**50 + 2**40]
