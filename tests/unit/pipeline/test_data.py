"""Sample order, packing and batches as functions of the step, and the thread that reads ahead."""

import json
import threading
import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import CorruptError
from data_prep.shards import Dataset
from pipeline.counter_rng import sample_words
from pipeline.data import (
    CLS_ID,
    PAD_ID,
    SEP_ID,
    Prefetcher,
    SampleOrder,
    SequenceStream,
    TrainBatches,
    heldout_batches,
    permute,
)

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 64, 97, 101, 255, 257, 1009]


class Tokens:
    """A split that counts from 100: token i of the stream is 100 + i."""

    def __init__(self, count):
        self.count = count

    def split_tokens(self, split):
        return self.count

    def read(self, split, start, end):
        assert 0 <= start <= end <= self.count
        return np.arange(100 + start, 100 + end, dtype=np.uint32)


def stream(num_tokens, length=10):
    return SequenceStream(Tokens(num_tokens), "train", length)


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


def test_sequences_are_cut_from_the_stream():
    batch = stream(19, length=10).batch(np.array([1, 0]), np.array([0, 3]))
    assert batch.input_ids_BL.tolist() == [
        [CLS_ID, *range(108, 116), SEP_ID],
        [CLS_ID, *range(100, 108), SEP_ID],
    ]
    assert batch.input_ids_BL.dtype == torch.int64
    assert batch.is_full
    assert batch.attention_mask() is None
    assert batch.sample_words_B2.tolist() == [[*sample_words(0, 1)], [*sample_words(3, 0)]]


def test_the_last_sequence_is_padded():
    short = stream(19, length=10)
    assert short.num_sequences == 3
    batch = short.batch(np.array([2, 0]), np.array([0, 0]))
    assert batch.input_ids_BL[0].tolist() == [CLS_ID, 116, 117, 118, SEP_ID] + [PAD_ID] * 5
    assert batch.lengths_B.tolist() == [5, 10]
    assert not batch.is_full
    assert batch.attention_mask().tolist() == [[True] * 5 + [False] * 5, [True] * 10]


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2)])
def test_number_of_sequences(tokens, sequences):
    assert stream(tokens, length=10).num_sequences == sequences


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("length", [8, 33, 128])
def test_packed_rows_are_the_concatenated_documents(dataset_folder, split, length):
    """Against the files alone, opened with plain NumPy, in the order of the manifest."""
    shards = json.loads((dataset_folder / "manifest.json").read_text())["shards"]
    expected = np.concatenate(
        [np.load(dataset_folder / f"{s['name']}.tokens.npy") for s in shards if s["split"] == split]
    )
    ours = SequenceStream(Dataset.open(dataset_folder), split, length)
    assert ours.num_tokens == len(expected) > 0
    everything = np.arange(ours.num_sequences)
    batch = ours.batch(everything, np.zeros_like(everything))
    content = [
        row[1 : count - 1]
        for row, count in zip(batch.input_ids_BL.numpy(), batch.lengths_B.tolist(), strict=True)
    ]
    assert np.array_equal(np.concatenate(content), expected)
    ends = batch.input_ids_BL.gather(1, batch.lengths_B[:, None] - 1)
    assert (ends == SEP_ID).all()
    assert (batch.input_ids_BL[:, 0] == CLS_ID).all()


def test_packed_rows_decode_to_the_text(dataset_folder):
    from data_prep.tokenizer import Tokenizer

    dataset = Dataset.open(dataset_folder)
    tokenizer = Tokenizer.load(dataset.tokenizer_folder)
    ours = SequenceStream(dataset, "heldout", 64)
    everything = np.arange(ours.num_sequences)
    batch = ours.batch(everything, np.zeros_like(everything))
    rows = [
        row[1 : count - 1]
        for row, count in zip(batch.input_ids_BL.tolist(), batch.lengths_B.tolist(), strict=True)
    ]
    manifest = dataset.manifest
    documents = sum(s.num_documents for s in manifest.shards if s.split == "heldout")
    whole = [
        token for d in range(documents) for token in dataset.document("heldout", d)[0].tolist()
    ]
    assert tokenizer.decode([*chain(*rows)]) == tokenizer.decode(whole)


