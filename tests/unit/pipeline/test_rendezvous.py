"""A process that waits for other ranks hears a request to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_prep.errors import EXIT_STOPPED
from pipeline import rendezvous
from pipeline.runtime import World
from tests.worlds import ROOT, environment

WORLD = World(0, 0, 2, "cpu")


@pytest.fixture
def handled():
    """A handler as training has it; the test's process must survive the signal."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGUSR1, before)


def meet(monkeypatch, start, *, is_asked_to_stop=False, patience=60.0):
    """What `meet_other_ranks` returns, and how often it wanted to leave."""
    left = threading.Event()
    monkeypatch.setattr(rendezvous, "start_world", lambda _, **__: start(left))
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", patience)
    group = rendezvous.meet_other_ranks(WORLD, is_asked_to_stop=is_asked_to_stop, leave=left.set)
    return group, left.is_set()


def threads():
    return {thread.name for thread in threading.enumerate()}


def test_ranks_that_meet_stay(monkeypatch, handled):
    """Also where a signal came: all of them agree about it then."""

    def start(_):
        os.kill(os.getpid(), signal.SIGUSR1)
        return "group"

    assert meet(monkeypatch, start) == ("group", False)
    assert handled == [signal.SIGUSR1]
    assert signal.set_wakeup_fd(-1) == -1
    assert "rendezvous" not in threads()


@pytest.mark.parametrize("is_asked_to_stop", [False, True])
def test_a_rank_that_waits_in_vain_leaves(is_asked_to_stop, monkeypatch, handled):
    def start(left):
        if not is_asked_to_stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert left.wait(30)

    assert meet(monkeypatch, start, is_asked_to_stop=is_asked_to_stop, patience=0.01)[1]


def test_what_goes_wrong_in_between_is_passed_on(monkeypatch):
    def start(_):
        raise ConnectionError("no such host")

    with pytest.raises(ConnectionError, match="no such host"):
        meet(monkeypatch, start)
    assert "rendezvous" not in threads()


def test_a_first_rank_without_peers(dataset_folder, tiny_run, deepspeed_json, tmp_path):
    """Torch would wait for half an hour, and hear nothing."""
    run = tmp_path / "run"
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "pipeline.train", "--config", tiny_run()]
    command += ["--deepspeed_config", deepspeed_json(), f"data.path={dataset_folder}"]
    process = subprocess.Popen(
        [str(word) for word in (*command, f"run.folder={run}")],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment(), **launcher, "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / ".holder.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_STOPPED
    finally:
        process.kill()
        _, errors = process.communicate()
    assert errors == ""
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["step"]) == ("stopped", 0)
    assert state["reason"] == "a signal, before all ranks were there"


def test_a_signal_before_the_first_step(dataset_folder, tiny_run, deepspeed_json, tmp_path):
    """Nothing was trained: nothing is committed, and the same command starts the run."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipeline.train", "--config", tiny_run()]
    command += ["--deepspeed_config", deepspeed_json(), f"data.path={dataset_folder}"]
    done = subprocess.run(
        [str(word) for word in (*command, f"run.folder={run}")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(), "DEBERTA_FAULT": "start.engines:0:0:signal:SIGTERM"},
        timeout=200,
    )
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert done.stderr == "stopped on request; before the first step; the same command resumes\n"
    state = json.loads((run / "state.json").read_text())
    assert state == {"status": "stopped", "step": 0, "reason": "SIGTERM"}
    assert list((run / "checkpoints").iterdir()) == []
