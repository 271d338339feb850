"""How the array tasks of one build stand: kept beside the work, told to people by name.

    WORK/shares/division.json      among which tasks the units are divided
    WORK/shares/share-00003.json   what the task of one share says about itself (`Standing`)

    Shares.join                  take part, as the task that has one of the shares
    Shares.describe_unfinished   who has not finished, and why

All of this is for people. Whether a unit is finished is read from the unit's folder.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from data_prep.array_tasks import ArrayTask, Division
from data_prep.documents import Unit
from data_prep.manifest import write_atomically
from data_prep.partial_folders import disk_errors, seconds_between, write_once

SHARES_FOLDER = "shares"
DIVISION_NAME = "division.json"
_MAX_MESSAGE = 500


@dataclass(frozen=True)
class Standing:
    """What a task says about itself, for people."""

    division: str
    task: str
    host: str
    pid: int
    state: str
    """`working`, `finished` or `failed`."""
    message: str = ""
    """Why it failed."""

    @classmethod
    def load(cls, path: Path) -> "Standing | None":
        """Read what a task has said; None if it is missing or makes no sense."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        who = f"{self.task} (process {self.pid} on {self.host})"
        if self.state == "failed":
            return f"{who} failed: {self.message}"
        is_here = self.host == socket.gethostname()
        if self.state == "working" and is_here and not psutil.pid_exists(self.pid):
            return f"{who} was killed"
        if self.state == "working":
            return f"{who} is at work, or was killed"
        return f"{who} had finished, but units are gone"


class Shares:
    """The shares of a build, seen by the task that has one of them.

    Args:
        folder: WORK/shares.
        task: this task.
        division: among whom the units are divided.
    """

    def __init__(self, folder: Path, task: ArrayTask, division: Division) -> None:
        self._folder, self._task = folder, task
        self.division = division
        share = division.share_of(task.task_id)
        assert share is not None
        self.share = share

    @classmethod
    def join(cls, work: Path, task: ArrayTask) -> "Shares":
        """Take part in a build, dividing it if this is the first task.

        Args:
            work: the work folder.
            task: this task.

        Returns:
            The shares.

        Raises:
            UserError: the array does not say who does what, or the disk is full.
        """
        folder = work / SHARES_FOLDER
        path = folder / DIVISION_NAME
        with disk_errors(work):
            folder.mkdir(exist_ok=True)
            kept = _load_division(path)
            if kept is None:
                write_once(path, _dump_division(task.divide(None)))
                kept = _load_division(path)
            division = task.divide(kept)
            if division != kept:
                write_atomically(path, _dump_division(division))
        return cls(folder, task, division)

    def of_this_task(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that this task does."""
        return [unit for unit in units if unit.index % self.division.count == self.share]

    def began(self) -> None:
        """Say that this task is at work."""
        self._say("working")

    def lives(self) -> None:
        """Give a sign of life; what others print about us says how long ago it was."""
        with disk_errors(self._folder):
            os.utime(self._path(self.share))

    def failed(self, why: BaseException) -> None:
        """Say why this task goes no further."""
        self._say("failed", (str(why) or repr(why))[:_MAX_MESSAGE])

    def finished(self) -> None:
        """Say that the share is done."""
        self._say("finished")

    def describe_unfinished(self, units: Sequence[Unit]) -> list[str]:
        """Say for each task that has left something to do how it stands.

        Args:
            units: those that nobody has finished.

        Returns:
            One line a task, in the order of their numbers.
        """
        left: dict[int, int] = {}
        for unit in units:
            share = unit.index % self.division.count
            left[share] = left.get(share, 0) + 1
        return [
            f"task {self.division.task_id(share)}: {count} units to do; {self._describe(share)}"
            for share, count in sorted(left.items())
        ]

    def _describe(self, share: int) -> str:
        path = self._path(share)
        standing = Standing.load(path)
        if standing is None or standing.division != str(self.division):
            return "not started yet"
        try:
            seconds = seconds_between(path, self._path(self.share))
        except OSError:
            return str(standing)
        return f"{standing}; last sign of life {seconds:.0f} s before this task's"

    def _path(self, share: int) -> Path:
        return self._folder / f"share-{share:05d}.json"

    def _say(self, state: str, message: str = "") -> None:
        standing = Standing(
            division=str(self.division),
            task=self._task.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            message=message,
        )
        with disk_errors(self._folder):
            write_atomically(self._path(self.share), json.dumps(asdict(standing)).encode())


def _load_division(path: Path) -> Division | None:
    try:
        return Division(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _dump_division(division: Division) -> bytes:
    return json.dumps(asdict(division)).encode()
