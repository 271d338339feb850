"""Who may write into a run folder: live holders keep it, dead ones lose it, on any host."""

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from data_prep.errors import EXIT_USAGE, UserError
from pipeline.run_lock import Holder, RunLock

ROOT = Path(__file__).parents[3]
HEARTBEAT_SECONDS = 0.2
OTHER_HOST = Holder("far-away", 4711, "another-kernel", 1e9, "77", beat=5)
PATIENCE_SECONDS = 30

HOLD = """
import os, sys, time
from pathlib import Path
from pipeline.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire("1")
pid = os.getpid()
if sys.argv[2] == "fork":
    pid = os.fork() or os.getpid()
if pid == os.getpid() or sys.argv[2] != "fork":
    print(pid, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def holding_process(folder, way="alone"):
    """A process that keeps the folder, and the pid of it or of the child that it forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), way], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = int(process.stdout.readline())
    try:
        yield process, pid
    finally:
        for each in {process.pid, pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def lock(tmp_path):
    lock = RunLock(tmp_path, HEARTBEAT_SECONDS)
    yield lock
    lock.release()


def write(folder, holder):
    partial = folder / "partial"
    partial.write_text(json.dumps(asdict(holder)))
    partial.replace(folder / ".holder.json")


def wait_until(holds):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_a_free_folder_needs_no_note(tmp_path, lock):
    assert lock.acquire("77") == ""
    holder = Holder.read(tmp_path / ".holder.json")
    assert (holder.pid, holder.job_id) == (os.getpid(), "77")
    assert holder.is_on_this_machine
    assert holder.is_alive_here
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert lock.acquire() == ""


def test_a_live_process_on_this_machine_is_refused_and_a_dead_one_taken_over(tmp_path, lock):
    with holding_process(tmp_path) as (_, pid):
        with pytest.raises(UserError) as caught:
            lock.acquire("1")
        assert f"run.folder {tmp_path} is in use by process {pid} on host" in str(caught.value)
        assert ", job 1: wait for that run, stop it, or choose another" in str(caught.value)
        assert caught.value.exit_code == EXIT_USAGE
    note = lock.acquire("2")
    assert note.startswith(f"taken over from process {pid} on host ")
    assert note.endswith(", job 1, which has ended without leaving it")


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path, lock, monkeypatch):
    """Its lock may outlive it for a moment."""
    monkeypatch.setattr(lock, "_watch_seconds", PATIENCE_SECONDS)
    with holding_process(tmp_path) as (process, pid):
        process.kill()
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        assert f"taken over from process {pid} on host " in lock.acquire()


def test_a_child_that_outlives_the_holder_keeps_nothing(tmp_path, lock):
    with holding_process(tmp_path, "fork") as (process, child):
        process.kill()
        process.wait()
        assert psutil.pid_exists(child)
        assert f"taken over from process {process.pid} on host " in lock.acquire()


def test_a_lock_whose_holder_cannot_be_seen(tmp_path, lock):
    """As in another container of this machine: here, the file names a process that has ended."""
    with holding_process(tmp_path) as (_, pid):
        me = Holder.this_process("")
        write(tmp_path, replace(me, started_unix_seconds=me.started_unix_seconds - 1000))
        with pytest.raises(UserError) as caught:
            lock.acquire()
        assert f"process {os.getpid()} on host" in str(caught.value)
        assert f"its lock is still kept (by pid {pid}): end that process" in str(caught.value)


def test_another_process_of_the_same_pid_is_not_the_holder(tmp_path, lock):
    me = Holder.this_process("")
    write(tmp_path, replace(me, started_unix_seconds=me.started_unix_seconds - 1000))
    assert "which has ended without leaving it" in lock.acquire()


def test_a_live_holder_counts_where_the_kernels_lock_does_not(tmp_path, lock):
    """Some file systems have no flock; this process's parent holds the folder by its file alone."""
    parent = replace(Holder.this_process(""), pid=os.getppid(), started_unix_seconds=0.0)
    write(tmp_path, parent)
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        lock.acquire()


def test_a_file_system_without_flock(tmp_path, lock, monkeypatch):
    def fail(timeout):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock._flock, "acquire", fail)
    assert lock.acquire() == ""
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path, HEARTBEAT_SECONDS).acquire()


def test_a_requeued_job_takes_over_from_another_host_at_once(tmp_path, lock, monkeypatch):
    monkeypatch.setattr(lock, "_watch_seconds", 1e9)
    write(tmp_path, OTHER_HOST)
    note = lock.acquire("77")
    assert note == "taken over from process 4711 on host far-away, job 77, an earlier start of " + (
        "this job"
    )


def test_of_two_hosts_that_take_over_one_is_refused(tmp_path, lock, monkeypatch):
    """The other host writes its name just after ours."""
    write(tmp_path, OTHER_HOST)
    own_write = lock._write

    def overtaken(holder):
        own_write(holder)
        write(tmp_path, replace(OTHER_HOST, host="faster"))

    monkeypatch.setattr(lock, "_write", overtaken)
    with pytest.raises(UserError, match="in use by process 4711 on host faster"):
        lock.acquire("77")


