"""Faults that the matrix does not list: what users do to a run folder, and lost terminals."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from pipeline.commit import list_commits, verify_commit
from tests.faults.fingerprint import fingerprint, last_step
from tests.faults.harness import Setup
from tests.worlds import ROOT, environment

pytestmark = pytest.mark.distributed


def test_torn_row(lab, tmp_path):
    setup, run = Setup(), tmp_path / "run"
    lab.copy_reference(setup, run, 8)
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:10]) + whole[10][:30])
    lab.finish(run, setup)


def test_requests_by_file(lab, tmp_path):
    setup, run = Setup(2), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:*:5-7:sleep:1.1") as running:
        running.until_begun(5)
        (run / "save-now").touch()
        running.until_begun(8)
        (run / "stop").touch()
        outcome = running.wait()
    if set(outcome.codes) == {0}:  # it looks once a second, and the last steps are quick
        assert last_step(run) == 12
    else:
        assert set(outcome.codes) == {75}, outcome.output
        assert "stop" in outcome.status["reason"]
    steps = {commit.step for commit in list_commits(run / "checkpoints")}
    assert steps & {5, 6, 7}, steps
    assert not (run / "save-now").exists()
    lab.finish(run, setup)


@pytest.mark.faults
def test_run_folder_is_removed(lab, tmp_path):
    setup, run = Setup(2), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:0:6:sleep:2") as running:
        running.until_begun(6)
        shutil.rmtree(run)
        outcome = running.wait()
    # It may end with an error or begin the folder anew; what is there then must be whole.
    assert set(outcome.codes) in ({0}, {2}), outcome.output
    for commit in list_commits(run / "checkpoints"):
        verify_commit(commit)
    shutil.rmtree(run, ignore_errors=True)
    for path in tmp_path.glob("run.samples-*"):
        path.unlink()
    lab.finish(run, setup)


@pytest.mark.faults
def test_terminal_goes_away(lab, tmp_path, monkeypatch):
    setup, run = Setup(), tmp_path / "run"
    reference = lab.reference(setup)
    command = lab.command_line(run, setup)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT
    )
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + 100
        while last_step(run) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.stdout.close()  # as `| head` does
        assert process.wait(100) == 0
    finally:
        process.kill()
        process.wait()
    assert not fingerprint(run).differences(reference)


@pytest.mark.faults
def test_hang_up(lab, tmp_path):
    """A closed terminal window is a request to stop like any other."""
    setup, run = Setup(), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:0:6:sleep:1") as running:
        running.until_begun(6)
        running.signal(signal.SIGHUP)
        outcome = running.wait()
    assert outcome.codes == [75], outcome.output
    lab.finish(run, setup)


@pytest.mark.faults
def test_resume_of_a_finished_run_changes_nothing(lab, tmp_path):
    setup, run = Setup(2), tmp_path / "run"
    lab.copy_reference(setup, run, 12)
    before = fingerprint(run)
    outcome = lab.run(run, setup)
    assert outcome.codes == [0, 0], outcome.output
    assert "nothing left to do" in outcome.output
    assert not fingerprint(run).differences(before)
    assert json.loads((run / "state.json").read_text())["status"] == "done"


@pytest.mark.faults
def test_commits_cannot_be_read_by_this_user(lab, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    setup, run = Setup(), tmp_path / "run"
    lab.copy_reference(setup, run, 8)
    newest = run / "checkpoints" / "step-00000008" / "generator" / "rank-00000.safetensors"
    newest.chmod(0)
    lab.finish(run, setup)