def batches(size, batch_size, ranks=1, micro=None, rank=0, length=10):
    """Batches over `size` sequences; the default takes the whole batch at once."""
    content = stream(size * (length - 2), length)
    micro = batch_size // ranks if micro is None else micro
    return TrainBatches(content, order(size), batch_size, micro, ranks, rank)


def identities(micro_batches):
    return [tuple(words) for batch in micro_batches for words in batch.sample_words_B2.tolist()]


@pytest.mark.parametrize(
    ("ranks", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1), (4, 1)]
)
def test_any_split_of_a_step_reads_the_same_samples(ranks, micro):
    whole = batches(13, 8)
    for step in (0, 1, 2, 50):  # 13 samples: steps 1 and 3 straddle epochs
        expected = identities(whole.at_step(step))
        parts = [batches(13, 8, ranks, micro, rank).at_step(step) for rank in range(ranks)]
        assert {len(part) for part in parts} == {8 // (ranks * micro)}
        # Micro step by micro step, rank by rank: even the order is that of one process.
        interleaved = [identities([part[k]]) for k in range(len(parts[0])) for part in parts]
        assert [*chain(*interleaved)] == expected


def test_steps_walk_through_the_endless_order():
    ours = batches(13, 8)
    seen = [name for step in range(13) for name in identities(ours.at_step(step))]
    every_epoch = {sample_words(epoch, sample) for epoch in range(8) for sample in range(13)}
    assert len(seen) == len(set(seen)) == 8 * 13
    assert set(seen) == every_epoch
    assert (ours.first_sample(3), ours.epochs_at(3)) == (24, 24 / 13)


def test_a_batch_larger_than_the_data_takes_several_epochs():
    names = identities(batches(3, 16).at_step(0))
    assert len(set(names)) == 16
    assert {second >> 8 for _, second in names} == {0, 1, 2, 3, 4, 5}


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    ours = batches(29, 8)
    first = ours.at_step(5)[0].input_ids_BL
    ours.at_step(0)
    assert torch.equal(ours.at_step(5)[0].input_ids_BL, first)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_heldout_batches(count, ranks, limit):
    shares = [list(heldout_batches(stream(count * 8), limit, 3, ranks, r)) for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "a forward pass is a collective"
    real = [
        int(sample)
        for share in shares
        for batch, is_real in share
        if is_real
        for sample in batch.sample_words_B2[:, 0]
    ]
    assert sorted(real) == list(range(min(count, limit)))
    for share in shares:
        for batch, is_real in share:
            assert 1 <= len(batch.lengths_B) <= (3 if is_real else 1)
            assert (batch.sample_words_B2[:, 1] == 0).all(), "the same masks every time"


def test_the_prefetcher_gives_every_step_in_order():
    ours = batches(29, 8)
    prefetcher = Prefetcher(ours, 3, 9, depth=2)
    try:
        for step in range(3, 9):
            assert identities(prefetcher.next()) == identities(ours.at_step(step))
    finally:
        prefetcher.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


class Counting:
    """Batches that note which steps were read, and fail at one."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.read = []

    def at_step(self, step):
        if step == self.fails_at:
            raise CorruptError(f"step {step} is damaged")
        self.read.append(step)
        return [step]


def test_the_prefetcher_carries_an_error_to_its_step():
    prefetcher = Prefetcher(Counting(fails_at=2), 0, 10)
    try:
        assert [prefetcher.next(), prefetcher.next()] == [[0], [1]]
        with pytest.raises(CorruptError, match="step 2 is damaged"):
            prefetcher.next()
    finally:
        prefetcher.close()


def test_the_prefetcher_reads_ahead_no_further_than_its_depth():
    counting = Counting()
    prefetcher = Prefetcher(counting, 0, 1000, depth=3)
    deadline = time.monotonic() + 10
    while len(counting.read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert counting.read == [0, 1, 2, 3]  # three in the queue and one in hand
    started = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - started < 5
    assert counting.read == [0, 1, 2, 3]
