"""What a run does about steps that must not count: it goes on, goes back to a commit, or ends.

    DivergencePolicy   the decision, from what a step showed and from the roll-backs before
    write_dump         what people need to find the cause: losses, norms, rates, samples, rows
    diverged_error     the end, with exit code 87

A roll-back puts the state back to the newest commit and leaves out the data since then, so that the
same samples do not bring the run to the same place. Its line in skipped_data.jsonl is written
first (`pipeline.skip_list`): a roll-back cannot forget itself, whatever is restored or killed.

Where ranks differ in what they should hold alike, no data is to blame: the run goes back and takes
the same data again.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from data_prep.errors import DivergedError
from pipeline.config import SafetySection
from pipeline.data import TrainBatches
from pipeline.engine_stepping import StepOutcome
from pipeline.replicas import ReplicaFinding
from pipeline.run_folder import write_durably
from pipeline.skip_list import RollBack
from pipeline.spikes import Spike

Action = Literal["go on", "roll back", "stop"]
_DUMPED_ROWS = 50
_DUMPED_STEPS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What to do after a step; the same on all ranks."""

    action: Action
    reason: str = ""
    """One sentence for people; what goes on with one is worth a warning."""
    leaves_out_data: bool = True
    """Whether the data since the commit is to blame."""


class DivergencePolicy:
    """Decides after every step, from values that are the same on all ranks."""

    def __init__(self, safety: SafetySection, max_consecutive_skipped_steps: int) -> None:
        """Keep the limits.

        Args:
            safety: What is done about a spike, and how often.
            max_consecutive_skipped_steps: Steps in a row without a finite gradient.
        """
        self._safety = safety
        self._max_consecutive_skipped_steps = max_consecutive_skipped_steps

    def decide(
        self,
        *,
        consecutive_skipped: int,
        spike: Spike | None,
        replicas: Sequence[ReplicaFinding],
        newest_commit: int | None,
        roll_backs: Sequence[RollBack],
    ) -> Decision:
        """Judge a step.

        Args:
            consecutive_skipped: Steps in a row, this one the last, in which some engine refused.
            spike: Of this step's losses.
            replicas: What ranks do not hold alike.
            newest_commit: Step of the commit to go back to; None where there is none.
            roll_backs: All of the run.

        Returns:
            What to do, and why.
        """
        limit = self._max_consecutive_skipped_steps
        if replicas:
            reason = "; ".join(finding.explain() for finding in replicas)
        elif consecutive_skipped >= limit:
            reason = (
                f"{consecutive_skipped} steps in a row had a non-finite gradient "
                f"(schedule.max_consecutive_skipped_steps is {limit})"
            )
        elif spike is not None and self._safety.spike_policy == "rollback":
            reason = spike.explain()
        else:
            # Of spikes in a row, the first is told.
            told = spike.explain() if spike is not None and spike.in_a_row == 1 else ""
            return Decision("go on", told)
        if newest_commit is None:
            text = f"{reason}, and there is no commit to go back to"
            return Decision("stop", text, leaves_out_data=not replicas)
        tried, allowed = roll_backs_around(newest_commit, roll_backs), self._safety.max_rollbacks
        if tried >= allowed:
            after = f", after {tried} roll-backs to about here" if tried else ""
            text = f"{reason}{after} (safety.max_rollbacks is {allowed})"
            return Decision("stop", text, leaves_out_data=not replicas)
        return Decision("roll back", reason, leaves_out_data=not replicas)


def roll_backs_around(commit_step: int, roll_backs: Sequence[RollBack]) -> int:
    """Count the roll-backs that the run has not got past.

    Args:
        commit_step: Step of the newest commit.
        roll_backs: All of the run.

    Returns:
        Those between whose two steps the commit lies: a commit behind the step that diverged ends
        the count, one on the way there does not.
    """
    return sum(each.commit_step <= commit_step <= each.at_step for each in roll_backs)


@dataclass(frozen=True)
class DivergedStep:
    """What is known about the step that the run goes no further with."""

    step: int
    """Completed optimizer steps, this one included."""
    bad_steps: int
    """Steps in a row that showed it, this one the last."""
    losses: Mapping[str, float]
    """Global losses of this step."""
    outcomes: Mapping[str, StepOutcome]
    """By engine."""
    learning_rates: Mapping[str, float]
    """By network."""


