"""A comparison from its plan to its result: train, measure, sum up, write.

compare       everything, in order; each part stores what it has
Comparison    the result, as in comparison.json
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from data_prep.errors import UserError
from pipeline.banner import parameter_counts
from pipeline.compare.figures import CurvePoint, RunRows, Spread, curve, read_rows, spreads
from pipeline.compare.matching import Cost
from pipeline.compare.plan import Plan, Run
from pipeline.compare.runs import Failure, is_done, train_all
from pipeline.compare.scores import Scoring, score_run, summarize
from pipeline.compare.systems import System
from pipeline.compare.word_tables import table_cosines
from pipeline.evaluate.finetune import STARTS
from pipeline.runtime import environment

Say = Callable[[str], None]


@dataclass(frozen=True)
class SystemResult:
    """What a system's finished runs have shown."""

    name: str
    source: str
    words: tuple[str, ...]
    parameters: dict[str, int]
    """Trainable parameters by network."""
    cost: Cost
    """Of one run."""
    seeds: tuple[int, ...]
    """Of the finished runs."""
    training_seconds: Spread | None
    """Time in steps; None where no run is finished."""
    curve: tuple[CurvePoint, ...]
    """Held-out figures over the budget; the last point is the end."""
    scores: dict[str, dict[str, dict[str, Spread]]]
    """Task -> start -> figure."""
    cosines: dict[str, Spread]
    """Word table -> average cosine over all pairs of pieces."""

    @property
    def heldout(self) -> dict[str, Spread]:
        """Held-out figures at the end; empty where no run is finished."""
        return self.curve[-1].figures if self.curve else {}


@dataclass(frozen=True)
class Comparison:
    """All systems side by side."""

    command: str
    match: str
    budget: float
    seeds: tuple[int, ...]
    dataset: str
    dataset_fingerprint: str
    environment: dict[str, str]
    finished: str
    """UTC, ISO 8601."""
    systems: tuple[SystemResult, ...]
    baselines: dict[str, dict[str, dict[str, float]]]
    """Task -> what needs no model -> figure."""
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    format: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values.
        """
        return asdict(self)


@dataclass
class _Measured:
    """What the finished runs of one system have given so far."""

    rows: list[RunRows] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    cosines: list[dict[str, float]] = field(default_factory=list)


def compare(plan: Plan, scoring: Scoring, command: str, say: Say) -> Comparison:
    """Train what is not trained, score what is not scored, and sum up.

    Args:
        plan: A checked plan.
        scoring: Labelled tasks, checked.
        command: What the user typed, for the record.
        say: Gets a line for every thing that happens.

    Returns:
        The result, of all runs that could be finished.

    Raises:
        UserError: Another process compares in this folder.
        StoppedError: Somebody asked to stop while runs were trained.
    """
    failures = train_all(plan, say)
    measured = {system.name: _Measured() for system in plan.systems}
    for run in plan.runs:
        if is_done(run):
            failures += _measure(run, plan, scoring, measured[run.system.name], say)
    results = tuple(
        _result(system, cost, measured[system.name], plan)
        for system, cost in zip(plan.systems, plan.costs, strict=True)
    )
    known = [report for each in measured.values() for report in each.reports]
    return Comparison(
        command=command,
        match=plan.match,
        budget=plan.budget,
        seeds=plan.seeds,
        dataset=str(plan.dataset.folder),
        dataset_fingerprint=plan.dataset.fingerprint,
        environment=environment(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        systems=results,
        baselines={
            name: report["baselines"] for reports in known[:1] for name, report in reports.items()
        },
        failures=tuple(failures),
        notes=plan.notes,
    )


def _measure(
    run: Run, plan: Plan, scoring: Scoring, measured: _Measured, say: Say
) -> list[Failure]:
    """Add a finished run's figures; one that cannot be read or scored is a failure."""
    try:
        cosines = table_cosines(run.folder, plan.dataset)
        # From random weights every run of a system would be fine-tuned to the same end.
        starts = STARTS[:1] if measured.reports else STARTS
        reports = score_run(run, plan, scoring, starts, say)
    except UserError as error:
        say(f"{run.name}: FAILED: {error}")
        return [Failure(run.name, str(error))]
    measured.rows.append(read_rows(run.folder, run.seed))
    measured.cosines.append(cosines)
    measured.reports.append(reports)
    return []


def _result(system: System, cost: Cost, measured: _Measured, plan: Plan) -> SystemResult:
    """Sum up one system."""
    rows, reports = measured.rows, measured.reports
    return SystemResult(
        name=system.name,
        source=system.source,
        words=system.words,
        parameters=parameter_counts(system.config),
        cost=cost,
        seeds=tuple(run.seed for run in rows),
        training_seconds=Spread.of([run.training_seconds for run in rows]) if rows else None,
        curve=tuple(curve(system, rows, plan.batch)),
        scores={
            name: summarize([report[name] for report in reports]) for name in (reports or [{}])[0]
        },
        cosines=spreads(measured.cosines),
    )
