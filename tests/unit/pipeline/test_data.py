"""Packing, and batches as functions of the step."""

import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.errors import CorruptError
from data_prep.shards import Dataset
from pipeline.config_loading import load_run_config
from pipeline.counter_rng import sample_words
from pipeline.data import TrainBatches, heldout_batches, train_batches
from pipeline.ds_config import BatchPlan
from pipeline.phases import Phase, TrainSchedule
from pipeline.sample_order import SampleOrder, SkipList, SkippedWindow
from pipeline.sequences import CLS_ID, PAD_ID, SEP_ID, SequenceStream


class Tokens:
    """A split that counts from 100: token i of the stream is 100 + i."""

    manifest = SimpleNamespace(sources=())

    def __init__(self, count):
        self.count = count

    def split_tokens(self, split):
        return self.count

    def read(self, split, start, end):
        assert 0 <= start <= end <= self.count
        return np.arange(100 + start, 100 + end, dtype=np.uint32)

    def read_rows(self, split, starts, count, edges, rows_at_once):
        runs = [self.read(split, start, start + count) for start in starts.tolist()]
        rows = np.array([[edges[0], *run, edges[1]] for run in runs], np.uint32)
        return [rows[n : n + rows_at_once] for n in range(0, len(rows), rows_at_once)]

    def announce_rows(self, split, starts, count):
        return True

    def stop_announced(self):
        pass


def stream(num_tokens, length=10):
    return SequenceStream(Tokens(num_tokens), "train", length)


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


def test_no_sequences_are_a_batch_too():
    batch = stream(19).batch(np.array([], np.int64), np.array([], np.int64))
    assert (batch.input_ids_BL.shape, batch.sample_words_B2.shape) == ((0, 10), (0, 2))


def test_micro_batches_are_batches_and_know_which_of_them_is_padded():
    ours, samples = stream(30), np.array([0, 1, 2, 3, 2, 0])  # sample 3 has 6 tokens
    epochs = np.array([0, 1, 2, 3, 4, 70_000])
    parts = ours.micro_batches(samples, epochs, 2)
    assert [part.is_full for part in parts] == [True, False, True]
    for number, part in enumerate(parts):
        assert part.input_ids_BL.dtype == torch.int32
        here = slice(2 * number, 2 * number + 2)
        whole = ours.batch(samples[here], epochs[here])
        moved = part.to(torch.device("cpu"))
        for name in ("input_ids_BL", "lengths_B", "sample_words_B2"):
            assert torch.equal(getattr(moved, name), getattr(whole, name))
            assert getattr(moved, name).dtype == torch.int64
        assert moved.is_full == part.is_full


def test_samples_that_do_not_exist_are_an_error(dataset_folder):
    ours = SequenceStream(Dataset.open(dataset_folder), "train", 64)
    for sample in (-1, ours.num_sequences):
        with pytest.raises(IndexError):
            ours.batch(np.array([0, sample]), np.zeros(2, np.int64))


class Device:
    """What happens to a tensor on its way to a GPU, without one."""

    def __init__(self, monkeypatch):
        self.calls = []
        really = torch.Tensor.to

        def pin_memory(tensor):
            self.calls.append("pin")
            return tensor.clone()

        def to(tensor, device, *, non_blocking):
            assert (device, non_blocking) == (torch.device("cuda"), True)
            self.calls.append(tensor.dtype)
            return really(tensor, "cpu")

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "to", to)


def test_ids_go_to_a_device_as_int32_from_pinned_memory(monkeypatch):
    (batch,) = stream(30).micro_batches(np.array([1, 2]), np.array([0, 0]), 2)
    device = Device(monkeypatch)
    moved = batch.to(torch.device("cuda"))
    assert device.calls == ["pin"] * 3 + [torch.int32, torch.int64, torch.int64]
    assert moved.input_ids_BL.dtype == torch.int64
    assert moved.input_ids_BL.tolist() == batch.input_ids_BL.tolist()


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


