"""The thread that reads ahead: order, depth, and whatever ends it."""

import threading
import time

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from data_prep.errors import CorruptError, UserError
from pipeline import faults
from pipeline.prefetch import Prefetcher
from tests.benchmarks.rounds import exhaust
from tests.engines import sequence_batch


class Counting:
    """Batches that note which steps were read, and fail at one."""

    rank = 1

    def __init__(self, fails_at=None, error=None):
        self.fails_at = fails_at
        self.error = error or CorruptError("a block is damaged")
        self.read = []

    def at_step(self, step):
        if step == self.fails_at:
            raise self.error
        self.read.append(step)
        return [step]

    def in_order(self, first_step, end_step):
        yield from map(self.at_step, range(first_step, end_step))

    def samples_at(self, step, rank):
        assert rank == self.rank
        return np.full(10, 3), np.arange(10) + 100 * step


def test_the_prefetcher_gives_every_step_in_order():
    prefetcher = Prefetcher(Counting(), 3, 9, depth=2)
    try:
        assert [prefetcher.next() for _ in range(3, 9)] == [[step] for step in range(3, 9)]
    finally:
        prefetcher.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


class Transfers(TorchFunctionMode):
    """Writes down what is pinned and copied to a GPU, and copies nothing."""

    def __init__(self):
        super().__init__()
        self.pinned, self.copied = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if function is torch.Tensor.to and isinstance(args[1], torch.device):
            is_pinned = any(args[0] is each for each in self.pinned)
            self.copied.append((is_pinned, (kwargs or {}).get("non_blocking", False)))
            return args[0]
        return function(*args, **(kwargs or {}))


def test_a_batch_goes_to_a_gpu_from_pinned_memory_and_nobody_waits():
    with Transfers() as transfers:
        sequence_batch(range(4)).to(torch.device("cuda"))
    assert transfers.copied == [(True, True)] * 3
    with Transfers() as transfers:
        sequence_batch(range(4)).to(torch.device("cpu"))
    assert transfers.pinned == [], "a CPU fetches from any memory"


def test_the_thread_pins_what_a_gpu_fetches(monkeypatch):
    """On the rank's own device: a new thread of torch begins on the first."""
    devices = []

    class Batch(int):
        def pinned(self):
            devices.append(threading.current_thread().name)
            return f"pinned {self}"

    class Batches(Counting):
        def at_step(self, step):
            return [Batch(step), Batch(step + 100)]

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(str(device)))
    prefetcher = Prefetcher(Batches(), 3, 5, device=torch.device("cuda", 1))
    try:
        assert prefetcher.next() == ["pinned 3", "pinned 103"]
        assert prefetcher.next() == ["pinned 4", "pinned 104"]
    finally:
        prefetcher.close()
    assert devices == ["cuda:1"] + ["prefetch"] * 4


NAMED = "samples 200 of epoch 3, 201 of epoch 3, .*, 207 of epoch 3 and 2 more"


def test_the_prefetcher_carries_an_error_to_its_step():
    prefetcher = Prefetcher(Counting(fails_at=2), 0, 10)
    try:
        assert [prefetcher.next(), prefetcher.next()] == [[0], [1]]
        errors = []
        for _ in range(3):  # again and again: nothing is read behind it, and nobody waits for it
            with pytest.raises(CorruptError, match=f"damaged; while reading step 2.*{NAMED}") as e:
                prefetcher.next()
            errors.append(e.value)
        assert errors[0] is errors[1] is errors[2]
    finally:
        prefetcher.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("wrong"), UserError),
        (MemoryError("too much"), MemoryError),
        (ZeroDivisionError("nobody expects it"), ZeroDivisionError),
        (OSError(5, "Input/output error"), CorruptError),
        (SystemExit(0), RuntimeError),
        (KeyboardInterrupt(), RuntimeError),
        (GeneratorExit(), RuntimeError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_whatever_ends_the_thread_is_raised_with_its_step(error, kind):
    prefetcher = Prefetcher(Counting(2, error), 0, 10)
    try:
        prefetcher.next()
        prefetcher.next()
        started = time.monotonic()
        with pytest.raises(kind) as caught:
            prefetcher.next()
        assert time.monotonic() - started < 10
    finally:
        prefetcher.close()
    assert type(caught.value) is kind
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "while reading step 2 (samples 200 of epoch 3" in told
    assert str(error) in told


def test_samples_that_cannot_be_named_hide_no_error():
    class Broken(Counting):
        def samples_at(self, step, rank):
            raise ValueError("the order is broken too")

    prefetcher = Prefetcher(Broken(0), 0, 10)
    try:
        with pytest.raises(CorruptError, match=r"^a block is damaged; while reading step 0$"):
            prefetcher.next()
    finally:
        prefetcher.close()


def test_nobody_waits_behind_the_last_step():
    prefetcher = Prefetcher(Counting(), 0, 1)
    try:
        assert prefetcher.next() == [0]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nothing is read for step 1"):
                prefetcher.next()
    finally:
        prefetcher.close()


@pytest.mark.parametrize(("action", "kind"), [("eio", CorruptError), ("raise", RuntimeError)])
def test_a_fault_in_the_thread_is_one_of_its_step(action, kind):
    faults.configure(f"data.read:1:2:{action}", rank=1)
    prefetcher = Prefetcher(Counting(), 0, 10)
    try:
        assert [prefetcher.next(), prefetcher.next()] == [[0], [1]]
        with pytest.raises(kind, match=r"injected at data\.read") as caught:
            prefetcher.next()
    finally:
        faults.configure("", rank=0)
        prefetcher.close()
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "step 2" in told


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


@pytest.mark.parametrize("ending", ["closed", "unreadable", "not pinned"])
def test_what_reads_ahead_for_the_thread_ends_with_it(monkeypatch, ending):
    ended_by = []

    class Ending(Counting):
        def in_order(self, first_step, end_step):
            try:
                yield from super().in_order(first_step, end_step)
            finally:
                ended_by.append(threading.current_thread().name)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    device = torch.device("cuda" if ending == "not pinned" else "cpu")
    fails_at = 1 if ending == "unreadable" else None
    prefetcher = Prefetcher(Ending(fails_at), 0, 1000, depth=2, device=device)
    if ending == "closed":
        prefetcher.next()
    else:
        with pytest.raises((CorruptError, AttributeError)):
            exhaust(prefetcher.next() for _ in range(3))
    prefetcher.close()
    assert ended_by == ["prefetch"]
