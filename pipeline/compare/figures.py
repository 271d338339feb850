"""What runs have measured, summed up over the seeds of a system."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.compare.matching import Cost, cost_until
from pipeline.compare.systems import System
from pipeline.ds_config import BatchPlan

HELDOUT = {
    "eval/mlm_loss": "MLM loss, nats",
    "eval/mlm_accuracy": "MLM accuracy",
    "eval/rtd_loss": "RTD loss, nats",
    "eval/rtd_auc": "RTD area under ROC",
    "eval/rtd_accuracy_replaced": "RTD accuracy on replaced",
    "eval/rtd_accuracy_original": "RTD accuracy on original",
    "eval/replaced_fraction": "replaced tokens",
}
"""Held-out figures of metrics.jsonl, and what people call them."""
PRINCIPAL = ("eval/mlm_loss", "eval/mlm_accuracy", "eval/rtd_loss", "eval/rtd_auc")
"""Those of the table and the plot; comparison.json has all."""


@dataclass(frozen=True)
class Spread:
    """A figure over several runs."""

    mean: float
    std: float
    """Of the sample, n - 1 below; 0 for one run."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Sum up values.

        Args:
            values: At least one.

        Returns:
            Their spread.
        """
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.std:.4f}" if self.count > 1 else f"{self.mean:.4f}"


@dataclass(frozen=True)
class CurvePoint:
    """The held-out figures of a system after some of its steps."""

    cost: Cost
    figures: dict[str, Spread]


@dataclass(frozen=True)
class RunRows:
    """What one finished run wrote."""

    seed: int
    heldout: dict[int, dict[str, float]]
    """Step -> figures; those that were not finite are left out."""
    training_seconds: float
    """Time in steps: without start, evaluations and commits."""


def read_rows(folder: Path, seed: int) -> RunRows:
    """Read metrics.jsonl of a finished run.

    Args:
        folder: The run folder.
        seed: The run's seed.

    Returns:
        Its held-out figures and time.
    """
    heldout: dict[int, dict[str, float]] = {}
    seconds, last_step = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        step = row["step"]
        if "perf/step_seconds" in row:
            seconds += (step - last_step) * row["perf/step_seconds"]
            last_step = step
        figures = {name: row[name] for name in HELDOUT if row.get(name) is not None}
        if figures:
            heldout[step] = figures
    return RunRows(seed, heldout, seconds)


def spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Sum up figures by name.

    Args:
        rows: One mapping a run; a name may be missing in some.

    Returns:
        Name -> spread over the runs that have it.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: Spread.of([row[name] for row in rows if name in row])
        for name in names
        if all(math.isfinite(row[name]) for row in rows if name in row)
    }


def curve(system: System, runs: Sequence[RunRows], plan: BatchPlan) -> list[CurvePoint]:
    """Follow a system's held-out figures over its budget.

    Args:
        system: The system.
        runs: Its finished runs.
        plan: Their batch.

    Returns:
        One point an evaluation that all runs have made, in order.
    """
    steps = sorted(set.intersection(*(set(run.heldout) for run in runs))) if runs else []
    return [
        CurvePoint(
            cost_until(system.config, step, plan),
            spreads([run.heldout[step] for run in runs]),
        )
        for step in steps
    ]
