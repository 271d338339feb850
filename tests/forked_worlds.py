"""Training worlds as `tests.worlds` starts them, but forked: for tests that are about no launcher.

A process that a launcher starts imports for six seconds; one that is forked from a server which has
imported everything (`tests.faults.forks`) trains at once. Ranks are real processes all the same.
"""

import contextlib
import time
from pathlib import Path

from tests.faults.forks import shared_server
from tests.faults.running import Running
from tests.worlds import TIMEOUT_SECONDS, command

# A launcher ends the other ranks when one has failed.
GRACE_SECONDS = 15.0


@contextlib.contextmanager
def started(program, words, folder, ranks=1):
    """A world at work on a run folder, `program` "train" or "deberta"; dead when the block ends."""
    folder = Path(folder)
    log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
    request = {
        "program": program,
        "words": [str(word) for word in words],
        "ranks": ranks,
        "present": [*range(ranks)],
        "log": str(log),
        "notes": str(log.with_suffix(".json")),
        "samples": str(log.with_suffix(".samples")),
        "variables": {},
        "clock_jump_seconds": 0.0,
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    running = Running(folder, log.with_suffix(".json"), log, shared_server().launch(request))
    try:
        yield running
    finally:
        running.kill()


def words_of(*arguments):
    """What stands behind `python -m pipeline.train`; arguments as for `tests.worlds.command`."""
    return command(*arguments, launcher="python")[3:]


def end_of(running):
    """(exit code of the first rank that failed or 0, everything that the world printed)."""
    outcome = running.wait(TIMEOUT_SECONDS, GRACE_SECONDS)
    return next((code for code in outcome.codes if code), 0), outcome.output


def train(*arguments, ranks=1):
    """Run a world to its end; (exit code, everything it printed)."""
    with started("train", words_of(*arguments), arguments[3], ranks) as running:
        return end_of(running)


def train_and_kill(when, signal_number, *arguments, ranks=1):
    """Start a world and signal all of its ranks once `when()` holds."""
    with started("train", words_of(*arguments), arguments[3], ranks) as running:
        running.until(when)
        running.signal(signal_number)
        return end_of(running)


def deberta(words, folder):
    """Run `deberta WORDS`, which works on a run folder, to its end; as `train`."""
    with started("deberta", words, folder) as running:
        return end_of(running)
