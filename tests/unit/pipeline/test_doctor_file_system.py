"""What `deberta doctor` says of the run folder's file system: a good one, and bad ones."""

import errno
import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.preflight import shared_folder
from pipeline.preflight.shared_folder import look_at_behaviour

CHECKS = ("rename", "fsync", "creation", "lock", "mapping", "names")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(shared_folder, "_RENAMES", 10)


@pytest.fixture
def look(tmp_path):
    """Check -> line; nothing is left behind."""

    def at(folder=tmp_path):
        findings = list(look_at_behaviour("n", folder, dict(os.environ)))
        assert list(tmp_path.iterdir()) == []
        return {f.check.removeprefix("file system "): f.line.partition(": ")[2] for f in findings}

    return at


def test_a_good_one(look, tmp_path):
    lines = look(tmp_path / "not" / "yet")
    assert tuple(lines) == CHECKS
    assert all(line.startswith("ok, ") for line in lines.values()), lines
    assert lines["rename"] == "ok, 10 replacements were seen whole"


def test_one_that_cannot_be_written(tmp_path):
    words = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(tmp_path)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        (finding,) = look_at_behaviour("n", tmp_path / "run", {})
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert finding.line == (
        f"n file system: FAIL, no folder can be made in {tmp_path}: Read-only file system; see the "
        "run folder's line"
    )


def test_replacements_that_a_reader_sees(look, monkeypatch):
    def slowly(partial, path):
        path.write_bytes(b"")
        time.sleep(0.05)
        shutil.move(partial, path)

    monkeypatch.setattr(Path, "replace", slowly)
    words = "FAIL, a reader of a file that is replaced has found: half of one; commits would not be"
    assert look()["rename"].startswith(words)


def test_replacements_that_remove_first(look, monkeypatch):
    def slowly(partial, path):
        path.unlink()
        time.sleep(0.05)
        shutil.move(partial, path)

    monkeypatch.setattr(Path, "replace", slowly)
    assert "has found: No such file or directory; commits" in look()["rename"]


def test_folders_that_are_overwritten(look, monkeypatch):
    honest = Path.rename

    def over(folder, path):
        shutil.rmtree(path, ignore_errors=True)
        return honest(folder, path)

    monkeypatch.setattr(Path, "rename", over)
    assert look()["rename"].startswith("FAIL, a folder was renamed over one with files; choose")


def test_folders_that_are_copied(look, monkeypatch):
    def copied(folder, path):
        if path.exists():
            raise OSError(errno.ENOTEMPTY, "not empty")
        shutil.copytree(folder, path)

    monkeypatch.setattr(Path, "rename", copied)
    assert look()["rename"].startswith("FAIL, a folder is not there after its renaming; choose")


def test_fsync(look, monkeypatch):
    monkeypatch.setattr(shared_folder, "_SLOW_FSYNC_SECONDS", 0.0)
    assert look()["fsync"].endswith(
        " ms; every commit waits for several: see who else uses the disk"
    )

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    lines = look()
    assert lines["fsync"].startswith("FAIL, Input/output error; choose a run folder on")
    assert tuple(lines) == CHECKS, "one look hides no other"


def test_creation_that_is_not_exclusive(look, monkeypatch):
    monkeypatch.setattr(shared_folder, "_CREATE", shared_folder._CREATE.replace("os.O_EXCL", "0"))
    assert look()["creation"].startswith(
        "FAIL, two processes have created 100 files 100 and 100 times; two runs could own one"
    )
    monkeypatch.setattr(shared_folder, "_CREATE", "raise OSError(5, 'no such device')")
    assert "FAIL, exclusive creation: OSError: [Errno 5] no such device" in look()["creation"]


def test_locks_that_lock_nobody_out(look, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, kind: None)
    line = look()["lock"]
    assert line.startswith("FAIL, two processes hold one lock; mount with locks (NFS: lockd;")


def test_locks_that_stay(look, monkeypatch):
    monkeypatch.setattr(shared_folder, "_LOCK", "print('refused')")
    assert look()["lock"].startswith("FAIL, a lock that was freed cannot be had: refused; choose")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_locks(number, look, monkeypatch):
    def none(file, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    line = look()["lock"]
    assert line.startswith(f"warning, flock does not work ({os.strerror(number)}); heartbeats take")


def test_maps_of_other_bytes(look, monkeypatch):
    class Zeros:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return bytes(10)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(shared_folder.mmap, "mmap", Zeros)
    assert look()["mapping"].startswith("FAIL, a memory map shows other bytes than were written;")


def test_names(look, monkeypatch):
    with monkeypatch.context() as patch:

        def refused(path, target):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        patch.setattr(Path, "symlink_to", refused)
        assert look()["names"].startswith(
            "warning, no symbolic links (Operation not permitted); set"
        )
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", lambda path, target: path.touch())
        assert look()["names"].startswith("warning, a symbolic link leads elsewhere; look at the")
    with monkeypatch.context() as patch:
        honest = Path.exists
        patch.setattr(Path, "exists", lambda path: path.name == "cASE" or honest(path))
        assert look()["names"].startswith("warning, letters of both cases are one; give runs and")
