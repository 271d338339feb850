"""A world of training processes at work, and how it has ended."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.fingerprint import consumed_samples, last_step

TIMEOUT_SECONDS = 120


@dataclass
class Outcome:
    """How a world ended."""

    codes: list[int]
    """By rank; negative for a signal that killed it. Of a launcher only its own code is known."""
    seconds: list[float]
    """By rank: when it ended, after the start of its world."""
    output: str
    folder: Path

    @property
    def status(self) -> dict[str, Any]:
        """state.json."""
        return json.loads((self.folder / "state.json").read_text())

    def log(self, rank: int = 0) -> str:
        """What one rank has logged."""
        path = self.folder / "logs" / f"rank-{rank:05d}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def logs(self) -> str:
        """Everything that any rank has said."""
        return self.output + "".join(
            path.read_text(errors="replace") for path in sorted((self.folder / "logs").glob("*"))
        )

    @property
    def commits(self) -> list[str]:
        """Names in the checkpoints folder."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@dataclass
class Running:
    """A world at work."""

    folder: Path
    notes: Path
    log: Path
    launcher: int
    process: subprocess.Popen[bytes] | None = None
    """The launcher, where it is a child of this process."""
    started_seconds: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._records = self.folder.with_name(f"{self.folder.name}.samples-0")
        self._old_bytes = self._records.stat().st_size if self._records.exists() else 0

    def new_records(self) -> str:
        """What rank 0 of a forked world has noted about the samples of its steps in this start."""
        if not self._records.exists():
            return ""
        with self._records.open() as file:
            file.seek(self._old_bytes)
            return file.read()

    def _read(self) -> dict[str, Any]:
        return json.loads(self.notes.read_text()) if self.notes.exists() else {}

    def pids(self) -> list[int]:
        """By rank, of a forked world."""
        self.until(lambda: "pids" in self._read(), 30)
        return self._read()["pids"]

    def everybody(self) -> list[psutil.Process]:
        """The launcher and all its descendants."""
        # By descent and not by process group: torchrun puts its workers into sessions of their own.
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.launcher)
            return [parent, *parent.children(recursive=True)]
        return []

    def signal(self, number: int, *ranks: int) -> None:
        """Signal some ranks of a forked world; all of them where none is named."""
        for rank, pid in enumerate(self.pids()):
            # A process id of one that has ended may be somebody else's by now.
            if (not ranks or rank in ranks) and rank not in self.codes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def until(self, condition: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> None:
        """Wait for something to come true; fails where it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it never came:\n{self.output()}"
            assert not self.ended(), f"the world ended before:\n{self.output()}"
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """Wait for the row of a step."""
        self.until(lambda: last_step(self.folder) >= step)

    def until_begun(self, step: int, rank: int = 0) -> None:
        """Wait until a rank of a forked world is in a step."""
        self.until(lambda: f"rank {rank}, step {step}" in consumed_samples(self.folder))

    def codes(self) -> dict[int, int]:
        """By rank: how those ended that have."""
        return {int(rank): code for rank, code in self._read().get("codes", {}).items()}

    def until_codes(self, ranks: list[int], seconds: float) -> None:
        """Wait until some ranks of a forked world have ended."""
        deadline = time.monotonic() + seconds
        while not {*ranks} <= {*self.codes()}:
            assert time.monotonic() < deadline, f"{self.codes()} after {seconds} s\n{self.output()}"
            time.sleep(0.05)

    def output(self) -> str:
        """What its processes have printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ended(self) -> bool:
        """Whether all of it is gone."""
        if self.process is not None:
            return self.process.poll() is not None
        notes = self._read()
        return bool(notes) and len(notes["codes"]) == len(notes["pids"])

    def wait(self, seconds: float = TIMEOUT_SECONDS, grace_seconds: float | None = None) -> Outcome:
        """Wait for its end; fails and kills where that takes longer.

        Args:
            seconds: Longest time.
            grace_seconds: After the first rank has failed, the others are killed so much later, as
                launchers do; never where None.

        Returns:
            How it ended.
        """
        deadline = time.monotonic() + seconds
        failed_seconds = None
        while not self.ended():
            if grace_seconds is not None and any(self.codes().values()):
                failed_seconds = failed_seconds or time.monotonic()
                if time.monotonic() - failed_seconds > grace_seconds:
                    self.signal(signal.SIGKILL)
            if time.monotonic() > deadline:
                who = [(p.pid, p.status()) for p in self.everybody()]
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {who}\n{self.output()}")
            time.sleep(0.01)
        if self.process is not None:
            took = time.monotonic() - self.started_seconds
            assert self.process.returncode is not None
            return Outcome([self.process.returncode], [took], self.output(), self.folder)
        notes = self._read()
        ranks = [str(rank) for rank in range(len(notes["pids"]))]
        return Outcome(
            [notes["codes"][rank] for rank in ranks],
            [notes["seconds"][rank] for rank in ranks],
            self.output(),
            self.folder,
        )

    def kill(self) -> None:
        """SIGKILL to all that is left."""
        if self.ended():
            return
        everybody = self.everybody()
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(10)  # and by nobody else, who would take its exit code away
        psutil.wait_procs([each for each in everybody if each.pid != self.launcher], timeout=10)
