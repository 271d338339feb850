"""Looks at how the run folder's file system behaves: what commits, locks and datasets rely on.

    rename      a reader finds the old file or the new one, whole; a folder is never renamed over
                one with files
    fsync       of files and of folders
    creation    of two processes that create a file exclusively, one succeeds
    lock        what one process has locked, another cannot lock
    mapping     a file that was written can be read through a memory map
    names       letters of both cases are told apart; symbolic links

Two processes of this host are all that one host can try: that other hosts see the same is the
promise of the file system, which NFS keeps for renames and exclusive creation, and for locks if its
lock service runs.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.preflight.children import Child, ask, child_environment
from pipeline.preflight.finding import Finding

_RENAMES = 100
_CREATIONS = 100
_SLOW_FSYNC_SECONDS = 1.0
_CHILD_SECONDS = 30.0
_OTHER_FOLDER = "choose a run folder on a file system of a cluster or a local disk"
_CREATE = """\
import os, pathlib, sys
folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
won = 0
for number in range(count):
    try:
        os.close(os.open(folder / f"one-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won += 1
    except FileExistsError:
        pass
print("won", won)
"""
_LOCK = """\
import fcntl, sys
with open(sys.argv[1], "w") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("got it")
    except BlockingIOError:
        print("refused")
"""


def look_at_behaviour(node: str, folder: Path, variables: Mapping[str, str]) -> Iterator[Finding]:
    """Try in a folder of its own, which is removed again.

    Args:
        node: This node's name.
        folder: The run folder, or the place where it will be made.
        variables: Of the process.

    Yields:
        A finding for each behaviour; one alone where no folder can be made.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    own = place / f".deberta-doctor-{socket.gethostname()}-{secrets.token_hex(4)}"
    try:
        own.mkdir()
    except OSError as error:
        text = f"no folder can be made in {place}: {error.strerror}"
        yield Finding(node, "file system", False, text, "see the run folder's line")
        return
    environment = child_environment(variables)
    looks: dict[str, Callable[[], tuple[bool, str, str]]] = {
        "rename": lambda: _rename(own),
        "fsync": lambda: _fsync(own),
        "creation": lambda: _creation(own, environment),
        "lock": lambda: _lock(own, environment),
        "mapping": lambda: _mapping(own),
        "names": lambda: _names(own),
    }
    try:
        for name, look in looks.items():
            try:
                ok, text, cure = look()
            except OSError as error:
                ok, text, cure = False, f"{error.strerror or error}", _OTHER_FOLDER
            yield Finding(node, f"file system {name}", ok, text, cure)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _rename(folder: Path) -> tuple[bool, str, str]:
    """Replace a file under a reader's eyes, and folders."""
    texts = (b"a" * 10_000, b"b" * 20_000)
    path, stop, torn = folder / "latest", threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                if path.read_bytes() not in texts:
                    torn.append("half of one")
            except OSError as error:
                torn.append(error.strerror or str(error))

    path.write_bytes(texts[0])
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number in range(_RENAMES):
            partial = folder / f"latest.{number}.partial"
            partial.write_bytes(texts[number % 2])
            partial.replace(path)
    finally:
        stop.set()
        reader.join()
    if torn:
        text = f"a reader of a file that is replaced has found: {torn[0]}"
        return False, text, f"commits would not be safe: {_OTHER_FOLDER}"
    for name in ("step.partial", "step"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    with contextlib.suppress(OSError):
        (folder / "step.partial").rename(folder / "step")
        return False, "a folder was renamed over one with files", _OTHER_FOLDER
    (folder / "step.partial").rename(folder / "step-2")
    if (folder / "step.partial").exists() or not (folder / "step-2" / "file").exists():
        return False, "a folder is not there after its renaming", _OTHER_FOLDER
    return True, f"{_RENAMES} replacements were seen whole", ""


def _fsync(folder: Path) -> tuple[bool, str, str]:
    began = time.monotonic()
    with (folder / "synced").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.monotonic() - began
    text = f"a file and its folder in {1000 * seconds:,.0f} ms"
    if seconds > _SLOW_FSYNC_SECONDS:
        return True, text, "every commit waits for several: see who else uses the disk"
    return True, text, ""


def _creation(folder: Path, environment: Mapping[str, str]) -> tuple[bool, str, str]:
    words = [sys.executable, "-S", "-c", _CREATE, str(folder), str(_CREATIONS)]
    pair = [Child(words, environment) for _ in range(2)]
    answers = [child.wait(_CHILD_SECONDS) for child in pair]
    won = [answer.output.split()[-1] for answer in answers if answer.output.startswith("won ")]
    if len(won) < len(pair):
        silent = next(answer for answer in answers if not answer.output.startswith("won "))
        return False, f"exclusive creation: {silent.reason}", _OTHER_FOLDER
    if sum(map(int, won)) != _CREATIONS:
        text = f"two processes have created {_CREATIONS} files {' and '.join(won)} times"
        return False, text, f"two runs could own one folder: {_OTHER_FOLDER}"
    return True, f"{_CREATIONS} files by two processes, {' and '.join(won)}", ""


def _lock(folder: Path, environment: Mapping[str, str]) -> tuple[bool, str, str]:
    path = folder / "lock"
    words = [sys.executable, "-S", "-c", _LOCK, str(path)]
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            text = f"flock does not work ({error.strerror}); heartbeats take its place"
            return True, text, "mount with locks (NFS: lockd; Lustre: -o flock) to notice at once"
        held = ask(words, environment, _CHILD_SECONDS)
    free = ask(words, environment, _CHILD_SECONDS)
    if (held.output.strip(), free.output.strip()) == ("refused", "got it"):
        return True, "one process at a time", ""
    if held.output.strip() == "got it":
        text = "two processes hold one lock"
        return False, text, f"mount with locks (NFS: lockd; Lustre: -o flock), or {_OTHER_FOLDER}"
    answer = free if free.output.strip() != "got it" else held
    return False, f"a lock that was freed cannot be had: {answer.reason}", _OTHER_FOLDER


def _mapping(folder: Path) -> tuple[bool, str, str]:
    path, content = folder / "mapped", secrets.token_bytes(3 * mmap.PAGESIZE + 17)
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[:] != content:
            text = "a memory map shows other bytes than were written"
            return False, text, _OTHER_FOLDER
    return True, "a written file can be read through a memory map", ""


def _names(folder: Path) -> tuple[bool, str, str]:
    (folder / "Case").touch()
    if (folder / "cASE").exists():
        text = "letters of both cases are one"
        return True, text, "give runs and datasets names that differ in more than that"
    try:
        (folder / "link").symlink_to("Case")
        works = (folder / "link").resolve() == (folder / "Case").resolve()
    except OSError as error:
        text = f"no symbolic links ({error.strerror})"
        return True, text, "set HF_HUB_DISABLE_SYMLINKS_WARNING=1 if hub caches lie here"
    if not works:
        return True, "a symbolic link leads elsewhere", "look at the mount's options"
    return True, "cases are told apart; symbolic links work", ""
