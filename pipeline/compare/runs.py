"""Training all runs of a comparison, one process after the other.

Every run is `python -m pipeline.train ...`, which resumes by itself: the same comparison goes on
where it was stopped or killed. A run that fails is reported and the next one begins.
"""

import json
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from data_prep.errors import EXIT_STOPPED, UserError
from pipeline.compare.plan import MARKER, Plan, Run, marker_text
from pipeline.run_folder import write_durably

_TAIL_LINES = 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(UserError):
    """Somebody asked to stop; every run has committed what it had."""

    exit_code = EXIT_STOPPED


@dataclass(frozen=True)
class Failure:
    """A run, or the scoring of one, that did not succeed."""

    run: str
    """Name of the run."""
    reason: str
    """What went wrong, with the end of the log."""


def is_done(run: Run) -> bool:
    """Tell whether a run has nothing left to do.

    Args:
        run: A run that fits its plan.

    Returns:
        Whether its last step is committed.
    """
    state = run.folder / "state.json"
    if not state.is_file():
        return False
    value = json.loads(state.read_text(encoding="utf-8"))
    return value["status"] == "done" and value["step"] == run.system.config.schedule.max_steps


def train_all(plan: Plan, say: Callable[[str], None]) -> list[Failure]:
    """Train every run that is not done.

    Args:
        plan: The comparison.
        say: Gets a line before and after each run.

    Returns:
        The runs that failed.

    Raises:
        UserError: Another process compares in this folder.
        StoppedError: SIGINT, SIGTERM or SIGHUP came; the run that trained has committed.
    """
    failures = []
    with ExitStack() as cleanup:
        _prepare(plan, cleanup)
        relay = cleanup.enter_context(_SignalRelay())
        for number, run in enumerate(plan.runs, start=1):
            where = f"[{number}/{len(plan.runs)}] {run.name}"
            if is_done(run):
                say(f"{where}: done before")
                continue
            say(f"{where}: {run.system.config.schedule.max_steps:,} steps, log {run.log}")
            started_seconds = time.monotonic()
            code = _train(plan.command(run), run.log, relay)
            if relay.is_stopped or code == EXIT_STOPPED:
                raise StoppedError(f"stopped in {run.name}; the same command goes on")
            seconds = time.monotonic() - started_seconds
            if code:
                failures.append(Failure(run.name, f"ended with {code}; {_tail(run.log)}"))
            say(f"{where}: {'FAILED' if code else 'done'} after {seconds:.0f} s")
    return failures


def _prepare(plan: Plan, cleanup: ExitStack) -> None:
    """Make the folders, and keep other comparisons out of them."""
    for name in ("runs", "logs", "finetuned"):
        (plan.output / name).mkdir(parents=True, exist_ok=True)
    write_durably(plan.output / MARKER, marker_text(plan))
    try:
        cleanup.enter_context(FileLock(plan.output / ".lock").acquire(timeout=0))
    except Timeout:
        raise UserError(
            f"--output {plan.output} is in use by another `deberta compare`: wait for it, or choose"
            " another folder"
        ) from None


def _train(command: Sequence[str], log: Path, relay: "_SignalRelay") -> int:
    """Run a training process; what it prints is appended to its log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        return relay.wait(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))


def _tail(log: Path) -> str:
    """Quote the end of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"{log} ends with", *lines[-_TAIL_LINES:]])


class _SignalRelay:
    """Passes requests to stop on to the training process, and waits for its commit.

    A terminal sends its own to the whole process group: the trainer then hears of one request
    twice, which it takes for one.
    """

    def __init__(self) -> None:
        self.is_stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_SignalRelay":
        is_main = threading.current_thread() is threading.main_thread()
        numbers = _SIGNALS if is_main else ()
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.is_stopped = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, process: "subprocess.Popen[bytes]") -> int:
        """Wait for a process.

        Args:
            process: A training process.

        Returns:
            Its exit code.
        """
        self._process = process
        if self.is_stopped:  # between the process's birth and its name here
            self._pass_on()
        code = process.wait()
        self._process = None
        return code
