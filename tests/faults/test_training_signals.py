"""Requests to stop: to one rank, at every moment, twice. The run commits, ends 75 and goes on."""

import signal
import time

import pytest

from pipeline.commit import list_commits, verify_commit
from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed


def assert_stopped(outcome, reason="SIGTERM", code=75, also=()):
    """All ranks ended 75 behind a whole commit, and state.json says so."""
    assert set(outcome.codes) == {code}, outcome.output
    assert outcome.status["status"] == "stopped"
    assert outcome.status["reason"] in (reason, *also)
    step = outcome.status["step"]
    commits = list_commits(outcome.folder / "checkpoints")
    assert (commits[-1].step if commits else 0) == step
    for commit in commits:
        verify_commit(commit)
    return step


@pytest.mark.row(1)
@pytest.mark.parametrize(
    ("setup", "faults"),
    [
        pytest.param(
            Setup(2),
            (
                "step.begin:1:5:signal:SIGTERM",
                "step.discriminator_update:0:7:signal:SIGUSR1",
                "step.generator_update:1:9:signal:SIGTERM",
            ),
            id="every network",
        ),
        pytest.param(
            Setup(2, 3, "bf16"),
            ("step.begin:1:2:signal:SIGINT", "step.end:0:8:signal:SIGTERM"),
            id="stage 3",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_signal_to_one_rank_in_a_step(setup, faults, lab, tmp_path, note):
    steps = []
    for fault in faults:
        outcome = lab.run(tmp_path / "run", setup, fault=fault)
        # A rank that has been told by another knows no name.
        name = fault.rpartition(":")[2] if ":0:" in fault else "request"
        steps.append(assert_stopped(outcome, name))
        asked = int(fault.split(":")[2])
        assert asked <= steps[-1] <= asked + 1, "a whole step more than was needed"
    lab.finish(tmp_path / "run", setup)
    note(f"{len(faults)} signals, each to one rank of 2", f"75, commits of steps {steps}")


@pytest.mark.row(1)
@pytest.mark.faults
def test_signal_at_a_random_moment(lab, tmp_path, note):
    setup, run = Setup(2), tmp_path / "run"
    lab.reference(setup)
    with lab.start(run, setup, launcher="torchrun") as running:
        running.until_step(2)
        time.sleep(0.001 * (time.monotonic_ns() % 300))
        for process in running.everybody()[2:]:  # the launcher, rank 0, rank 1
            process.send_signal(signal.SIGUSR1)
        outcome = running.wait()
    # torchrun has no other code, and sends SIGTERM to who is still there when the first has ended.
    step = assert_stopped(outcome, "request", code=1, also=["SIGTERM"])
    assert "the same command resumes" in outcome.output
    lab.finish(run, setup)
    note("SIGUSR1 to rank 1 under torchrun", f"stopped and committed at step {step}")


@pytest.mark.row(2)
@pytest.mark.parametrize(
    ("ranks", "faults"),
    [
        (1, ("start.engines:0:0", "evaluate.batch:0:6", "save.manifest:0:8")),
        pytest.param(
            2,
            (
                "start.world:1:0",
                "start.data:0:0",
                "save.begin:1:4",
                "evaluate.batch:1:6",
                "save.share:1:8",
                "save.latest:0:10",
            ),
            marks=pytest.mark.faults,
        ),
    ],
)
def test_signal_outside_of_a_step(ranks, faults, lab, tmp_path, note):
    setup, run = Setup(ranks, words=("checkpoint.interval_steps=2",)), tmp_path / "run"
    steps = []
    for where in faults:
        outcome = lab.run(run, setup, fault=f"{where}:signal:SIGTERM")
        name = "SIGTERM" if ":0:" in where[:-1] else "request"
        steps.append(assert_stopped(outcome, name))
        assert not list((run / "checkpoints").glob("*.partial")), "a save was not finished"
    # A signal in a save is seen when the save is done: in the next step, or at its end.
    for where, step in zip(faults, steps, strict=True):
        asked = int(where.rpartition(":")[2])
        assert asked <= step <= asked + ("save" in where), where
    lab.finish(run, setup)
    note(f"SIGTERM at {', '.join(faults)}", f"75 at steps {steps}; saves were finished")


@pytest.mark.row(3)
def test_second_signal(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:0:6:sleep:60") as running:
        running.until_begun(6)
        running.signal(signal.SIGTERM)
        time.sleep(3.2)
        assert not running.ended(), running.output()
        second = time.monotonic()
        running.signal(signal.SIGINT)
        outcome = running.wait(20)
        took = time.monotonic() - second
    assert outcome.codes == [128 + signal.SIGINT], outcome.output
    assert [commit.step for commit in list_commits(run / "checkpoints")] == [4]
    lab.finish(run, setup)
    note("SIGTERM, 3.2 s later SIGINT, in a step of 60 s", f"ended {took:.1f} s later; step 4 kept")


@pytest.mark.row(3)
def test_two_signals_at_once_are_one_request(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:0:6:sleep:1") as running:
        running.until_begun(6)
        running.signal(signal.SIGINT)
        time.sleep(0.1)
        running.signal(signal.SIGTERM)
        outcome = running.wait()
    step = assert_stopped(outcome, "SIGINT")
    lab.finish(run, setup)
    note("SIGINT and SIGTERM 100 ms apart", f"one request: 75, commit of step {step}")
