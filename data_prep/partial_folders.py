"""How processes on many hosts share a work folder: what is finished appears at once, or not at all.

    NAME.HOST.PID.partial   what one process is working on; nobody else writes there
    NAME                    the finished thing: given by a rename, and never changed

Nothing here needs a lock to be right. File servers rename atomically too; who comes second finds
the same bytes in place and throws his own away. So array tasks, the twin of a requeued task and a
build that goes on beside them can work in one folder.
"""

import errno
import os
import shutil
import socket
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from data_prep.errors import UserError
from data_prep.manifest import sync_folder, write_atomically

ABANDONED_SECONDS = 3600.0
"""Another host's partial folder in which nothing has changed for so long is cleared away."""
_ALREADY_THERE = (errno.EEXIST, errno.ENOTEMPTY)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into a message for people."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make room or choose another "
            f"--output. Finished units are kept: the same command continues"
        ) from error


@contextmanager
def partial_folder(work: Path, name: str) -> Iterator[Path]:
    """Make an empty folder that belongs to this process alone, for the body of a `with`.

    Args:
        work: the work folder. It must be there: after the end of a build nobody makes it again.
        name: what the folder will be called in the end; no dots.

    Yields:
        The folder NAME.HOST.PID.partial; what is left of it afterwards is removed.
    """
    partial = work / f"{name}.{_process_name()}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Give a partial folder its name, unless another process was faster with the same bytes.

    Args:
        partial: what `partial_folder` gave, its files on disk.
        folder: the name.
    """
    sync_folder(partial)
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in _ALREADY_THERE:
            raise
    sync_folder(folder.parent)


def write_once(path: Path, content: bytes) -> None:
    """Write a file that nobody changes once it is there; the first of several wins.

    Args:
        path: the file.
        content: its bytes, unless it is there already.
    """
    draft = path.with_name(f"{path.name}.{_process_name()}")
    write_atomically(draft, content)
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        pass
    except OSError:  # no hard links here: whole all the same, but the last of several wins
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_abandoned(work: Path, names: Container[str] | None = None) -> None:
    """Clear away the partial folders of processes that were killed.

    A folder of this host goes when its process is gone. About other hosts only time can tell:
    theirs may stay until the whole work folder goes.

    Args:
        work: the work folder.
        names: what they would be called in the end; None for all.
    """
    for partial in work.glob("*.*.partial"):
        name, _, process = partial.name.removesuffix(".partial").partition(".")
        if names is not None and name not in names:
            continue
        host, _, pid = process.rpartition(".")
        if host == socket.gethostname() and pid.isdigit():
            is_abandoned = not psutil.pid_exists(int(pid))
        else:
            is_abandoned = _seconds_unchanged(partial) > ABANDONED_SECONDS
        if is_abandoned:
            shutil.rmtree(partial, ignore_errors=True)


def seconds_between(earlier: Path, later: Path) -> float:
    """Time between the last changes of two files of one file server, whose clock alone counts.

    Args:
        earlier: a file or folder.
        later: another one.

    Returns:
        Seconds, at least 0.
    """
    return max(0.0, later.stat().st_mtime - earlier.stat().st_mtime)


def _seconds_unchanged(folder: Path) -> float:
    """Time since anything in a folder changed; 0 where that cannot be told."""
    probe = folder.with_name(f"clock.{_process_name()}")
    try:
        probe.touch()
        return min(seconds_between(path, probe) for path in (folder, *folder.iterdir()))
    except OSError:  # somebody is changing it right now, or the disk is full
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _process_name() -> str:
    return f"{socket.gethostname()}.{os.getpid()}"