def batches(size, batch_size, ranks=1, micro=None, rank=0, phases=None, skipped=()):
    """Batches over `size` sequences of 10; the default takes the whole batch at once."""
    phases = phases or (Phase(0, 100, 10, batch_size),)
    streams = {phase.sequence_length: stream(size * 8, phase.sequence_length) for phase in phases}
    orders = {
        length: SampleOrder(each.num_sequences, 5, length, block_sequences=4, window_blocks=3)
        for length, each in streams.items()
    }
    micro = batch_size // ranks if micro is None else micro
    skip_list = SkipList(tuple(skipped))
    return TrainBatches(streams, orders, TrainSchedule(phases), micro, ranks, rank, skip_list)


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
    assert (ours.batch_size_at(3), ours.epochs_at(3)) == (8, 24 / 13)


def test_a_batch_larger_than_the_data_takes_several_epochs():
    names = identities(batches(3, 16).at_step(0))
    assert len(set(names)) == 16
    assert {second >> 8 for _, second in names} == {0, 1, 2, 3, 4, 5}


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    ours = batches(29, 8)
    first = ours.at_step(5)[0].input_ids_BL
    ours.at_step(0)
    assert torch.equal(ours.at_step(5)[0].input_ids_BL, first)


# Lengths 6 (twice as many sequences), 10 and 6 again, with batches of 4, 8 and 2.
PHASES = (Phase(0, 3, 6, 4), Phase(3, 5, 10, 8), Phase(5, 7, 6, 2), Phase(7, 100, 10, 8))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 1), (1, 1)])
def test_phases_cut_the_same_samples_for_any_world(ranks, micro):
    whole = batches(13, 8, phases=PHASES, micro=2)
    for step in range(10):
        phase = whole.schedule.phase_at(step)
        parts = [
            batches(13, 8, ranks, micro, rank, phases=PHASES).at_step(step) for rank in range(ranks)
        ]
        assert {len(part) for part in parts} == {phase.train_batch_size // (ranks * micro)}
        shapes = {batch.input_ids_BL.shape for part in parts for batch in part}
        assert shapes == {(micro, phase.sequence_length)}
        interleaved = [identities([part[k]]) for k in range(len(parts[0])) for part in parts]
        assert [*chain(*interleaved)] == identities(whole.at_step(step))


def test_each_length_walks_through_its_own_epochs():
    ours = batches(13, 8, phases=PHASES, micro=2)
    seen = {6: [], 10: []}
    for step in range(10):
        seen[ours.schedule.phase_at(step).sequence_length] += identities(ours.at_step(step))
    for length, names in seen.items():
        size = ours.streams[length].num_sequences
        order = ours.orders[length].samples(np.arange(len(names), dtype=np.int64))
        assert names == [
            sample_words(e, s) for e, s in zip(*map(np.ndarray.tolist, order), strict=True)
        ]
        assert len(set(names)) == len(names)
        assert len(names) > size or length == 6
    assert (len(seen[6]), len(seen[10])) == (16, 40)
    assert ours.epochs_at(10) == pytest.approx(16 / 26 + 40 / 13)
    assert ours.epochs_at(4) == pytest.approx(12 / 26 + 8 / 13)
    assert [ours.batch_size_at(step) for step in (2, 3, 6, 7)] == [4, 8, 2, 8]


SKIPPED = (
    SkippedWindow(6, 5, 9),
    SkippedWindow(10, 0, 3),
    SkippedWindow(10, 12, 13),
    SkippedWindow(10, 2, 8),
)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 1), (1, 1)])
def test_what_is_left_out_is_passed_over_by_any_world(ranks, micro):
    whole = batches(13, 8, phases=PHASES, micro=2, skipped=SKIPPED)
    seen = {6: [], 10: []}
    for step in range(10):
        expected = identities(whole.at_step(step))
        seen[whole.schedule.phase_at(step).sequence_length] += expected
        ours = [
            batches(13, 8, ranks, micro, rank, phases=PHASES, skipped=SKIPPED)
            for rank in range(ranks)
        ]
        parts = [each.at_step(step) for each in ours]
        interleaved = [identities([part[k]]) for k in range(len(parts[0])) for part in parts]
        assert [*chain(*interleaved)] == expected
        for rank, part in enumerate(parts):
            for each in ours:  # any rank can name the samples of all
                named = zip(*map(np.ndarray.tolist, each.samples_at(step, rank)), strict=True)
                assert [sample_words(*pair) for pair in named] == [*chain(*[identities(part)])]
    left_out = {6: {5, 6, 7, 8}, 10: {*range(8), 12}}
    for length, names in seen.items():
        kept = [p for p in range(60) if p not in left_out[length]][: len(names)]
        order = whole.orders[length].samples(np.array(kept))
        assert names == [sample_words(*p) for p in zip(*map(np.ndarray.tolist, order), strict=True)]
    assert whole.epochs_at(0) == 0
    assert whole.epochs_at(3) == pytest.approx(16 / 26)
    assert whole.epochs_at(10) == pytest.approx(20 / 26 + 49 / 13)
    plain = batches(13, 8, phases=PHASES, micro=2)
    assert whole.tokens_before(10) == plain.tokens_before(10) == 16 * 6 + 40 * 10


