"""Who may write into a run folder: a kernel lock, and a holder file with a heartbeat.

    .lock          flock: freed by the kernel when its process dies; not every shared file system
                   tells other hosts about it
    .holder.json   host, pid, job and a count that a thread raises every few seconds

    RunLock.acquire   refuses while somebody else lives; takes over what a dead process left behind
    RunLock.lost      somebody took the folder over while this process stood still

Heartbeats are judged by their change, never by a clock: hosts need not agree about the time.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from data_prep.errors import UserError

HEARTBEAT_SECONDS = 10.0
WATCHED_HEARTBEATS = 3.0
"""A holder on another host whose heartbeat stands still for this many is dead."""
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_SAME_START_SECONDS = 2.0
"""A process keeps its start time; one that was given the same pid later differs by more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that a holder file names."""

    host: str
    pid: int
    boot_id: str = ""
    """Of the host's kernel: tells two machines of one name, and one machine before and after it was
    started again, apart."""
    started_unix_seconds: float = 0.0
    """When the process started, as psutil says."""
    job_id: str = ""
    """Of the batch system; empty outside."""
    beat: int = 0

    @classmethod
    def this_process(cls, job_id: str) -> "Holder":
        """Describe this process.

        Args:
            job_id: Of the batch system; empty outside.

        Returns:
            A holder with heartbeat 0.
        """
        started = psutil.Process().create_time()
        return cls(socket.gethostname(), os.getpid(), _boot_id(), started, job_id)

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Read a holder file.

        Args:
            path: The file.

        Returns:
            Whom it names; None where it is absent or not a holder file.

        Raises:
            OSError: It is there and cannot be read.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                host=str(value["host"]),
                pid=int(value["pid"]),
                boot_id=str(value.get("boot_id", "")),
                started_unix_seconds=float(value.get("started_unix_seconds", 0.0)),
                job_id=str(value.get("job_id", "")),
                beat=int(value.get("beat", 0)),
            )
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    @property
    def is_on_this_machine(self) -> bool:
        """Whether this machine, since it was last started, can tell if the process lives."""
        return self.host == socket.gethostname() and self.boot_id in ("", _boot_id())

    @property
    def is_alive_here(self) -> bool:
        """Whether the process lives on this machine; another one of the same pid is not it."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            same = abs(process.create_time() - self.started_unix_seconds) < _SAME_START_SECONDS
            return same or not self.started_unix_seconds
        except (psutil.NoSuchProcess, ValueError):
            return False

    def is_process_of(self, other: "Holder | None") -> bool:
        """Whether both are the same process, whatever their heartbeats are.

        Args:
            other: Another holder, or None for none.

        Returns:
            Whether they are.
        """
        return other is not None and {**asdict(self), "beat": 0} == {**asdict(other), "beat": 0}

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on host {self.host}{job}"


