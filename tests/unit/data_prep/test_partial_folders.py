import os
import socket
import subprocess
import sys

import pytest

from data_prep.partial_folders import (
    ABANDONED_SECONDS,
    partial_folder,
    publish_folder,
    remove_abandoned,
    write_once,
)

HOST = socket.gethostname()


def make(folder):
    folder.mkdir()
    (folder / "file").write_text("x")
    return folder


@pytest.fixture
def dead_pid():
    """Of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with partial_folder(tmp_path, "unit-000001") as partial:
        (partial / "file").write_text("whole")
        assert [path.name for path in tmp_path.iterdir()] == [
            f"unit-000001.{HOST}.{os.getpid()}.partial"
        ]
        publish_folder(partial, tmp_path / "unit-000001")
    assert [path.name for path in tmp_path.iterdir()] == ["unit-000001"]
    assert (tmp_path / "unit-000001" / "file").read_text() == "whole"


def test_the_second_of_two_gives_way(tmp_path):
    with partial_folder(tmp_path, "unit-000001") as partial:
        (partial / "file").write_text("mine")
        make(tmp_path / "unit-000001")
        publish_folder(partial, tmp_path / "unit-000001")
    assert (tmp_path / "unit-000001" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["unit-000001"]


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(IsADirectoryError), partial_folder(tmp_path, "a") as partial:
        make(partial / "folder").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_process_of_the_same_number_are_not_mixed_in(tmp_path):
    make(tmp_path / f"a.{HOST}.{os.getpid()}.partial")
    with partial_folder(tmp_path, "a") as partial:
        assert list(partial.iterdir()) == []


def test_nobody_makes_the_work_folder_again(tmp_path):
    with pytest.raises(FileNotFoundError), partial_folder(tmp_path / ".work", "a"):
        pass
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_is_written_once(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    write_once(tmp_path / "plan", b"first")
    assert (tmp_path / "plan").read_bytes() == b"first"
    if has_links:
        write_once(tmp_path / "plan", b"second")
        assert (tmp_path / "plan").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def no_links(self, target):
    raise PermissionError(1, "Operation not permitted")


def test_what_killed_processes_leave_is_cleared_away(tmp_path, dead_pid):
    gone = make(tmp_path / f"unit-000001.{HOST}.{dead_pid}.partial")
    other_unit = make(tmp_path / f"unit-000002.{HOST}.{dead_pid}.partial")
    alive = make(tmp_path / f"unit-000001.{HOST}.{os.getppid()}.partial")
    elsewhere = make(tmp_path / "unit-000001.node9.cluster.17.partial")
    long_silent = make(tmp_path / "unit-000001.node8.cluster.17.partial")
    before = (tmp_path.stat().st_mtime - ABANDONED_SECONDS - 10,) * 2
    for path in (long_silent / "file", long_silent, elsewhere):
        os.utime(path, before)
    finished = make(tmp_path / "unit-000001")
    (tmp_path / "holder.17.partial").write_text("a file")
    remove_abandoned(tmp_path, {"unit-000001"})
    assert not gone.exists()
    assert not long_silent.exists()
    assert other_unit.exists()
    # Its folder is old, but a file in it is not: somebody is writing.
    assert all(path.exists() for path in (alive, elsewhere, finished))
    remove_abandoned(tmp_path)
    assert not other_unit.exists()
    assert all(path.exists() for path in (alive, elsewhere, finished))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["holder.17.partial"]
