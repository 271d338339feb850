"""Is a run healthy? Its losses beside those of runs that were made, step by step.

    make_reference     runs that differ in the seed -> a reference
    find_reference     a run's configuration -> the shipped or named reference of the same system
    judge              the rows of a run -> what to say at a milestone
    HealthCheck        the same during training

A reference is a JSON file with the rows of finished runs, and says where and when they were made.
It belongs to a configuration: whatever decides what is learned must be the same, but the seed, the
data and how it is computed may differ. Losses of other text say nothing about health, so that only
the dataset of the reference gets a verdict.

Milestones are the steps 1, 2, 5, 10, 20, 50, ... of the reference. At each the mean loss over the
second half of the steps so far is compared, because single rows are noisy.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from data_prep.errors import UserError
from pipeline.config import RunConfig

JUDGED = ("train/mlm_loss", "train/rtd_loss")
"""Figures that a verdict is about; lower is better."""
KEPT = (*JUDGED, "train/mlm_accuracy", "train/rtd_accuracy_replaced", "train/rtd_accuracy_original")
"""Figures that a reference holds."""
_FORMAT_VERSION = 1
_TOLERATED_DEVIATIONS = 4.0
_LEAST_TOLERANCE = 0.03  # relative; three seeds may by chance lie close together
# What a reference does not depend on: names, seeds, text, and how the same thing is computed.
_FREE = (
    *("recipe", "run.*", "data.path", "data.source_weights", "initialize.guard_margin"),
    *("model.attention_backend", "model.compile", "model.activation_checkpointing"),
    *("schedule.max_consecutive_skipped_steps", "checkpoint.*", "safety.*", "evaluation.*"),
    *("logging.*", "reference.*"),
)

Row = Mapping[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class ReferenceCurve:
    """What finished runs of one configuration showed."""

    name: str
    where: str
    """Processor or GPU that it was made on."""
    date: str
    """ISO date of the last of the runs."""
    data: str
    """The text, in a few words."""
    train_content: str
    """Hash over the training tokens (`pipeline.run_data.summarize_dataset`)."""
    keys: Mapping[str, Any]
    """Dotted path -> value of all that must be the same."""
    steps: tuple[int, ...]
    """Of the rows, increasing."""
    figures: Mapping[str, tuple[tuple[float, ...], ...]]
    """Name -> for each seed its values at `steps`."""

    @property
    def num_seeds(self) -> int:
        """Runs that it was made of."""
        return len(next(iter(self.figures.values())))

    @property
    def label(self) -> str:
        """How it is named beside a curve."""
        seeds = "1 seed" if self.num_seeds == 1 else f"{self.num_seeds} seeds"
        return f"{self.name}, {seeds}, {self.where}, {self.date}"

    @property
    def milestones(self) -> tuple[int, ...]:
        """Steps at which a run is compared with it."""
        steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
        return tuple(step for step in steps if self.steps[0] <= step <= self.steps[-1])


@dataclass(frozen=True)
class Verdict:
    """A run beside its reference at one milestone."""

    step: int
    is_healthy: bool | None
    """None where the text is another one: then nothing can be said."""
    text: str
    """For people."""


def reference_keys(config: RunConfig, train_batch_size: int) -> dict[str, Any]:
    """Collect what a reference belongs to.

    Args:
        config: A run.
        train_batch_size: Sequences of its optimizer step.

    Returns:
        Dotted path -> JSON value of every key that decides what is learned.
    """
    flat: dict[str, Any] = {"train_batch_size": train_batch_size}
    for section, values in config.model_dump(mode="json").items():
        inner = values if isinstance(values, dict) else {"": values}
        for key, value in inner.items():
            path = f"{section}.{key}" if key else section
            if not any(fnmatchcase(path, pattern) for pattern in _FREE):
                flat[path] = value
    return flat


def make_reference(
    name: str,
    runs: Sequence[Sequence[Row]],
    *,
    where: str,
    date: str,
    data: str,
    train_content: str,
    keys: Mapping[str, Any],
) -> ReferenceCurve:
    """Make a reference of finished runs that differ in the seed alone.

    Args:
        name: What it is called beside a curve.
        runs: Rows of each run's metrics.jsonl.
        where: Processor or GPU.
        date: ISO date.
        data: The text, in a few words.
        train_content: Hash over the training tokens that all of them read.
        keys: `reference_keys` of all of them.

    Returns:
        The reference, over the steps that every run has a row for.

    Raises:
        UserError: There is no such step, or a loss is not finite.
    """
    by_step = [{row["step"]: row for row in rows if JUDGED[0] in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    if not steps:
        raise UserError(
            "the runs have no step with a row in common: give runs of one logging.interval_steps"
        )
    names = [name for name in KEPT if all(name in rows[steps[0]] for rows in by_step)]
    values = {
        figure: tuple(
            tuple(_finite(rows[step], figure, number) for step in steps)
            for number, rows in enumerate(by_step, start=1)
        )
        for figure in names
    }
    return ReferenceCurve(name, where, date, data, train_content, dict(keys), tuple(steps), values)


def _finite(row: Row, figure: str, run: int) -> float:
    value = row.get(figure)
    if value is None:
        raise UserError(
            f"run {run}: {figure} is not finite at step {row['step']}; a reference is made of "
            "healthy runs"
        )
    return value


def to_json_value(reference: ReferenceCurve) -> dict[str, Any]:
    """Give a reference the form of its file.

    Args:
        reference: The reference.

    Returns:
        JSON-ready values.
    """
    return {"format_version": _FORMAT_VERSION, **asdict(reference)}


def read_reference(path: Path) -> ReferenceCurve:
    """Read a reference that `deberta report --write-reference` has written.

    Args:
        path: The file.

    Returns:
        The reference.

    Raises:
        UserError: There is no such file, or it holds something else.
    """
    try:
        return _from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is no reference curve ({error}); `deberta report RUN... --write-reference "
            "FILE` makes one"
        ) from error


def _from_text(text: str) -> ReferenceCurve:
    values = json.loads(text)
    if (version := values.pop("format_version")) != _FORMAT_VERSION:
        raise ValueError(f"format_version {version} is not {_FORMAT_VERSION}")
    figures = {
        name: tuple(tuple(map(float, one)) for one in seeds)
        for name, seeds in values.pop("figures").items()
    }
    steps = tuple(map(int, values.pop("steps")))
    if not steps or not figures or any(len(o) != len(steps) for s in figures.values() for o in s):
        raise ValueError("every figure needs a value for every step")
    return ReferenceCurve(steps=steps, figures=figures, **values)


@lru_cache(maxsize=1)
def shipped_references() -> tuple[ReferenceCurve, ...]:
    """Read the references that come with the program.

    Returns:
        All of them, by file name.
    """
    folder = files("pipeline").joinpath("references")
    found = sorted((each for each in folder.iterdir() if each.name.endswith(".json")), key=str)
    return tuple(_from_text(each.read_text(encoding="utf-8")) for each in found)


def find_reference(config: RunConfig, train_batch_size: int) -> ReferenceCurve | None:
    """Find the reference of a run's configuration.

    Args:
        config: The run; `reference.curve` names a file, which is used whatever it belongs to.
        train_batch_size: Sequences of its optimizer step.

    Returns:
        The named or a shipped reference; None where there is none.

    Raises:
        UserError: The named file is no reference.
    """
    if config.reference.curve:
        return read_reference(Path(config.reference.curve))
    keys = reference_keys(config, train_batch_size)
    return next((each for each in shipped_references() if each.keys == keys), None)


def judge(
    reference: ReferenceCurve, rows: Sequence[Row], step: int, train_content: str
) -> Verdict | None:
    """Compare a run with its reference at a milestone.

    Args:
        reference: The reference.
        rows: Rows of the run up to the step.
        step: Completed optimizer steps.
        train_content: Hash over the training tokens that the run reads.

    Returns:
        What to say; None at other steps, and where the run or the reference has no rows.
    """
    if step not in reference.milestones:
        return None
    found, expected, too_high = [], [], []
    for name in JUDGED:
        own = [
            row[name]
            for row in rows
            if step // 2 < row["step"] <= step and row.get(name) is not None
        ]
        theirs = list(_window_means(reference, name, step))
        if not own or not theirs:
            continue
        mean, spread = fmean(theirs), stdev(theirs) if len(theirs) > 1 else 0.0
        tolerated = mean + max(_TOLERATED_DEVIATIONS * spread, _LEAST_TOLERANCE * mean)
        label = name.removeprefix("train/").removesuffix("_loss")
        found.append(f"{label} {fmean(own):.4f}")
        expected.append(f"{label} {mean:.4f} +- {spread:.4f}")
        if not fmean(own) <= tolerated:
            too_high.append(f"{label} is above {tolerated:.4f}")
    if not found:
        return None
    beside = f"{', '.join(found)}; reference {', '.join(expected)} ({reference.label})"
    if train_content != reference.train_content:
        return Verdict(step, None, f"by step {step:,}: {beside}, on other text: {reference.data}")
    if too_high:
        return Verdict(
            step, False, f"not healthy by step {step:,}: {'; '.join(too_high)}: {beside}"
        )
    return Verdict(step, True, f"healthy by step {step:,}: {beside}")


class HealthCheck:
    """What training says at the milestones of its reference; rank 0 only."""

    def __init__(self, reference: ReferenceCurve | None, metrics: Path, train_content: str) -> None:
        """Keep what is compared.

        Args:
            reference: None where the run has none.
            metrics: The run's metrics.jsonl.
            train_content: Hash over the training tokens that the run reads.
        """
        self._reference = reference
        self._metrics = metrics
        self._train_content = train_content

    def __call__(self, step: int) -> str:
        """Judge the run behind a row.

        Args:
            step: Completed optimizer steps.

        Returns:
            One line; nothing where the step is no milestone.
        """
        if self._reference is None or step not in self._reference.milestones:
            return ""
        # From the file: after a resume the rows before it count too.
        try:
            rows = [json.loads(line) for line in self._metrics.read_bytes().splitlines()]
        except (OSError, ValueError):  # a full disk is told by others; this is no reason to end
            return ""
        verdict = judge(self._reference, rows, step, self._train_content)
        return verdict.text if verdict else ""


def _window_means(reference: ReferenceCurve, name: str, step: int) -> Iterator[float]:
    """Mean of each seed over the second half of the steps so far."""
    inside = [i for i, each in enumerate(reference.steps) if step // 2 < each <= step]
    for seed in reference.figures.get(name, ()):
        if inside:
            yield fmean(seed[i] for i in inside)
