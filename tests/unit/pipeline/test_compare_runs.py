"""Training the runs of a comparison: failures, resumption and requests to stop.

A stand-in is a Python line that takes a run's place on the command line.
"""

import json
import os
import signal
import sys
import threading
import time

import pytest
from filelock import FileLock

from data_prep.errors import EXIT_STOPPED, UserError
from pipeline.compare.plan import MARKER, CompareOptions, Plan
from pipeline.compare.planning import make_plan
from pipeline.compare.runs import Failure, StoppedError, is_done, train_all

SUCCEED = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
state = {"status": "done", "step": int(sys.argv[2]), "reason": ""}
(folder / "state.json").write_text(json.dumps(state))
"""
FAIL = "import sys; print('\\n'.join(map(str, range(40)))); print('no more memory'); sys.exit(3)"
WAIT_FOR_SIGNAL = f"""
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: (folder / "committed").touch() or sys.exit({EXIT_STOPPED}))
(folder / "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def plan(tmp_path, deepspeed_json, tiny_run, dataset_folder):
    """Two systems with two seeds."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(tiny_run().read_text())
    return make_plan(
        CompareOptions(
            (str(tmp_path / "a.toml"), str(tmp_path / "b.toml")),
            deepspeed_json(1, 4),
            dataset_folder,
            tmp_path / "output",
            seeds=2,
            words=("run.seed=1",),
        )
    )


def stand_in(monkeypatch, **codes):
    """Let runs be stand-ins: by name, or `default`."""

    def command(_plan, run):
        code = codes.get(run.name.replace("-", "_"), codes["default"])
        steps = run.system.config.schedule.max_steps
        return [sys.executable, "-c", code, str(run.folder), str(steps)]

    monkeypatch.setattr(Plan, "command", command)


def test_a_failure_is_named_and_stops_nothing(plan, monkeypatch):
    stand_in(monkeypatch, default=SUCCEED, a_seed_2=FAIL)
    said = []
    failures = train_all(plan, said.append)
    assert [is_done(run) for run in plan.runs] == [True, True, False, True]
    (failure,) = failures
    log = plan.output / "logs" / "a-seed-2.log"
    lines = failure.reason.splitlines()
    assert failure == Failure("a-seed-2", failure.reason)
    assert lines[0] == f"ended with 3; {log} ends with"
    assert lines[-1] == "no more memory"
    assert len(lines) == 16
    assert log.read_text().startswith(f"$ {sys.executable} -c ")
    assert said[0] == f"[1/4] a-seed-1: 12 steps, log {plan.output / 'logs' / 'a-seed-1.log'}"
    assert said[5].startswith("[3/4] a-seed-2: FAILED after ")
    assert json.loads((plan.output / MARKER).read_text())["dataset_fingerprint"]


def test_what_is_done_is_not_repeated(plan, monkeypatch):
    stand_in(monkeypatch, default=SUCCEED, a_seed_2=FAIL)
    train_all(plan, lambda _: None)
    stand_in(monkeypatch, default=SUCCEED)
    said = []
    assert train_all(plan, said.append) == []
    assert [(run.folder / "starts").read_text() for run in plan.runs] == ["x"] * 4
    assert said[:2] == ["[1/4] a-seed-1: done before", "[2/4] b-seed-1: done before"]
    assert said[2].startswith("[3/4] a-seed-2: 12 steps")
    state = plan.runs[0].folder / "state.json"
    for text in ('{"status": "done", "step": 11}', '{"status": "stopped", "step": 12}'):
        state.write_text(text)
        assert not is_done(plan.runs[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_reaches_the_trainer(plan, monkeypatch, number):
    stand_in(monkeypatch, default=WAIT_FOR_SIGNAL)
    folder = plan.runs[0].folder
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def ask():
        deadline = time.monotonic() + 30
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    asker = threading.Thread(target=ask)
    asker.start()
    with pytest.raises(StoppedError, match=r"stopped in a-seed-1; the same command goes on") as end:
        train_all(plan, lambda _: None)
    asker.join()
    assert end.value.exit_code == EXIT_STOPPED
    assert (folder / "committed").exists()
    assert not plan.runs[1].folder.exists(), "no other run begins"
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_a_trainer_that_was_stopped_alone_stops_the_comparison(plan, monkeypatch):
    stand_in(monkeypatch, default=f"import sys; sys.exit({EXIT_STOPPED})")
    with pytest.raises(StoppedError):
        train_all(plan, lambda _: None)


def test_one_comparison_in_a_folder(plan, monkeypatch):
    stand_in(monkeypatch, default=SUCCEED)
    plan.output.mkdir()
    with (
        FileLock(plan.output / ".lock"),
        pytest.raises(UserError, match=r"is in use by another `deberta compare`: wait for it, or"),
    ):
        train_all(plan, lambda _: None)
    assert train_all(plan, lambda _: None) == []
