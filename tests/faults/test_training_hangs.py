"""Ranks that hang, in every way and place; slow ranks; a reading thread that breaks."""

import json
import re
import time

import pytest

from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed

SHORT = ("safety.hang_seconds=5", "safety.hang_step_factor=2", "safety.startup_seconds=20")


def assert_hang(running, culprit, seconds):
    """All ranks that can exit with 86, the culprit is named, and stacks are there."""
    # The culprit may be unable to do anything; a launcher or the cluster kills it then.
    peers = [rank for rank in range(len(running.pids())) if rank != culprit]
    running.until_codes(peers or [culprit], seconds)
    codes = running.codes()
    assert all(codes[rank] == 86 for rank in peers or [culprit]), (codes, running.output())
    state = json.loads((running.folder / "state.json").read_text())
    assert state["status"] == "hang", state
    assert re.search(rf"\branks? {culprit}\b", state["reason"]), state
    stacks = sorted(path.name for path in (running.folder / "logs").glob("stacks-rank-*.txt"))
    assert len(stacks) >= max(1, len(peers))
    return state["reason"]


@pytest.mark.row(21)
@pytest.mark.parametrize(
    ("ranks", "culprit", "fault"),
    [
        (2, 1, "step.generator_update:1:5:hang"),
        pytest.param(4, 2, "step.discriminator_update:2:5:stop", marks=pytest.mark.faults),
        pytest.param(2, 0, "step.begin:0:5:gil", marks=pytest.mark.faults),
        pytest.param(2, 1, "evaluate.batch:1:6:stop", marks=pytest.mark.faults),
        pytest.param(2, 1, "save.share:1:8:hang", marks=pytest.mark.faults),
        pytest.param(2, 0, "save.manifest:0:8:stop", marks=pytest.mark.faults),
        pytest.param(2, 1, "start.engines:1:0:stop", marks=pytest.mark.faults),
        pytest.param(2, 0, "data.read:0:9:hang", marks=pytest.mark.faults),
        pytest.param(1, 0, "step.begin:0:5:hang", marks=pytest.mark.faults),
    ],
)
def test_rank_hangs(ranks, culprit, fault, lab, tmp_path, note):
    with lab.start(tmp_path / "run", Setup(ranks), *SHORT, fault=fault) as running:
        reason = assert_hang(running, culprit, 60)
    lab.finish(tmp_path / "run", Setup(ranks))
    note(f"{fault} of {ranks} ranks", reason)


@pytest.mark.row(21)
@pytest.mark.faults
def test_rank_is_stopped_at_default_settings(lab, tmp_path, note):
    fault = "step.discriminator_update:2:8:stop"
    with lab.start(tmp_path / "run", Setup(4), fault=fault) as running:
        running.until_begun(8, rank=2)
        since = time.monotonic()
        reason = assert_hang(running, 2, 90)
        took = time.monotonic() - since
    lab.finish(tmp_path / "run", Setup(4))
    note("SIGSTOP to rank 2 of 4, default settings", f"86 after {took:.0f} s: {reason}")


@pytest.mark.row(22)
def test_slow_rank_is_reported(lab, tmp_path, note):
    setup = Setup(2, words=("safety.straggler_steps=4",))
    outcome = lab.run(tmp_path / "run", setup, fault="step.forward:1:*:sleep:0.2")
    assert outcome.codes == [0, 0], outcome.output
    (line,) = [line for line in outcome.output.splitlines() if "times as long" in line][:1]
    assert "rank 1 " in line
    assert not (tmp_path / "run" / "logs" / "stacks-rank-00001.txt").exists()
    note("0.2 s of sleep in every forward pass of rank 1", line)


@pytest.mark.row(23)
def test_reading_thread_raises(lab, tmp_path, note):
    setup = Setup(2)
    outcome = lab.run(tmp_path / "run", setup, fault="data.read:1:7:raise", seconds=60)
    assert 0 not in outcome.codes, outcome.output
    assert "injected at data.read" in outcome.logs
    assert "step 7" in outcome.logs, "which step's data it was"
    lab.finish(tmp_path / "run", setup)
    note("an exception in rank 1's reading thread", f"exit codes {outcome.codes}, no hang")


@pytest.mark.row(23)
@pytest.mark.parametrize("action", ["eio"])
def test_data_cannot_be_read(action, lab, tmp_path, note):
    outcome = lab.run(tmp_path / "run", Setup(), fault=f"data.read:0:7:{action}", seconds=60)
    assert outcome.codes[0] not in (0, 75, 86), outcome.output
    assert "Traceback" not in outcome.output
    assert "step 7" in outcome.logs
    lab.finish(tmp_path / "run", Setup())
    note("EIO while data is read", outcome.output.splitlines()[-1][:200])
