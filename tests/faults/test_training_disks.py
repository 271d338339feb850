"""A full, broken or read-only disk in a save: said with path and bytes, and survived."""

import contextlib
import re
import resource
import subprocess

import pytest

from pipeline.commit import list_commits, verify_commit
from pipeline.commit_writer import SPARE_BYTES
from tests.faults.harness import Setup

pytestmark = pytest.mark.distributed


def tail(text, run):
    """The last line, without paths of this test."""
    return text.splitlines()[-1].replace(str(run), "RUN")


@pytest.mark.row(7)
@pytest.mark.parametrize(
    "setup", [Setup(), pytest.param(Setup(2, 3, "bf16"), marks=pytest.mark.faults)]
)
def test_disk_full_in_a_save(setup, lab, tmp_path, note):
    last = setup.ranks - 1
    outcome = lab.run(tmp_path / "run", setup, fault=f"save.share:{last}:8:enospc")
    assert set(outcome.codes) == {0}, outcome.output
    folder = tmp_path / "run" / "checkpoints"
    assert f"rank {last}" in outcome.logs
    assert "No space left on device" in outcome.logs
    assert str(folder) in outcome.logs
    assert [c.step for c in list_commits(folder)] == [4, 12], "step 8 was not left out"
    assert not list(folder.glob("*.partial"))
    lab.finish(tmp_path / "run", setup)
    note(f"ENOSPC on rank {last} in every attempt of step 8", "went on; next commit; bit for bit")


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of so many kilobytes; skips where nothing may be mounted."""
    folder.mkdir(parents=True)
    size = f"size={kilobytes}k"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.row(7)
@pytest.mark.faults
def test_small_disk(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    bytes_of_a_commit = sum(
        path.stat().st_size
        for path in (lab.reference_folder(setup) / "checkpoints" / "step-00000012").rglob("*")
    )
    # What a commit leaves free for others, and room for one and a half.
    kilobytes = (SPARE_BYTES + bytes_of_a_commit * 8 // 5) >> 10
    with small_disk(run / "checkpoints", kilobytes):
        outcome = lab.run(run, setup)
        # Step 4 fits; 8 and 12 do not, and 12 is the last. None of them was begun.
        assert outcome.codes == [2], outcome.output
        (commit,) = list_commits(run / "checkpoints")
        assert commit.step == 4
        verify_commit(commit)
        said = outcome.output.splitlines()[-1]
        assert str(run / "checkpoints") in said, outcome.output
        assert re.search(r"needs [\d,]+ bytes and [\d,]+ bytes are free", said)
        assert "the newest commit is step 4" in said
        assert not list((run / "checkpoints").glob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(run / "checkpoints")], check=True)
        lab.finish(run, setup)
    note(
        f"a disk of {kilobytes} kB, a commit takes {bytes_of_a_commit // 1000} kB", tail(said, run)
    )


@pytest.mark.row(7)
@pytest.mark.faults
def test_files_may_not_grow(lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    with lab.start(run, setup, fault="step.begin:0:6:sleep:2") as running:
        running.until(lambda: list_commits(run / "checkpoints"))
        limit = (100_000, resource.RLIM_INFINITY)
        resource.prlimit(running.pids()[0], resource.RLIMIT_FSIZE, limit)
        outcome = running.wait()
    assert outcome.codes == [2], outcome.output
    assert [c.step for c in list_commits(run / "checkpoints")] == [4]
    assert str(run / "checkpoints") in outcome.output
    lab.finish(run, setup)
    note("no file may be larger than 100 kB after step 4", tail(outcome.output, run))


@pytest.mark.row(8)
@pytest.mark.parametrize("action", ["eio", "erofs"])
def test_write_fails_once(action, lab, tmp_path, note):
    setup, run = Setup(), tmp_path / "run"
    outcome = lab.run(run, setup, fault=f"save.share:0:8:{action}::1")
    assert outcome.codes == [0], outcome.output
    assert [c.step for c in list_commits(run / "checkpoints")] == [4, 8, 12]
    assert not lab.finish(run, setup).output.count("Traceback")
    note(f"{action.upper()} in the first attempt of step 8", "tried again: step 8 is there")


@pytest.mark.row(8)
@pytest.mark.parametrize(
    ("point", "action"),
    [
        ("share", "eio"),
        pytest.param("begin", "erofs", marks=pytest.mark.faults),
        pytest.param("manifest", "enospc", marks=pytest.mark.faults),
        pytest.param("rename", "eio", marks=pytest.mark.faults),
    ],
)
def test_no_write_succeeds(point, action, lab, tmp_path, note):
    words = ("checkpoint.interval_steps=2", "checkpoint.write_attempts=2")
    setup, run = Setup(2, words=words), tmp_path / "run"
    rank = 0 if point in ("manifest", "rename") else 1
    outcome = lab.run(run, setup, fault=f"save.{point}:{rank}:4-99:{action}")
    assert set(outcome.codes) == {2}, outcome.output
    assert "Traceback" not in outcome.output
    said = outcome.output.splitlines()[-1]
    assert str(run / "checkpoints") in outcome.output
    assert "the newest commit is step 2" in outcome.output
    assert [c.step for c in list_commits(run / "checkpoints")] == [2]
    assert not list((run / "checkpoints").glob("*.partial"))
    lab.finish(run, setup)
    note(f"{action.upper()} at save.{point} from step 4 on", tail(said, run))


@pytest.mark.row(7, 8)
@pytest.mark.faults
@pytest.mark.parametrize("point", ["metrics.write", "save.latest", "save.prune"])
def test_what_is_not_the_commit_cannot_be_written(point, lab, tmp_path, note):
    setup, run = Setup(words=("checkpoint.keep_last=1",)), tmp_path / "run"
    outcome = lab.run(run, setup, fault=f"{point}:0:8:enospc")
    assert "Traceback" not in outcome.output, outcome.output
    assert outcome.codes[0] in (0, 2), outcome.output
    for commit in list_commits(run / "checkpoints"):
        verify_commit(commit)
    lab.finish(run, setup)
    note(f"ENOSPC at {point}", f"exit {outcome.codes[0]}; resumed bit for bit", row=7)