def test_the_data_of_steps_becomes_windows_of_every_length_that_they_train_on():
    ours = batches(13, 8, phases=PHASES, micro=2)
    assert ours.windows_between(2, 2) == ()
    assert ours.windows_between(1, 3) == (SkippedWindow(6, 4, 12),)
    both = ours.windows_between(2, 5)
    assert both == (SkippedWindow(6, 8, 12), SkippedWindow(10, 0, 16))
    again = batches(13, 8, phases=PHASES, micro=2, skipped=both)
    for step in range(2):
        assert identities(again.at_step(step)) == identities(ours.at_step(step))
    for steps in ([2], [3, 4]):  # of one length each
        before, now = (
            {name for step in steps for name in identities(each.at_step(step))}
            for each in (ours, again)
        )
        assert not before & now
    # A second roll-back leaves out what came instead; the window holds the first one.
    assert again.windows_between(1, 4) == (SkippedWindow(6, 4, 16), SkippedWindow(10, 16, 24))


@pytest.mark.parametrize(
    ("sample", "tokens"), [(2, "tokens 16 to 23 of the split"), (3, "tokens 24 to 29 of the split")]
)
@pytest.mark.parametrize("error", [CorruptError("block 7 is damaged"), OSError(5, "broken")])
def test_an_error_of_reading_names_the_sample_and_its_tokens(error, sample, tokens):
    class Damaged(Tokens):
        def read(self, split, start, end):
            if start >= 16:
                raise error
            return super().read(split, start, end)

    with pytest.raises(type(error)) as caught:
        SequenceStream(Damaged(30), "train", 10).batch(np.array([0, sample]), np.array([1, 1]))
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert str(error) in told
    assert f"train sample {sample}, {tokens}" in told


def test_the_configuration_orders_the_batches():
    """The phases, order and rank of a run come from its configuration and plan."""
    demo = load_run_config("demo", ["data.block_sequences=4", "data.window_blocks=3", "run.seed=5"])
    phase = {"until_step": 3, "sequence_length": 16, "train_batch_size": 4}
    document = demo.model_dump()
    document["schedule"]["phases"] = [phase]
    config = type(demo).model_validate(document)
    lengths = config.sequence_lengths
    assert lengths == (16, demo.data.sequence_length)
    streams = {length: stream(9000, length) for length in lengths}
    ours = train_batches(config, BatchPlan(2, 2, 4, 16), streams, rank=1)
    assert ours.orders[16] == SampleOrder(streams[16].num_sequences, 5, 16, 4, 3)
    assert [len(ours.at_step(step)) for step in (0, 2, 3)] == [1, 1, 4]
    assert ours.at_step(3)[0].input_ids_BL.shape == (2, demo.data.sequence_length)
    other = train_batches(config, BatchPlan(2, 2, 4, 16), streams, rank=0)
    assert not set(identities(ours.at_step(3))) & set(identities(other.at_step(3)))
    window = SkipList((SkippedWindow(16, 0, 4),))
    skipping = train_batches(config, BatchPlan(2, 2, 4, 16), streams, rank=1, skip_list=window)
    assert identities(skipping.at_step(0)) == identities(ours.at_step(1))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_heldout_batches(count, ranks, limit):
    chosen = np.arange(min(count, limit), dtype=np.int64)
    shares = [list(heldout_batches(stream(count * 8), chosen, 3, ranks, r)) for r in range(ranks)]
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
