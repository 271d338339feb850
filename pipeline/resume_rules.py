"""What may change when a run is resumed: one table.

A resumed run promises the numbers of an undisturbed one, so a key keeps its value unless the table
says otherwise. Four answers are possible:

    FREE        the numbers stay the same bit for bit
    ROUNDING    the same run goes on, but sums are rounded in another order or type: samples, masks
                and the schedule stay, losses agree closely and not bit for bit
    REFUSED     what was learned so far depends on it; only somebody who says so may go on, by
                `--accept-config-change`
    IMPOSSIBLE  the commit's weights and averages do not fit, or would mean something else

The schedule is refused only where it would have treated a completed step differently: with a linear
decay, another `schedule.max_steps` would have given every earlier step another learning rate. With
`wsd` it may change until the descent begins, phases may change that have not begun, and extensions
(`deberta extend`) leave completed steps as they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from pipeline.config import RunConfig, ScheduleSection
from pipeline.ds_config import DeepSpeedConfig
from pipeline.findings import raise_findings, show
from pipeline.schedule import learning_rate_factor


class Verdict(Enum):
    """What a changed key means for a resumed run."""

    FREE = "free"
    ROUNDING = "rounding"
    REFUSED = "refused"
    IMPOSSIBLE = "impossible"


ACCEPT_CONFIG = "--accept-config-change"
_SHAPE = "the weights of the commit have another shape"
_MEANING = "the weights of the commit would mean something else"
_NETWORK = (
    ("hidden_size", _SHAPE),
    ("embedding_size", _SHAPE),
    ("num_hidden_layers", _SHAPE),
    ("num_attention_heads", _MEANING),
    ("intermediate_size", _SHAPE),
    ("max_position_embeddings", _SHAPE),
    ("relative_attention", _SHAPE),
    ("position_buckets", _SHAPE),
    ("position_biased_input", _SHAPE),
    ("conv_kernel_size", _SHAPE),
)


RESUME_RULES: tuple[tuple[str, Verdict, str], ...] = (
    ("recipe", Verdict.FREE, "the values that it chose are compared one by one"),
    ("run.folder", Verdict.FREE, "a run folder may be moved"),
    ("run.deterministic", Verdict.ROUNDING, "other kernels"),
    ("data.path", Verdict.FREE, "the dataset's fingerprint is compared instead"),
    (
        "model.vocab_size",
        Verdict.IMPOSSIBLE,
        "a new run with initialize.path and initialize.new_vocabulary=resize takes the rows that"
        " both have",
    ),
    ("model.attention_backend", Verdict.ROUNDING, "the same formula in another order"),
    ("model.compile", Verdict.ROUNDING, "the same formula in other kernels"),
    ("model.activation_checkpointing", Verdict.FREE, "recomputed values are the same"),
    *(
        (f"{network}.{key}", Verdict.IMPOSSIBLE, reason)
        for network in ("generator", "discriminator")
        for key, reason in _NETWORK
    ),
    ("objective.task", Verdict.IMPOSSIBLE, "the commit has other networks"),
    ("objective.enhanced_mask_decoder", Verdict.IMPOSSIBLE, _SHAPE),
    ("objective.rtd_head", Verdict.IMPOSSIBLE, _SHAPE),
    ("objective.embedding_sharing", Verdict.IMPOSSIBLE, "the commit has other word tables"),
    ("objective.update", Verdict.IMPOSSIBLE, "the commit has other optimizers"),
    ("schedule.max_consecutive_skipped_steps", Verdict.FREE, "only says when to give up"),
    (
        "schedule.max_steps",
        Verdict.REFUSED,
        "completed steps would have had other learning rates (`deberta extend` adds steps)",
    ),
    ("schedule.*", Verdict.REFUSED, "completed steps would have been other ones"),
    ("initialize.guard_margin", Verdict.FREE, "only warns"),
    ("initialize.*", Verdict.FREE, "read before the first commit, and never again"),
    ("checkpoint.*", Verdict.FREE, "when to commit, not what"),
    ("safety.*", Verdict.FREE, "what is noticed, and what is done about it"),
    ("evaluation.*", Verdict.FREE, "training never reads a held-out figure"),
    ("logging.*", Verdict.FREE, "when to write, not what"),
    ("reference.*", Verdict.FREE, "only warns"),
    ("*", Verdict.REFUSED, "what was learned so far depends on it"),
)
"""The run configuration: the first pattern that matches a dotted path decides, but a refused change
of the schedule is free where `_completed_steps_agree`."""

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


def changed_keys(old: RunConfig, new: RunConfig, completed_steps: int) -> list[Change]:
    """Compare the run configuration of a run folder with the one given now.

    Args:
        old: From the run's `config.resolved.json`.
        new: What the user asks for.
        completed_steps: Optimizer steps of the commit that the run would go on from.

    Returns:
        The changes in the order of the sections.
    """
    before, now = old.model_dump(mode="json"), new.model_dump(mode="json")
    changes = list(_compare(before, now, RESUME_RULES))
    refused = [
        c for c in changes if c.path.startswith("schedule.") and c.verdict is Verdict.REFUSED
    ]
    if not refused or not _completed_steps_agree(old.schedule, new.schedule, completed_steps):
        return changes
    free = {"verdict": Verdict.FREE, "reason": "completed steps stay what they were"}
    return [replace(change, **free) if change in refused else change for change in changes]


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


def refuse_changes(
    run_folder: str, changes: Sequence[Change], *, is_accepted: bool = False, flag: str = ""
) -> list[str]:
    """Refuse to resume if a change forbids it.

    Args:
        run_folder: For the message.
        changes: From both functions above.
        is_accepted: The user has said that REFUSED changes are wanted.
        flag: The option by which a user says so, for the message; none where there is no such one.

    Returns:
        Warnings: one line for each change after which the run is not bit for bit the same.

    Raises:
        UserError: With every change that stands in the way, its old and new value, and the cure.
    """
    cures = {
        Verdict.IMPOSSIBLE: "no flag can accept this; set it back, or start a new run with another"
        " run.folder",
        Verdict.REFUSED: "set it back, or start a new run with another run.folder"
        + (f", or accept it with {flag}" if flag else ""),
    }
    if is_accepted:
        del cures[Verdict.REFUSED]
    raise_findings(
        f"resuming {run_folder}",
        [f"{change}; {cures[change.verdict]}" for change in changes if change.verdict in cures],
    )
    return [str(change) for change in changes if change.verdict is Verdict.ROUNDING]


def _completed_steps_agree(old: ScheduleSection, new: ScheduleSection, steps: int) -> bool:
    """Whether both schedules give the first steps of a run the same phases and learning rates."""
    return _phases_so_far(old, steps) == _phases_so_far(new, steps) and all(
        learning_rate_factor(step, old) == learning_rate_factor(step, new) for step in range(steps)
    )


def _phases_so_far(schedule: ScheduleSection, steps: int) -> list[tuple[int, Any, Any]]:
    """Phases that have begun: where they end within `steps`, their length and batch as written."""
    starts = [0, *(phase.until_step for phase in schedule.phases)]
    return [
        (min(phase.until_step, steps), phase.sequence_length, phase.train_batch_size)
        for start, phase in zip(starts, schedule.phases, strict=False)
        if start < steps
    ]


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
