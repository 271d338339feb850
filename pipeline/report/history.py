"""What a run has left in its folder, as plain values: the content of `deberta report`.

- `read_history`: a run folder -> `RunHistory`.
- `Event`: a start, a return to an earlier commit, a requeue, an end that was none.

Nothing is changed, and a run that is going on can be read too: a torn last line is left out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.ds_config import BatchPlan
from pipeline.phases import TrainSchedule, train_schedule
from pipeline.reference_curves import Row
from pipeline.skip_list import FILE_NAME as SKIPPED_DATA

RESOLVED = "config.resolved.json"


@dataclass(frozen=True)
class Event:
    """Something that happened to a run."""

    kind: str
    """start, resume, roll-back, hang, diverged, corrupt; requeue, or job for another end of one."""
    step: int
    """Completed optimizer steps."""
    text: str
    unix_seconds: float | None = None

    @property
    def when(self) -> str:
        """UTC time for people; empty where it is not known."""
        if self.unix_seconds is None:
            return ""
        return datetime.fromtimestamp(self.unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


@dataclass(frozen=True)
class RunHistory:
    """One run, as its folder tells it."""

    name: str
    """How it is called on the page; unique among the runs of a report."""
    folder: Path
    config: RunConfig
    plan: BatchPlan
    rows: tuple[Row, ...]
    """Of metrics.jsonl, in order of their steps."""
    events: tuple[Event, ...]
    """In order of their steps."""
    state: dict[str, Any]
    """Of state.json; empty where there is none."""
    environment: dict[str, str]
    """Of environment.json; empty where there is none."""
    train_content: str
    """Hash over the training tokens of the newest commit; empty before the first."""

    @cached_property
    def schedule(self) -> TrainSchedule:
        """Its phases."""
        # From its end on: a phase that is over may have been another world's.
        return train_schedule(self.config, self.plan, self.config.schedule.max_steps)

    @property
    def step(self) -> int:
        """The last step with a row."""
        return self.rows[-1]["step"] if self.rows else 0

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """Read one figure.

        Args:
            name: As in metrics.jsonl.

        Returns:
            Its steps and its values; None for one that was not finite.
        """
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    @property
    def figures(self) -> list[str]:
        """Names of everything that the run has written, in their first order."""
        return [
            name for name in dict.fromkeys(n for row in self.rows for n in row) if name != "step"
        ]

    def last(self, name: str) -> float | None:
        """The newest finite value of a figure; None where there is none."""
        values = [value for value in self.series(name)[1] if value is not None]
        return values[-1] if values else None


def read_history(folder: Path, name: str) -> RunHistory:
    """Read a run folder.

    Args:
        folder: A run folder.
        name: How to call it.

    Returns:
        The run.

    Raises:
        UserError: This is no run folder, or a file of it holds something else.
    """
    resolved = folder / RESOLVED
    if not resolved.is_file():
        raise UserError(f"{folder}: is no run folder ({RESOLVED} is missing): name one of a run")
    config = load_run_config(str(resolved))
    batch = _read(resolved).get("batch", {})
    try:
        plan = BatchPlan(**{field.name: batch[field.name] for field in fields(BatchPlan)})
    except KeyError as error:
        raise UserError(
            f"{resolved}: the block `batch` has no {error}; it was not written by training: name "
            "the folder of a run"
        ) from error
    state = _read(folder / "state.json")
    rows = tuple(_lines(folder / "metrics.jsonl", "step"))
    return RunHistory(
        name,
        folder,
        config,
        plan,
        rows,
        tuple(sorted(_events(folder, state), key=lambda event: event.step)),
        state,
        _read(folder / "environment.json"),
        _train_content(folder),
    )


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object; restore it, or remove it")
    return value


def _lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """Read the whole lines of a JSON lines file, each with these keys; none without a file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a run that is going on is writing it
                return
            raise UserError(
                f"{path}, line {number}: is not JSON ({error}); remove the line"
            ) from error
        lacking = [key for key in keys if not isinstance(value, dict) or key not in value]
        if lacking:
            raise UserError(f"{path}, line {number}: has no {lacking[0]!r}; remove the line")
        yield value


def _events(folder: Path, state: dict[str, Any]) -> Iterator[Event]:
    starts = _lines(folder / "restarts.jsonl", "step", "world_size", "notes", "unix_seconds")
    for number, start in enumerate(starts):
        ranks = "1 rank" if start["world_size"] == 1 else f"{start['world_size']} ranks"
        notes = "; ".join([ranks, *start["notes"]])
        kind = "resume" if number else "start"
        yield Event(kind, start["step"], notes, start["unix_seconds"])
    for line in _lines(folder / SKIPPED_DATA, "commit_step", "at_step", "reason"):
        text = f"back to step {line['commit_step']:,}: {line['reason']}"
        yield Event("roll-back", line["at_step"], text)
    decisions = folder / "slurm" / "restarts.jsonl"
    for line in _lines(decisions, "decision", "step", "reason", "unix_seconds"):
        decision = line["decision"]
        if decision != "start":  # the run's own line of it says more
            kind = "requeue" if decision == "requeue" else "job"
            text = f"{decision}: {line['reason']}"
            yield Event(kind, line["step"], text, line["unix_seconds"])
    if state.get("status") in ("hang", "diverged", "corrupt"):
        yield Event(state["status"], state.get("step") or 0, state.get("reason", ""))


def _train_content(folder: Path) -> str:
    """Which text the newest commit was trained on."""
    for commit in sorted((folder / "checkpoints").glob("step-*[0-9]"), reverse=True):
        dataset = _read(commit / "train_state.json").get("identity", {}).get("dataset", {})
        if content := dataset.get("train", {}).get("content"):
            return content
    return ""
