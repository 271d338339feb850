"""Programs that a look starts: ended in time with all that they have started, never by a shell."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pipeline

_OF_LAUNCHERS = ("SLURM", "OMPI", "PMI", "PMIX", "MPI", "HYDRA", "TORCHELASTIC")
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SPEAKS_OF_ERRORS = re.compile(r"rror|nsupported|enied|efused|annot|ot found|o such|no end within")


@dataclass(frozen=True)
class Answer:
    """What a program has said."""

    code: int | None
    """Its exit code; None where it was ended for taking too long, or could not be started."""
    output: str
    errors: str

    @property
    def reason(self) -> str:
        """The last line that speaks of an error, or else the last one with a word."""
        lines = [line.strip() for line in f"{self.output}\n{self.errors}".splitlines()]
        lines = [line for line in reversed(lines) if re.search("[A-Za-z]{2}", line)]
        speaking = [line for line in lines if _SPEAKS_OF_ERRORS.search(line)]
        return next(iter([*speaking, *lines]), f"exit code {self.code}")


def child_environment(inherited: Mapping[str, str], **added: str) -> dict[str, str]:
    """Make an environment in which no launcher has started this process.

    Args:
        inherited: Of this process.
        added: Variables on top.

    Returns:
        Name -> value, with this program's packages on the path of imports.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(_OF_LAUNCHERS) and name not in _OF_RANKS
    }
    places = (str(Path(pipeline.__file__).parents[1]), inherited.get("PYTHONPATH", ""))
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, places)), **added}


class Child:
    """A program that runs beside this one, in a session of its own."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            words: Program and arguments.
            environment: Its whole environment.

        Raises:
            OSError: It cannot be started.
        """
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def wait(self, timeout_seconds: float) -> Answer:
        """Wait for its end, and end it and its own children if that does not come.

        Args:
            timeout_seconds: How long.

        Returns:
            What it has said.
        """
        try:
            output, errors = self._process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            output, errors = self._end()
            return Answer(None, output, f"{errors}\nno end within {timeout_seconds:.0f} s")
        except BaseException:  # an interrupt reaches this process alone
            self._end()
            raise
        return Answer(self._process.returncode, output, errors)

    def _end(self) -> tuple[str, str]:
        """Kill it and what it has started; returns what it had written."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.communicate()


def ask(words: Sequence[str], environment: Mapping[str, str], timeout_seconds: float) -> Answer:
    """Start a program and wait for its end.

    Args:
        words: Program and arguments.
        environment: Its whole environment.
        timeout_seconds: How long.

    Returns:
        What it has said; a program that cannot be started says why in `errors`.
    """
    try:
        return Child(words, environment).wait(timeout_seconds)
    except OSError as error:
        return Answer(None, "", f"{words[0]}: {error.strerror or error}")
