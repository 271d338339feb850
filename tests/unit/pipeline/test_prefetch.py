"""The thread that reads ahead: order, depth, and an error that stays."""

import threading
import time

import pytest

from data_prep.errors import CorruptError
from pipeline.prefetch import Prefetcher


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


def test_the_prefetcher_gives_every_step_in_order():
    prefetcher = Prefetcher(Counting(), 3, 9, depth=2)
    try:
        assert [prefetcher.next() for _ in range(3, 9)] == [[step] for step in range(3, 9)]
    finally:
        prefetcher.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_the_prefetcher_carries_an_error_to_its_step():
    prefetcher = Prefetcher(Counting(fails_at=2), 0, 10)
    try:
        assert [prefetcher.next(), prefetcher.next()] == [[0], [1]]
        errors = []
        for _ in range(3):  # again and again: nothing is read behind it, and nobody waits for it
            with pytest.raises(CorruptError, match="step 2 is damaged") as caught:
                prefetcher.next()
            errors.append(caught.value)
        assert errors[0] is errors[1] is errors[2]
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
