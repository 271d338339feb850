"""Host memory, room and inodes that run out while training: real limits, and a commit in time."""

import contextlib
import os
import re
import secrets
import subprocess
from pathlib import Path

import pytest

from pipeline.commit import list_commits, verify_commit
from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
EVERY_STEP = "safety.resource_interval_seconds=0"
SLOW = "step.begin:0:5-99:sleep:0.2"


@contextlib.contextmanager
def small_disk(folder, options):
    """A file system with limits; skips where nothing may be mounted."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def memory_group(mebibytes):
    """A control group with a limit; skips where none can be made."""
    group = MEMORY_GROUPS / f"deberta-test-{secrets.token_hex(4)}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(mebibytes << 20))
    except OSError as error:
        pytest.skip(f"no memory control group of version 1 here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def assert_stopped_in_time(outcome, words):
    """All ranks ended with 75 behind a commit of the step that they had come to."""
    assert set(outcome.codes) == {75}, outcome.output
    assert outcome.status["status"] == "stopped"
    assert re.search(words, outcome.status["reason"]), outcome.status
    assert f"stopped: {outcome.status['reason']}; committed step" in outcome.output
    commit = list_commits(outcome.folder / "checkpoints")[-1]
    assert commit.step == outcome.status["step"] not in (0, 12)
    verify_commit(commit)
    assert "WARNING" in outcome.log()
    assert outcome.status["reason"].partition(": ")[2] in outcome.log()  # the cure
    return f"stopped at step {commit.step}: {outcome.status['reason']}"


@pytest.mark.row(33)
def test_host_memory_runs_out(lab, tmp_path, note):
    setup, run = Setup(2), tmp_path / "run"
    fault = "step.begin:0:3-99:leak:40"
    with (
        memory_group(400) as group,
        lab.start(run, setup, EVERY_STEP, "safety.min_host_memory_gib=4", fault=fault) as running,
    ):
        for pid in running.pids():
            (group / "cgroup.procs").write_text(str(pid))
        outcome = running.wait()
        failures = (group / "memory.failcnt").read_text().strip()
    seen = assert_stopped_in_time(outcome, r"^[\d,]+ MiB of memory are left on the host of rank 0")
    assert failures == "0", "the limit was reached"
    lab.finish(run, setup)
    note("rank 0 takes 40 MiB a step in a job of 400 MiB", seen)


@pytest.mark.row(33)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_room_runs_out(whole_folder, lab, tmp_path, note):
    setup, run = Setup(2), tmp_path / "run"
    disk = run if whole_folder else run / "checkpoints"
    words = (EVERY_STEP, "safety.min_free_disk_gib=0.008")
    with small_disk(disk, "size=48m"):
        with lab.start(run, setup, *words, fault=SLOW) as running:
            running.until_begun(6)
            # A commit keeps 16 MiB free; this leaves more than that and the commit itself.
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with (disk / "of-somebody-else").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - (22 << 20))
            outcome = running.wait()
        seen = assert_stopped_in_time(
            outcome, r"^[\d,]+ MiB are left on the disk of the run folder"
        )
        (disk / "of-somebody-else").unlink()
        lab.finish(run, setup)
    note("somebody else fills the disk up to 22 MiB", seen)


@pytest.mark.row(33)
def test_inodes_run_out(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    words = (EVERY_STEP, "safety.min_free_inodes=300")
    with small_disk(run, "size=64m,nr_inodes=600"):
        with lab.start(run, setup, *words, fault=SLOW) as running:
            running.until_begun(6)
            for number in range(os.statvfs(run).f_favail - 150):
                (run / f"of-somebody-else-{number}").touch()
            outcome = running.wait()
        seen = assert_stopped_in_time(
            outcome, r"^[\d,]+ more files fit on the disk of the run folder"
        )
        for path in run.glob("of-somebody-else-*"):
            path.unlink()
        lab.finish(run, setup)
    note("150 inodes are left", seen)
