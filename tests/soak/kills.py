"""One random kill: when, which signal, to whom; and a world that it is done to.

by point   DEBERTA_FAULT strikes at a named place of the program, of one rank or of all
by time    the signal comes from outside, a random time after something was seen to begin
"""

import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.harness import Lab, Setup
from tests.faults.running import Outcome, Running

MAX_STEPS, COMMIT_STEPS, EVALUATION_STEPS = 40, 5, 8
WORDS = (
    f"schedule.max_steps={MAX_STEPS}",
    f"checkpoint.interval_steps={COMMIT_STEPS}",
    f"evaluation.interval_steps={EVALUATION_STEPS}",
)
SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1")
POINTS = {
    "start-up": ("start.world", "start.data", "start.engines"),
    "step": (
        "data.read",
        "step.begin",
        "step.forward",
        "step.generator_update",
        "step.discriminator_update",
        "step.end",
        "metrics.write",
    ),
    "evaluation": ("evaluate.batch",),
    "save": (
        "save.begin",
        "save.share",
        "save.written",
        "save.manifest",
        "save.rename",
        "save.latest",
        "save.prune",
    ),
}
OF_RANK_0 = ("save.manifest", "save.rename", "save.latest", "save.prune", "metrics.write")
_PATIENCE_SECONDS = 120
_GRACE_SECONDS = 8
"""What a launcher leaves to the ranks of a world in which one has failed."""
_STEP_SECONDS = 0.2


@dataclass(frozen=True)
class Kill:
    """What will be done to one start of a run."""

    moment: str
    """start-up, step, evaluation or save."""
    signal: str
    everybody: bool
    rank: int
    """Which one, where not everybody."""
    step: int
    """Completed steps at which it comes."""
    point: str
    """Where; empty for a kill by time."""
    delay: float
    """By time: how long after the moment began, as a share of what it takes."""

    @property
    def fault(self) -> str:
        """DEBERTA_FAULT; empty for a kill by time."""
        if not self.point:
            return ""
        who = "*" if self.everybody else str(self.rank)
        step = "*" if self.moment == "start-up" else str(self.step)
        return f"{self.point}:{who}:{step}:signal:{self.signal}"


def choose(choices: random.Random, ranks: int, step: int) -> Kill:
    """Draw a kill that can still happen to a run that continues from a commit."""
    moment = choices.choice([*POINTS])
    point = choices.choice(POINTS[moment]) if choices.random() < 0.5 else ""
    period = {"evaluation": EVALUATION_STEPS, "save": COMMIT_STEPS}.get(moment, 1)
    first = (step // period + 1) * period
    at = min(first + period * choices.randrange(2 if period > 1 else 8), MAX_STEPS)
    if moment == "step":
        at = min(at, MAX_STEPS - 1)
    everybody = choices.random() < 0.3
    rank = 0 if point in OF_RANK_0 else choices.randrange(ranks)
    return Kill(moment, choices.choice(SIGNALS), everybody, rank, at, point, choices.random())


def run_and_kill(
    lab: Lab, run: Path, setup: Setup, words: tuple[str, ...], kill: Kill
) -> tuple[Outcome, bool]:
    """Start a world, kill it; how it ended, and whether the kill found it alive."""
    with lab.start(run, setup, *words, fault=kill.fault) as running:
        if kill.fault:
            outcome = running.wait(_PATIENCE_SECONDS, _GRACE_SECONDS)
            return outcome, set(outcome.codes) != {0}
        alive = _until(running, run, kill)
        if alive:
            ranks = () if kill.everybody else (kill.rank,)
            running.signal(signal.Signals[kill.signal], *ranks)
        return running.wait(_PATIENCE_SECONDS, _GRACE_SECONDS), alive


def _until(running: Running, run: Path, kill: Kill) -> bool:
    """Wait for the moment of a kill by time; False where the world ended before."""
    if kill.moment == "start-up":
        running.pids()
        time.sleep(2.0 * kill.delay)
        return not running.ended()
    partial = run / "checkpoints" / f"step-{kill.step:08d}.partial"
    # Evaluation and save come behind the step that makes the count full.
    target = kill.step - (kill.moment != "step")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not running.ended() and time.monotonic() < deadline:
        begun = _newest_begun(running)
        saving = kill.moment != "save" or partial.exists() or begun > target
        if begun >= target and saving:
            share = 0.2 if kill.moment == "save" else 1.0
            time.sleep(_STEP_SECONDS * share * kill.delay)
            return not running.ended()
        time.sleep(0.002)
    return False


def _newest_begun(running: Running) -> int:
    """The step that rank 0 has begun last in this start; -1 for none."""
    lines = running.new_records().rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])[0] if lines else -1
