"""Requests to stop and to commit: signals, files and the clock."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from pipeline import stop_signal
from pipeline.resources import Kind, Shortage
from pipeline.stop_signal import Requests, StopSignal

ROOT = Path(__file__).parents[3]


def test_a_signal_is_noted_and_agreed():
    stop = StopSignal(None)
    assert not stop.received
    assert not stop.agreed()
    stop._handle(signal.SIGUSR1, None)
    assert stop.received
    assert stop.agreed()
    assert stop.name == "SIGUSR1"


SLEEPER = """
import sys, time
from pipeline.stop_signal import StopSignal
stop = StopSignal(None)
stop.install()
print("ready", flush=True)
while True:
    time.sleep(0.02)
    if stop.received:
        print(stop.name, flush=True)
        time.sleep(60)
"""


@contextlib.contextmanager
def sleeper(*before):
    """A process that has taken over the signals and says which one came first."""
    with subprocess.Popen(
        [*before, sys.executable, "-c", SLEEPER],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_after_three_seconds_exits_at_once(number):
    with sleeper() as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        time.sleep(3.1)
        assert process.poll() is None, "the first one only sets a flag"
        process.send_signal(number)
        assert process.wait(timeout=10) == 128 + number


def test_a_closed_terminal_asks_to_stop():
    with sleeper() as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "SIGHUP\n"
        assert process.poll() is None


def test_nohup_is_obeyed():
    with sleeper("nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"


def test_signals_that_launchers_send_together_count_as_one():
    with sleeper() as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.2)
        assert process.poll() is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(stop_signal, "time", clock)
    return clock


def test_files_ask_once(clock, tmp_path):
    stop = StopSignal()
    stop.watch(tmp_path, 0)
    (tmp_path / "save-now").touch()
    assert stop.agreed_requests() == Requests(False, False), "looked at not more than once a second"
    clock.now += 1.0
    assert stop.agreed_requests() == Requests(stop=False, save=True)
    assert not list(tmp_path.iterdir())
    assert stop.agreed_requests().save, "until there was a commit"
    stop.saved()
    clock.now += 1.0
    assert not stop.agreed_requests().save
    (tmp_path / "stop").touch()
    clock.now += 1.0
    assert stop.agreed()
    assert str(tmp_path / "stop") in stop.name
    assert not list(tmp_path.iterdir()), "the next start must not stop at once"


def test_the_clock_asks_for_a_commit(clock, tmp_path):
    stop = StopSignal()
    stop.watch(tmp_path, 30.0)
    clock.now += 29.0
    assert not stop.agreed_requests().save
    clock.now += 1.0
    assert stop.agreed_requests() == Requests(stop=False, save=True)
    stop.saved()
    clock.now += 29.0
    assert not stop.agreed_requests().save


def test_nothing_is_asked_where_nobody_looks(clock, tmp_path):
    (tmp_path / "stop").touch()
    stop = StopSignal()
    clock.now += 60.0
    assert stop.agreed_requests() == Requests(False, False)
    assert (tmp_path / "stop").exists()


def test_a_lost_run_folder_ends_the_run(clock, tmp_path):
    reasons = iter(["", "run.folder x was taken over by host b"])
    stop = StopSignal()
    stop.watch(tmp_path, 0.0, lost=lambda: next(reasons))
    assert stop.agreed_requests() == Requests(False, False)
    with pytest.raises(UserError, match="taken over by host b"):
        stop.agreed()


def test_what_runs_out_on_one_rank_stops_all(monkeypatch):
    shortage = Shortage(Kind.GPU_MEMORY, 5, 123)
    here, there = StopSignal(), StopSignal()

    class Group:
        def size(self):
            return 2

    def all_reduce(flags, operation, group):
        """The other rank is asked at the same time."""
        theirs = torch.tensor([0, 0, 0, there._shortage_number])
        assert theirs.dtype == flags.dtype
        flags.copy_(torch.maximum(flags, theirs))

    monkeypatch.setattr(stop_signal.dist, "all_reduce", all_reduce)
    here._group = Group()
    assert here.agreed_requests() == Requests(stop=False, save=False)
    assert here.shortage is None
    there.run_short(shortage)
    assert here.agreed_requests() == Requests(stop=True, save=False)
    assert here.shortage == shortage
    assert here.name == shortage.reason


def test_a_signal_that_came_before_is_the_reason():
    stop = StopSignal(None)
    stop._handle(signal.SIGTERM, None)
    stop.run_short(Shortage(Kind.DISK, 0, 1))
    assert stop.agreed()
    assert stop.name == "SIGTERM"