def write_dump(
    folder: Path,
    diverged: DivergedStep,
    decision: Decision,
    batches: TrainBatches,
    roll_backs: Sequence[RollBack],
    *,
    is_main: bool,
    group: dist.ProcessGroup | None,
) -> str:
    """Write what people need to find the cause; a collective.

    Args:
        folder: The run folder.
        diverged: The step.
        decision: What is done about it.
        batches: The data, which names the samples of every rank.
        roll_backs: Those before this decision.
        is_main: Whether this is rank 0, which writes.
        group: Control group of all ranks; None for a single process.

    Returns:
        Where `divergence-step-NNNNNNNN.json` is, or why it could not be written.
    """
    box = [""]
    if is_main:
        content = {
            "step": diverged.step,
            "reason": decision.reason,
            "action": decision.action,
            "losses": dict(diverged.losses),
            "grad_norms": {name: each.grad_norm for name, each in diverged.outcomes.items()},
            "applied": {name: each.applied for name, each in diverged.outcomes.items()},
            "learning_rates": dict(diverged.learning_rates),
            "roll_backs": [asdict(each) for each in roll_backs],
            "samples": list(_samples(diverged, batches)),
            "rows": _last_rows(folder / "metrics.jsonl"),
        }
        # A line for each key: the samples of a large world would fill thousands.
        lines = [f"{json.dumps(k)}: {json.dumps(_plain(v))}" for k, v in content.items()]
        box = [_write(folder, diverged.step, "{\n" + ",\n".join(lines) + "\n}\n")]
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def diverged_error(
    decision: Decision, step: int, newest_commit: int | None, dump: str
) -> DivergedError:
    """Word the end of a run.

    Args:
        decision: To stop.
        step: Completed optimizer steps.
        newest_commit: Step of the newest commit; None where there is none.
        dump: What `write_dump` returned.

    Returns:
        The error, with the cures.
    """
    newest, again = "", "begins anew"
    if newest_commit is not None:
        newest, again = f"; the newest commit is step {newest_commit}", "goes on from there"
    cure = "Take the node of that rank out of service"
    if decision.leaves_out_data:
        cure = (
            "Lower optimizer.*_learning_rate, use bf16 instead of fp16, raise "
            "schedule.warmup_steps, or raise the limit that is named"
        )
    return DivergedError(
        f"step {step}: {decision.reason}{newest}. Losses, gradient norms and sample ids: {dump}. "
        f"{cure}; then the same command {again}"
    )


def _samples(diverged: DivergedStep, batches: TrainBatches) -> Iterator[dict[str, Any]]:
    """Which samples every rank took in the last bad steps."""
    bad_steps = max(1, min(diverged.bad_steps, _DUMPED_STEPS, diverged.step))
    for step in range(diverged.step - bad_steps, diverged.step):
        length = batches.schedule.phase_at(step).sequence_length
        stream = batches.streams[length]
        for rank in range(batches.world_size):
            epochs, samples = batches.samples_at(step, rank)
            yield {
                "completed_steps_before": step,
                "sequence_length": length,
                "rank": rank,
                "epochs": epochs.tolist(),
                "samples": samples.tolist(),
                "first_tokens": [stream.token_range(sample)[0] for sample in samples.tolist()],
            }


def _last_rows(path: Path) -> list[Any]:
    """The newest rows of metrics.jsonl; what is no JSON, such as a torn row, as its text."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_DUMPED_ROWS:]
    except OSError as error:
        return [f"{path}: {error}"]
    return [_row(line) for line in lines]


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _plain(value: Any) -> Any:
    """The same with what JSON has no number for as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _write(folder: Path, step: int, text: str) -> str:
    """Write under a name that no earlier dump has; the path, or why there is none."""
    stem = f"divergence-step-{step:08d}"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    path = next(p for p in (folder / f"{name}.json" for name in names) if not p.exists())
    try:
        write_durably(path, text)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)
        return f"{path} (which could not be written: {error.strerror})"
    return str(path)
