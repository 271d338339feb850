"""Two runs in one folder, clocks that jump, ranks that do not find each other."""

import json
import signal
import socket

import pytest

from tests.faults.fingerprint import fingerprint
from tests.faults.harness import Setup
from tests.worlds import free_port

pytestmark = pytest.mark.distributed

PATIENCE_SECONDS = 60


@pytest.mark.row(27)
def test_two_runs_in_one_folder(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:0:6:sleep:60") as first:
        first.until_begun(6)
        holder = first.pids()[0]
        refused = lab.run(run, setup)
        assert refused.codes == [2], refused.output
        said = refused.output.splitlines()[-1]
        assert f"process {holder} on host {socket.gethostname()}" in said
        assert "Traceback" not in refused.output
        first.signal(signal.SIGKILL)
        assert first.wait().codes == [-signal.SIGKILL]
    taken_over = lab.finish(run, setup)
    assert f"taken over from process {holder}" in taken_over.output
    note("a second start while the first runs", said.replace(str(run), "RUN"))
    note("SIGKILL to the holder, then a start", "taken over at once; bit for bit")


@pytest.mark.row(27)
def test_requeued_job_takes_over_from_another_host(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    lab.copy_reference(setup, run, 8)
    holder = {"host": "node-of-the-first-start", "pid": 1, "job_id": "4711", "boot_id": "x"}
    (run / ".holder.json").write_text(json.dumps(holder))
    outcome = lab.run(run, setup, variables={"SLURM_JOB_ID": "4711"})
    assert outcome.codes == [0], outcome.output
    assert "node-of-the-first-start" in outcome.output
    assert max(outcome.seconds) < 25, "another job would have watched its heartbeat for 30 s"
    note("a holder of the same job on a host that is gone", "taken over without waiting")


@pytest.mark.row(28)
def test_clock_jumps(lab, tmp_path, note):
    setup, run = Setup(words=("checkpoint.interval_seconds=3600",)), tmp_path / "run"
    day = 24 * 3600.0
    zone = {"TZ": "Pacific/Kiritimati"}
    outcome = lab.run(
        run, setup, fault="step.begin:0:6:kill", clock_jump_seconds=400 * day, variables=zone
    )
    assert outcome.codes == [-signal.SIGKILL], outcome.output
    zone = {"TZ": "Pacific/Pago_Pago"}
    outcome = lab.run(run, setup, clock_jump_seconds=-400 * day, variables=zone)
    assert outcome.codes == [0], outcome.output
    assert not fingerprint(run).differences(lab.reference(setup))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = [row["perf/tokens_per_second"] for row in lines if "perf/tokens_per_second" in row]
    assert rates
    assert all(0 < rate < 1e6 for rate in rates), rates
    assert "left 0:0" in outcome.output  # minutes, not years
    assert "-1 day" not in outcome.output
    note("a clock that jumps 400 days forth and back at every look", "same numbers, sane rates")


def only(rank, address="127.0.0.1", port=None):
    """Options of a world of two of which one rank starts."""
    variables = {"MASTER_ADDR": address, "MASTER_PORT": str(port or free_port())}
    return {"present": [rank], "variables": variables, "seconds": PATIENCE_SECONDS}


@pytest.mark.row(29)
@pytest.mark.faults
def test_port_is_taken(lab, tmp_path, note):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        outcome = lab.run(tmp_path / "run", Setup(2), **only(0, port=port))
    assert_clear(outcome, "127.0.0.1", str(port), "MASTER_PORT", "in use")
    note("MASTER_PORT belongs to another program", said_first(outcome, "error"))


@pytest.mark.row(29)
@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_never_starts(rank, lab, tmp_path, note):
    words = ("safety.startup_seconds=8",)
    outcome = lab.run(tmp_path / "run", Setup(2), *words, **only(rank))
    assert_clear(outcome, f"rank {1 - rank}")
    note(f"only rank {rank} of 2 is started", said_first(outcome, f"rank {1 - rank}"))


@pytest.mark.row(29)
@pytest.mark.faults
def test_wrong_address(lab, tmp_path, note):
    words = ("safety.startup_seconds=8",)
    options = only(1, address="no-such-host.invalid")
    outcome = lab.run(tmp_path / "run", Setup(2), *words, **options)
    assert_clear(outcome, "no-such-host.invalid", "rank 0")
    note("MASTER_ADDR names no host", said_first(outcome, "rank 0"))


def said_first(outcome, words):
    """The first line with some words, without paths of this test."""
    line = next(line for line in outcome.output.splitlines() if words in line)
    return line.replace(str(outcome.folder), "RUN")


def assert_clear(outcome, *parts):
    """It ended in time, with one error in words that names these."""
    assert outcome.codes[0] in (2, 86), outcome.output
    assert max(outcome.seconds) < PATIENCE_SECONDS
    assert "Traceback" not in outcome.output
    for part in parts:
        assert part in outcome.output