class RunLock:
    """Keeps a run folder for one process; all of it happens on rank 0."""

    def __init__(self, folder: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        """Name the files without touching them.

        Args:
            folder: The run folder.
            heartbeat_seconds: Between two changes of the holder file.
        """
        self._folder = folder
        self._heartbeat_seconds = heartbeat_seconds
        self._watch_seconds = WATCHED_HEARTBEATS * heartbeat_seconds
        self._holder_file = folder / ".holder.json"
        # Where flock is missing, a lock file that stays behind after a crash would keep all out.
        self._flock = FileLock(folder / ".lock", fallback_to_soft=False)
        self._me: Holder | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = ""

    @property
    def lost(self) -> str:
        """Why the folder is no longer this process's; empty while it is."""
        return self._lost

    def acquire(self, job_id: str = "") -> str:
        """Take the folder; waits where only time can tell whether its holder lives.

        Args:
            job_id: Of the batch system: a requeued job takes over its own folder at once.

        Returns:
            Whom it was taken over from and why; empty where nobody held it.

        Raises:
            UserError: Another process trains in this folder; the message says which.
            OSError: The folder cannot be written.
        """
        is_locked = self._try_flock()
        holder = Holder.read(self._holder_file)
        try:
            note = self._take_over(holder, is_locked, job_id)
            if note:
                logger.warning("run.folder %s: %s", self._folder, note)
            self._hold(job_id, is_contended=bool(note))
        except BaseException:
            self._flock.release()
            raise
        return note

    def release(self) -> None:
        """Let others in; does nothing where nothing is held."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._heartbeat_seconds)
            self._thread = None
        with contextlib.suppress(OSError):  # what stays behind names a process that has ended
            if self._me is not None and not self._lost and self._is_ours():
                self._holder_file.unlink(missing_ok=True)
        self._me = None
        self._flock.release()

    def _try_flock(self, patience_seconds: float = 0.0) -> bool:
        """Take the kernel's lock; where the file system has none, the holder file must do."""
        try:
            self._flock.acquire(timeout=patience_seconds)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        return True

    def _take_over(self, holder: Holder | None, is_locked: bool, job_id: str) -> str:
        """Say from whom the folder may be taken over; empty from nobody. Refuses otherwise."""
        if holder is None:
            if not is_locked:
                raise self._in_use("another process, which has not said its name yet")
            return ""
        if holder.is_on_this_machine:
            if holder.is_alive_here:
                raise self._in_use(str(holder))
            # A killed process frees its lock last, after gigabytes of memory.
            if not is_locked and not self._try_flock(self._watch_seconds):
                raise self._still_locked(holder)
            return f"taken over from {holder}, which has ended without leaving it"
        if is_locked and job_id and holder.job_id == job_id:
            return f"taken over from {holder}, an earlier start of this job"
        return self._watch(holder, is_locked)

    def _watch(self, holder: Holder, is_locked: bool) -> str:
        """Wait until another host's holder has shown a heartbeat, or has missed three."""
        logger.warning(
            "run.folder %s was left by %s: waiting %.0f s to see whether it still runs",
            self._folder,
            holder,
            self._watch_seconds,
        )
        before = self._heartbeat()
        deadline = time.monotonic() + self._watch_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._heartbeat_seconds / 10))
            now = self._heartbeat()
            if now != before and None not in (now, before):
                raise self._in_use(str(holder))
            before = before or now
            is_locked = is_locked or self._try_flock()
        if not is_locked:
            raise UserError(
                f"run.folder {self._folder} was left by {holder}, which shows no heartbeat, but "
                "the file server still keeps its lock: try again in some minutes, or choose "
                "another run.folder"
            )
        return f"taken over from {holder}, which has shown no heartbeat"

    def _heartbeat(self) -> tuple[str, int] | None:
        """What changes while the holder lives; None where it cannot be read."""
        try:
            text = self._holder_file.read_text(encoding="utf-8", errors="replace")
            return text, self._holder_file.stat().st_mtime_ns
        except OSError:  # gone with its holder, or a file that was replaced on a file server
            return None

    def _hold(self, job_id: str, *, is_contended: bool) -> None:
        """Name this process in the holder file, and keep its heart beating."""
        self._me = Holder.this_process(job_id)
        self._write(self._me)
        if is_contended:
            # Two hosts may take over the same dead run at once; the later one finds its own name.
            time.sleep(min(1.0, self._heartbeat_seconds / 10))
            if not self._is_ours():
                raise self._in_use(str(Holder.read(self._holder_file)))
        self._ended.clear()
        self._lost = ""
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def _is_ours(self) -> bool:
        return self._me is not None and self._me.is_process_of(Holder.read(self._holder_file))

    def _write(self, holder: Holder) -> None:
        """Replace the holder file; not synced, a heartbeat need not survive a power cut."""
        partial = self._holder_file.with_name(f".holder.{holder.host}-{holder.pid}.partial")
        try:
            partial.write_text(json.dumps(asdict(holder)) + "\n", encoding="utf-8")
            partial.replace(self._holder_file)
        finally:
            partial.unlink(missing_ok=True)  # left only where writing failed

    def _beat(self) -> None:
        """Change the holder file again and again, until it is left or no longer ours."""
        assert self._me is not None
        beat, times_gone = 0, 0
        while not self._ended.wait(self._heartbeat_seconds):
            try:
                holder = Holder.read(self._holder_file)
                times_gone = 0 if holder else times_gone + 1
                if holder and not self._me.is_process_of(holder):
                    return self._lose(f"was taken over by {holder}")
                if times_gone > 1:  # once may be a file server's hiccup
                    return self._lose("has lost its .holder.json")
                beat += 1
                if holder:
                    self._write(Holder(**{**asdict(self._me), "beat": beat}))
            except OSError as error:
                logger.warning("%s: no heartbeat (%s)", self._holder_file, error.strerror)
                with contextlib.suppress(OSError):  # a full disk may have room for a new time
                    os.utime(self._holder_file)

    def _lose(self, why: str) -> None:
        self._lost = (
            f"run.folder {self._folder} {why} while this process ({self._me}) was using it: "
            "nothing more may be written here. Stop one of the two runs, or give them different "
            "folders"
        )
        logger.error(self._lost)

    def _in_use(self, who: str) -> UserError:
        return UserError(
            f"run.folder {self._folder} is in use by {who}: wait for that run, stop it, or choose "
            "another run.folder"
        )

    def _still_locked(self, holder: Holder) -> UserError:
        keepers = ", ".join(map(str, _processes_with(self._folder / ".lock"))) or "unknown"
        return UserError(
            f"run.folder {self._folder}: {holder} has ended, or is in another container, but its "
            f"lock is still kept (by pid {keepers}): end that process, or choose another run.folder"
        )


def _boot_id() -> str:
    """The kernel's number of this start of the machine; empty where it has none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def _processes_with(path: Path) -> Iterator[int]:
    """Find the processes that have a file open, as far as this user may know."""
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == wanted for file in process.open_files()):
                yield process.pid
        except psutil.Error:
            continue
