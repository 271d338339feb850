"""Stays beside a launcher, and judges by state.json: launchers hang, or end with 0 too early.

A request to stop (SIGTERM, SIGUSR1, SIGINT) becomes the file RUN/stop, which all ranks act on; the
launchers would end the ranks, or die and leave them alone. A second one, three seconds later, ends
the launcher.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import EXIT_CORRUPT, EXIT_DIVERGED, EXIT_HANG, EXIT_STOPPED
from pipeline.hang_report import Beat
from pipeline.stop_signal import SECOND_SIGNAL_SECONDS, STOP_FILE
from pipeline.terminal import tell

EXIT_CODES = {
    "done": 0,
    "stopped": EXIT_STOPPED,
    "hang": EXIT_HANG,
    "diverged": EXIT_DIVERGED,
    "corrupt": EXIT_CORRUPT,
}
_EXIT_CRASHED = 1
_LOOK_SECONDS = 0.5
_BEAT_SECONDS = 7.0
"""Living ranks write their heartbeats every five seconds."""
_END_SECONDS = 10.0


@dataclass(frozen=True)
class _State:
    """state.json."""

    status: str = ""
    step: int = 0
    reason: str = ""

    @classmethod
    def read(cls, run: Path) -> "_State":
        try:
            value = json.loads((run / "state.json").read_text(encoding="utf-8"))
            return cls(str(value["status"]), int(value["step"]), str(value["reason"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


class Supervisor:
    """Starts a launcher and says how the run has ended."""

    def __init__(self, run: Path, ranks: int, patience_seconds: float) -> None:
        """Prepare.

        Args:
            run: The run folder.
            ranks: Of all hosts.
            patience_seconds: For the launcher to end behind the run.
        """
        self._run = run
        self._ranks = ranks
        self._patience_seconds = patience_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._asked_seconds: float | None = None

    def run(self, words: list[str], variables: Mapping[str, str]) -> int:
        """Run a launcher to its end.

        Args:
            words: Its command line.
            variables: Its environment.

        Returns:
            The exit code that a rank would have: by state.json, whatever the launcher says.
        """
        before = self._stamp()
        # A session of its own: a terminal's interrupt is a request to stop, not for the launcher.
        self._process = subprocess.Popen(words, env=dict(variables), start_new_session=True)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)
        code = self._wait(before)
        state = _State.read(self._run) if self._stamp() != before else _State()
        if state.status in EXIT_CODES:
            why = f": {state.reason}" if state.reason else ""
            tell(f"the run is {state.status} at step {state.step:,}{why}")
            return EXIT_CODES[state.status]
        if state.status == "running":
            self._tell_of_crash(code, state)
            return _EXIT_CRASHED
        tell(f"training did not begin: the launcher ended with {code}; its lines say why")
        return code if code > 0 else _EXIT_CRASHED

    def _stamp(self) -> tuple[int, int]:
        """Changes whenever state.json is replaced."""
        try:
            found = (self._run / "state.json").stat()
        except OSError:
            return (0, 0)
        return found.st_ino, found.st_mtime_ns

    def _wait(self, before: tuple[int, int]) -> int:
        """Wait for the launcher, and end one that outlives its run."""
        assert self._process is not None
        ended_seconds: float | None = None
        while (code := self._process.poll()) is None:
            time.sleep(_LOOK_SECONDS)
            is_over = self._stamp() != before and _State.read(self._run).status in EXIT_CODES
            if not is_over:
                ended_seconds = None
                continue
            ended_seconds = ended_seconds or time.monotonic()
            if time.monotonic() - ended_seconds > self._patience_seconds:
                tell("the run has ended and its launcher has not: it is ended")
                self._end()
        return code

    def _end(self) -> None:
        """End the launcher and what it has started here."""
        assert self._process is not None
        # First alone: DeepSpeed's ends its ranks on the other hosts then, by pdsh and pkill.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_seconds is None:
            self._asked_seconds = now
            tell(f"{signal.Signals(number).name}: all ranks commit and stop at their next step")
            with contextlib.suppress(OSError):
                (self._run / STOP_FILE).touch()
        elif now - self._asked_seconds >= SECOND_SIGNAL_SECONDS and self._process is not None:
            self._process.terminate()

    def _tell_of_crash(self, code: int, state: _State) -> None:
        """Say where the run is, and who goes on without a launcher."""
        tell(
            f"the launcher ended with {code}, and the run did not: state.json says running, with "
            f"step {state.step:,} committed; the same command goes on from there"
        )
        living = self._living()
        if living:
            names = ", ".join(living)
            tell(
                f"still at work: {names}; they hold the run folder: `touch "
                f"{self._run / STOP_FILE}` lets them commit and stop"
            )

    def _living(self) -> list[str]:
        """Names of ranks whose heartbeats go on."""
        folder = self._run / "heartbeats"
        before = [Beat.read(folder, rank) for rank in range(self._ranks)]
        time.sleep(_BEAT_SECONDS)
        after = [Beat.read(folder, rank) for rank in range(self._ranks)]
        pairs = zip(before, after, strict=True)
        return [
            new.name for old, new in pairs if new is not None and old is not None and new != old
        ]
