"""The report of published tasks: means over seeds, their spread, and averages of the suites.

A task's score is the mean of its figures over its parts, a suite's average that of its tasks, as
GLUE and SuperGLUE define them; WNLI is left out, as in the papers.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pipeline.evaluate.declaration import Recipe, TaskSpec
from pipeline.evaluate.figures import FIGURES, interval
from pipeline.evaluate.task_runs import RunResult

_STARTS = {"pretrained": "pre-trained", "random": "random start"}


@dataclass(frozen=True)
class FigureReport:
    """One figure of one part of a task from one start."""

    task: str
    start: str
    part: str
    figure: str
    by_seed: tuple[float, ...]
    interval: tuple[float, float]
    """Where the mean over seeds lies in 95 % of the draws of test examples."""

    @property
    def mean(self) -> float:
        """Average over seeds."""
        return statistics.fmean(self.by_seed)

    @property
    def std(self) -> float:
        """Standard deviation of the sample of seeds; 0 for one."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else 0.0


@dataclass(frozen=True)
class SuiteReport:
    """All figures of all tasks."""

    model: str
    recipes: Mapping[str, Recipe]
    counts: Mapping[str, Mapping[str, int]]
    """Task -> "train" and parts -> examples."""
    figures: tuple[FigureReport, ...]
    averages: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Suite -> start -> average of its tasks, by seed; or task -> start -> average of its parts."""
    model_sha256: str
    """Fingerprint of what was fine-tuned."""
    command: str
    """That made it, for model cards."""

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values, with mean and std beside the seeds' values.
        """
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            "command": self.command,
            "tasks": {
                name: {
                    "recipe": asdict(recipe),
                    "examples": dict(self.counts[name]),
                    "figures": [
                        {**asdict(f), "mean": f.mean, "std": f.std}
                        for f in self.figures
                        if f.task == name
                    ],
                }
                for name, recipe in self.recipes.items()
            },
            "averages": {suite: dict(starts) for suite, starts in self.averages.items()},
        }


def build_report(
    model: str,
    specs: Sequence[TaskSpec],
    recipes: Mapping[str, Recipe],
    results: Sequence[RunResult],
    model_sha256: str,
    command: str = "",
) -> SuiteReport:
    """Put all runs together.

    Args:
        model: What was fine-tuned.
        specs: The tasks.
        recipes: By task.
        results: Every seed of every start of every task.
        model_sha256: Fingerprint of what was fine-tuned.
        command: That made it.

    Returns:
        The report.
    """
    figures = []
    for spec in specs:
        for start in dict.fromkeys(result.name.start for result in results):
            runs = [r for r in results if (r.name.task, r.name.start) == (spec.name, start)]
            # A diagnostic that was not at hand for some runs is of none.
            parts = [p for p in runs[0].scores if all(p in run.scores for run in runs)]
            for part in parts:
                for figure in runs[0].scores[part]:
                    rows = [run.rows[f"{part}:{figure}"] for run in runs]
                    by_seed = tuple(run.scores[part][figure] for run in runs)
                    ends = interval(rows, FIGURES[figure])
                    figures.append(FigureReport(spec.name, start, part, figure, by_seed, ends))
    counts = {result.name.task: result.counts for result in results}
    averages = _averages(specs, results)
    return SuiteReport(model, recipes, counts, tuple(figures), averages, model_sha256, command)


def _averages(
    specs: Sequence[TaskSpec], results: Sequence[RunResult]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Average whole suites, for every start and seed."""
    from pipeline.evaluate.catalogue import SUITES, TASKS

    names = {spec.name for spec in specs}
    averages: dict[str, dict[str, tuple[float, ...]]] = {}
    for suite, members in SUITES.items():
        counted = [spec.name for spec in members if spec.is_averaged]
        if len(counted) < 2 or not names.issuperset(counted):
            continue
        scores: dict[str, dict[int, list[float]]] = {}
        for result in results:
            if result.name.task in counted:
                parts = TASKS[result.name.task].scored
                values = [v for part in parts for v in result.scores[part].values()]
                by_seed = scores.setdefault(result.name.start, {})
                by_seed.setdefault(result.name.seed, []).append(statistics.fmean(values))
        averages[suite] = {
            start: tuple(statistics.fmean(by_seed[seed]) for seed in sorted(by_seed))
            for start, by_seed in scores.items()
        }
    for spec in specs:
        if spec.averages_parts:
            averages[spec.name] = _part_averages(spec, results)
    return averages


def _part_averages(spec: TaskSpec, results: Sequence[RunResult]) -> dict[str, tuple[float, ...]]:
    """Average the parts of one task, for every start and seed."""
    means: dict[str, list[float]] = {}
    for result in results:
        if result.name.task == spec.name:
            values = [v for part in result.scores.values() for v in part.values()]
            means.setdefault(result.name.start, []).append(statistics.fmean(values))
    return {start: tuple(values) for start, values in means.items()}


def suite_table(report: SuiteReport) -> Table:
    """Tabulate a report.

    Args:
        report: All figures.

    Returns:
        One row a figure: mean +- standard deviation over seeds, and the interval.
    """
    num_seeds = len(report.figures[0].by_seed)
    table = Table(
        title=f"{report.model}: {num_seeds} seed{'' if num_seeds == 1 else 's'}",
        caption="mean +- standard deviation over seeds; interval: 95 % of draws of test examples",
    )
    for name in ("task", "start", "figure"):
        table.add_column(name, no_wrap=True)
    table.add_column("seeds", justify="right")
    table.add_column("interval", justify="right")
    for f in report.figures:
        task = f"{f.task} {f.part}".strip()
        low, high = f.interval
        spread = f"{f.mean:.4f} +- {f.std:.4f}"
        table.add_row(task, _STARTS[f.start], f.figure, spread, f"{low:.4f} .. {high:.4f}")
    for suite, starts in report.averages.items():
        for start, by_seed in starts.items():
            std = statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0
            spread = f"{statistics.fmean(by_seed):.4f} +- {std:.4f}"
            table.add_row(suite, _STARTS[start], "average", spread, "")
    return table
