"""The watchdog of one rank: limits, what it counts, and how a process without peers ends."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import watchdog as module
from pipeline.config import SafetySection
from pipeline.hang_report import Beat
from pipeline.runtime import World
from pipeline.watchdog import RECENT_STEPS, Watchdog
from tests.worlds import ROOT, environment

TIMEOUT_SECONDS = 120
ALONE = World(0, 0, 1, torch.device("cpu"))


def watchdog(folder, **keys):
    return Watchdog(folder, ALONE, SafetySection(**keys))


def test_the_limit_follows_the_slowest_recent_step(tmp_path):
    dog = watchdog(tmp_path)
    assert dog.limit_seconds == 600, "start-up"
    dog.step_ended(400.0)  # compiled
    assert dog.limit_seconds == 60
    dog.step_ended(11.0)
    assert dog.limit_seconds == 60
    dog.step_ended(13.0)
    dog.step_ended(2.0)
    assert dog.limit_seconds == 65
    for _ in range(RECENT_STEPS):
        dog.step_ended(1.0)
    assert dog.limit_seconds == 60, "slow steps are forgotten"


def test_limits_can_be_configured(tmp_path):
    dog = watchdog(tmp_path, hang_seconds=7, hang_step_factor=2, startup_seconds=30)
    assert dog.limit_seconds == 30
    dog.step_ended(1.0)
    dog.step_ended(5.0)
    assert dog.limit_seconds == 10


def test_the_promise_of_90_seconds(tmp_path):
    """The longest way from the last sign of progress to the exit, at default settings."""
    dog = watchdog(tmp_path)
    waits = dog._tick_seconds + dog._watch_seconds + dog._beat_seconds / 4 + dog._beat_seconds / 2
    assert 60 + waits + module._SAYING_SECONDS < 85
    assert 60 + dog._tick_seconds + module.FILE_SYSTEM_SECONDS + module._SAYING_SECONDS < 85
    assert dog._watch_seconds > 2 * dog._beat_seconds, "a living rank writes twice in that time"


def test_marks_are_counted_within_their_step(tmp_path):
    dog = watchdog(tmp_path)
    for phase, step in [("start", 0), ("step", 4), ("step", 4), ("step", 5), ("evaluate", 5)]:
        dog.mark(phase, step)
    beat = dog._own_beat()
    assert (beat.phase, beat.step, beat.marks) == ("evaluate", 5, 2)


class Clock:
    """A clock that goes on by one tick each time somebody looks."""

    def __init__(self, tick_seconds):
        self.now, self.tick_seconds, self.looks = 0.0, tick_seconds, 0

    def monotonic(self):
        self.looks += 1
        self.now += self.tick_seconds
        return self.now


class TicksLeft:
    """Ends the loop of the watching thread after some ticks; half-way something happens."""

    def __init__(self, ticks, happens):
        self.ticks, self.at_tick, self.happens = ticks, ticks // 2, happens

    def wait(self, _seconds):
        self.ticks -= 1
        if self.ticks == self.at_tick:
            self.happens()
        return self.ticks < 0


def stalled_after(dog, monkeypatch, ticks, happens=lambda _clock: None):
    """Seconds without progress that a watchdog has counted after some ticks of its own clock."""
    clock = Clock(dog._tick_seconds)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    dog._ended = TicksLeft(ticks, lambda: happens(clock))
    dog._keep_time()
    return dog._stalled_seconds


def test_time_without_a_mark_is_counted(tmp_path, monkeypatch):
    dog = watchdog(tmp_path)
    assert stalled_after(dog, monkeypatch, 20) == pytest.approx(20)
    assert stalled_after(dog, monkeypatch, 20, lambda _: dog.mark("step", 1)) == 10
    assert dog._marks_at_expiry is None


def test_a_suspended_process_does_not_hang(tmp_path, monkeypatch):
    """As after SIGSTOP and SIGCONT, or the night that a laptop was closed."""
    dog = watchdog(tmp_path)
    dog.step_ended(1.0)

    def jump(clock):
        clock.now += 30_000

    assert 20 < stalled_after(dog, monkeypatch, 20, jump) <= 25
    assert dog._marks_at_expiry is None


def test_expiry_ends_with_the_next_mark(tmp_path, monkeypatch):
    dog = watchdog(tmp_path)
    dog.step_ended(1.0)
    stalled_after(dog, monkeypatch, 70)
    assert dog._marks_at_expiry == 0
    assert dog._look_now.is_set()
    stalled_after(dog, monkeypatch, 4, lambda _: dog.mark("step", 1))
    assert dog._marks_at_expiry is None


@pytest.mark.parametrize(("ticks", "ends"), [(75, False), (80, True)])
def test_a_file_server_that_does_not_answer_is_a_hang(tmp_path, monkeypatch, ticks, ends):
    exits = []
    monkeypatch.setattr(module.os, "_exit", exits.append)
    dog = watchdog(tmp_path)
    dog._answered_seconds = 0.0
    dog.step_ended(1.0)
    stalled_after(dog, monkeypatch, ticks)
    assert set(exits) == ({86} if ends else set())


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.ESTALE])
def test_beats_that_cannot_be_written_are_left_out(tmp_path, monkeypatch, problem):
    def fail(_beat, _folder):
        raise OSError(problem, os.strerror(problem))

    dog = watchdog(tmp_path)
    monkeypatch.setattr(Beat, "write", fail)
    dog._write_beat()
    assert os.strerror(problem) in dog._beat_problem
    monkeypatch.undo()
    dog._write_beat()
    assert dog._beat_problem == ""
    assert Beat.read(tmp_path / "heartbeats", 0) is not None


def test_a_run_folder_that_was_removed_is_not_made_again(tmp_path):
    dog = watchdog(tmp_path / "run")
    dog._write_beat()
    for path in (tmp_path / "run" / "heartbeats").iterdir():
        path.unlink()
    (tmp_path / "run" / "heartbeats").rmdir()
    (tmp_path / "run").rmdir()
    dog._write_beat()
    assert list(tmp_path.iterdir()) == []


def test_stopping_leaves_the_last_beat_and_no_empty_file(tmp_path):
    dog = watchdog(tmp_path)
    dog.start()
    dog.join(None)
    dog.mark("step", 3)
    deadline = time.monotonic() + 60
    while Beat.read(tmp_path / "heartbeats", 0) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "logs" / "stacks-rank-00000.txt").exists()
    dog.stop()
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["rank-00000.json"]
    beat = Beat.read(tmp_path / "heartbeats", 0)
    assert (beat.phase, beat.step, beat.start) == ("step", 3, dog._start)


# Processes that hang alone, all at once, forked by one driver after its imports.


def hang(folder, how):
    """One process without peers, in which nothing happens any more."""
    os.dup2(os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT), 2)
    dog = Watchdog(folder, ALONE, SafetySection(hang_seconds=1.0, startup_seconds=2.0))
    if how == "full disk":
        Beat.write = fail_for_ever
    dog.start()
    dog.join(None)
    for step in range(2):
        dog.mark("step", step)
        dog.step_ended(0.01)
    dog.mark("save", 2)
    if how == "leaving":
        # What happens where peers end first: training raises, and the process wants to leave.
        while dog._marks_at_expiry is None:
            time.sleep(0.01)
        dog.stop()
        os._exit(1)
    time.sleep(TIMEOUT_SECONDS)


def fail_for_ever(_beat, _folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def driver_main(folder):
    fork = multiprocessing.get_context("fork")
    ways = ["alone", "full disk", "leaving"]
    processes = []
    for way in ways:
        (Path(folder) / way).mkdir()
        processes.append(fork.Process(target=hang, args=(Path(folder) / way, way)))
        processes[-1].start()
    for process in processes:
        process.join(TIMEOUT_SECONDS / 2)
        process.kill()
    print(json.dumps([process.exitcode for process in processes]))


def test_a_process_that_hangs_alone_ends(tmp_path):
    code = (
        "import sys; from tests.unit.pipeline.test_watchdog import driver_main as d; d(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [86, 86, 86]
    states = {
        way: json.loads((tmp_path / way / "state.json").read_text())
        for way in ("alone", "full disk", "leaving")
    }
    assert {state["status"] for state in states.values()} == {"hang"}
    assert 'in phase "save" of step 2' in states["alone"]["reason"]
    assert "which rank is behind is not known, no beats" in states["full disk"]["reason"]
    assert "No space left on device" in states["full disk"]["reason"]
    stacks = (tmp_path / "alone" / "logs" / "stacks-rank-00000.txt").read_text()
    assert "in hang" in stacks
    printed = (tmp_path / "alone" / "printed.txt").read_text()
    assert states["alone"]["reason"] in printed
    assert f"stacks of all threads: {tmp_path / 'alone' / 'logs'}/stacks-rank-*.txt" in printed
    assert "exit code 86" in printed
