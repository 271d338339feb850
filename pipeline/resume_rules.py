"""What may change when a run is resumed: one table.

A resumed run promises the numbers of an undisturbed one, so a key keeps its value unless the table
says otherwise. Two answers are possible besides "refused":

    FREE      the numbers stay the same bit for bit
    ROUNDING  the same run goes on, but sums are rounded in another order or type: samples, masks
              and the schedule stay, losses agree closely and not bit for bit

The batch size, the clipping norm and the schedule are refused, because what was learned so far
depends on them: a changed `schedule.max_steps` would have given every earlier step another learning
rate. The cure is a new run folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from pipeline.config import RunConfig
from pipeline.ds_config import DeepSpeedConfig
from pipeline.findings import raise_findings, show


class Verdict(Enum):
    """What a changed key means for a resumed run."""

    FREE = "free"
    ROUNDING = "rounding"
    REFUSED = "refused"


RESUME_RULES: tuple[tuple[str, Verdict, str], ...] = (
    ("run.folder", Verdict.FREE, "a run folder may be moved"),
    ("run.deterministic", Verdict.ROUNDING, "other kernels"),
    ("data.path", Verdict.FREE, "the dataset's fingerprint is compared instead"),
    ("model.attention_backend", Verdict.ROUNDING, "the same formula in another order"),
    ("model.activation_checkpointing", Verdict.FREE, "recomputed values are the same"),
    ("schedule.max_consecutive_skipped_steps", Verdict.FREE, "only says when to give up"),
    ("checkpoint.*", Verdict.FREE, "when to commit, not what"),
    ("evaluation.*", Verdict.FREE, "training never reads a held-out figure"),
    ("logging.*", Verdict.FREE, "when to write, not what"),
    ("reference.*", Verdict.FREE, "only warns"),
    ("*", Verdict.REFUSED, "what was learned so far depends on it"),
)
"""The run configuration: the first pattern that matches a dotted path decides."""

DEEPSPEED_RESUME_RULES: tuple[tuple[str, Verdict, str], ...] = (
    ("train_batch_size", Verdict.REFUSED, "it decides which samples each step sees"),
    ("gradient_clipping", Verdict.REFUSED, "what was learned so far depends on it"),
    ("steps_per_print", Verdict.FREE, "only writes"),
    ("wall_clock_breakdown", Verdict.FREE, "only writes"),
    ("memory_breakdown", Verdict.FREE, "only writes"),
    ("dump_state", Verdict.FREE, "only writes"),
    ("log_level", Verdict.FREE, "only writes"),
    ("flops_profiler*", Verdict.FREE, "only writes"),
    ("comms_logger*", Verdict.FREE, "only writes"),
    ("*", Verdict.ROUNDING, "how the same step is computed"),
)
"""The DeepSpeed JSON: the first pattern that matches a dotted path decides."""


@dataclass(frozen=True)
class Change:
    """One key whose value differs from that of the run's earlier part.

    Attributes:
        path: Dotted path; "deepspeed." stands before keys of the DeepSpeed JSON.
        old: Value so far; None if the key was not there.
        new: Value now; None if the key is gone.
        verdict: What it means.
        reason: Why, in a few words.
    """

    path: str
    old: Any
    new: Any
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.path} was {show(self.old)} and is now {show(self.new)}: {self.reason}"


def changed_keys(old: RunConfig, new: RunConfig) -> list[Change]:
    """Compare the run configuration of a run folder with the one given now.

    Args:
        old: From the run's `config.resolved.json`.
        new: What the user asks for.

    Returns:
        The changes in the order of the sections.
    """
    return list(_compare(old.model_dump(mode="json"), new.model_dump(mode="json"), RESUME_RULES))


def changed_deepspeed_keys(old: DeepSpeedConfig, new: DeepSpeedConfig) -> list[Change]:
    """Compare two DeepSpeed JSONs; writing a default out is no change.

    Args:
        old: From the run's `config.resolved.json`.
        new: What the user hands over now.

    Returns:
        The changes, their paths prefixed with "deepspeed.".
    """
    before, after = old.settings.model_dump(), new.settings.model_dump()
    return list(_compare(before, after, DEEPSPEED_RESUME_RULES, prefix="deepspeed."))


def refuse_changes(run_folder: str, changes: Sequence[Change]) -> list[str]:
    """Refuse to resume if a change forbids it.

    Args:
        run_folder: For the message.
        changes: From both functions above.

    Returns:
        Warnings: one line for each change after which the run is not bit for bit the same.

    Raises:
        UserError: With every refused change, its old and new value, and the cure.
    """
    cure = "set it back, or start a new run with another run.folder"
    raise_findings(
        f"resuming {run_folder}",
        [f"{change}; {cure}" for change in changes if change.verdict is Verdict.REFUSED],
    )
    return [str(change) for change in changes if change.verdict is Verdict.ROUNDING]


def _compare(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    rules: Sequence[tuple[str, Verdict, str]],
    prefix: str = "",
) -> Iterator[Change]:
    """Changes between two nested mappings, judged by the first rule that matches."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    for path in {**before, **after}:
        if before.get(path) != after.get(path):
            verdict, reason = next(
                (verdict, reason)
                for pattern, verdict, reason in rules
                if fnmatchcase(path, pattern)
            )
            yield Change(f"{prefix}{path}", before.get(path), after.get(path), verdict, reason)


def _flatten(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; a list is a leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