@pytest.mark.parametrize("holder", [OTHER_HOST, replace(OTHER_HOST, job_id="")])
@pytest.mark.parametrize("job", ["78", ""])
def test_another_host_without_a_heartbeat_is_taken_over(tmp_path, lock, caplog, holder, job):
    write(tmp_path, holder)
    with caplog.at_level(logging.WARNING):
        note = lock.acquire(job)
    assert note == f"taken over from {holder}, which has shown no heartbeat"
    assert "waiting 1 s to see whether it still runs" in caplog.text
    assert note in caplog.text
    assert Holder.read(tmp_path / ".holder.json").pid == os.getpid()


def test_a_machine_that_was_started_again_is_another_one(tmp_path, lock):
    """The pid of the holder lives here, but the kernel that started the holder is gone."""
    write(tmp_path, replace(Holder.this_process("1"), boot_id="before the power cut"))
    assert "which has shown no heartbeat" in lock.acquire("2")


@pytest.mark.parametrize("way", ["count", "time"])
def test_another_host_with_a_heartbeat_is_refused(tmp_path, lock, monkeypatch, way):
    """A holder whose disk is full changes only the time of its file."""
    write(tmp_path, OTHER_HOST)
    ended = threading.Event()

    def beat():
        number = 5
        while not ended.wait(HEARTBEAT_SECONDS / 2):
            number += 1
            if way == "count":
                write(tmp_path, replace(OTHER_HOST, beat=number))
            else:
                os.utime(tmp_path / ".holder.json")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        monkeypatch.setattr(lock, "_watch_seconds", PATIENCE_SECONDS)
        with pytest.raises(UserError) as caught:
            lock.acquire("78")
    finally:
        ended.set()
        thread.join()
    assert f"run.folder {tmp_path} is in use by process 4711 on host far-away, job 77" in str(
        caught.value
    )
    assert Holder.read(tmp_path / ".holder.json").host == "far-away"
    third = RunLock(tmp_path, HEARTBEAT_SECONDS)
    assert third._try_flock(), "who is refused keeps nothing"
    third.release()


def test_a_file_server_that_keeps_a_dead_hosts_lock(tmp_path, lock):
    with holding_process(tmp_path) as (process, _):  # stands in for the server
        process.send_signal(signal.SIGSTOP)
        write(tmp_path, OTHER_HOST)
        with pytest.raises(UserError) as caught:
            lock.acquire("77")
    assert "process 4711 on host far-away, job 77, which shows no heartbeat" in str(caught.value)
    assert "try again in some minutes, or choose another run.folder" in str(caught.value)


def test_a_lock_that_the_file_server_frees_is_taken(tmp_path, lock, monkeypatch):
    monkeypatch.setattr(lock, "_watch_seconds", 3.0)
    with holding_process(tmp_path) as (process, _):
        process.send_signal(signal.SIGSTOP)
        write(tmp_path, OTHER_HOST)
        timer = threading.Timer(0.3, process.kill)
        timer.start()
        assert "which has shown no heartbeat" in lock.acquire("78")
        timer.join()


def test_the_heart_beats(tmp_path, lock):
    lock.acquire()
    wait_until(lambda: Holder.read(tmp_path / ".holder.json").beat >= 2)
    assert lock.lost == ""


def test_a_holder_notices_that_another_has_taken_over(tmp_path, lock, caplog):
    lock.acquire()
    write(tmp_path, OTHER_HOST)
    wait_until(lambda: lock.lost)
    assert f"run.folder {tmp_path} was taken over by process 4711 on host far-away" in lock.lost
    assert f"while this process (process {os.getpid()} on host" in lock.lost
    assert "Stop one of the two runs, or give them different folders" in lock.lost
    assert lock.lost in caplog.text
    lock.release()
    assert Holder.read(tmp_path / ".holder.json") == OTHER_HOST, "and leaves it alone"


def test_a_holder_notices_that_its_file_is_gone(tmp_path, lock):
    lock.acquire()
    (tmp_path / ".holder.json").unlink()
    wait_until(lambda: lock.lost)
    assert "has lost its .holder.json" in lock.lost
    assert not (tmp_path / ".holder.json").exists()


def test_a_full_disk_ends_nothing(tmp_path, lock, monkeypatch):
    """The beat goes on by the file's time, which others watch as well."""
    lock.acquire()
    before = lock._heartbeat()

    def fail(_holder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "_write", fail)
    count = json.loads(lock._heartbeat()[0])["beat"]
    wait_until(lambda: lock._heartbeat() != before and lock._heartbeat()[1] > before[1])
    assert json.loads(lock._heartbeat()[0])["beat"] <= count + 1
    assert lock.lost == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"host": "n1"}', '{"host": "n1", "pid": "x"}']
)
def test_what_names_nobody_keeps_nobody_out(tmp_path, lock, text):
    (tmp_path / ".holder.json").write_text(text)
    assert lock.acquire() == ""


def test_files_of_an_earlier_version_are_read(tmp_path, lock):
    (tmp_path / ".holder.json").write_text('{"host": "far-away", "pid": 12}\n')
    assert "taken over from process 12 on host far-away, which" in lock.acquire()
