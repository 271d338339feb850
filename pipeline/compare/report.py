"""The result as tables: the same cells for a terminal and for comparison.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from pipeline.compare.comparison import Comparison, SystemResult
from pipeline.compare.figures import HELDOUT, PRINCIPAL, Spread
from pipeline.compare.plan import Plan

_TABLES = ("E_G", "E_D", "Delta")


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn; the first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_rich(self) -> Table:
        """Draw for a terminal.

        Returns:
            The table.
        """
        table = Table(title=self.title)
        table.add_column(self.header[0], no_wrap=True)
        for name in self.header[1:]:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Draw for comparison.md.

        Returns:
            Heading and table.
        """
        rule = ("---", *("---:" for _ in self.header[1:]))
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, ""])


def plan_grid(plan: Plan) -> Grid:
    """Tabulate what a comparison will cost.

    Args:
        plan: The plan.

    Returns:
        One row a system, and their sum.
    """
    count = len(plan.seeds)
    rows = [
        (
            system.name,
            str(count),
            f"{cost.steps:,}",
            f"{cost.tokens:,}",
            f"{cost.flops:.3e}",
            f"{count * cost.flops:.3e}",
        )
        for system, cost in zip(plan.systems, plan.costs, strict=True)
    ]
    total = ("total", str(count * len(plan.systems)), "", "", "", f"{plan.total_flops:.3e}")
    header = ("system", "runs", "steps", "tokens", "FLOPs a run", "FLOPs together")
    title = f"to be trained, matched by {plan.match}: {plan.budget:.4g} a run"
    return Grid(title, header, (*rows, total))


def grids(result: Comparison) -> list[Grid]:
    """Tabulate a result.

    Args:
        result: The comparison.

    Returns:
        What was trained, held-out figures, scores of each task, and word tables.
    """
    return [_trained(result), _heldout(result), *_scores(result), _cosines(result)]


def _trained(result: Comparison) -> Grid:
    rows = tuple(
        (
            system.name,
            f"{sum(system.parameters.values()):,}",
            f"{system.cost.steps:,}",
            f"{system.cost.tokens:,}",
            f"{system.cost.flops:.3e}",
            "-" if system.training_seconds is None else f"{system.training_seconds.mean:.0f}",
            f"{len(system.seeds)} of {len(result.seeds)}",
        )
        for system in result.systems
    )
    header = ("system", "parameters", "steps", "tokens", "FLOPs", "seconds", "runs")
    return Grid("Trained", header, rows)


def _heldout(result: Comparison) -> Grid:
    shown = [name for name in PRINCIPAL if any(name in each.heldout for each in result.systems)]
    rows = tuple(
        (system.name, *(_cell(system.heldout.get(name)) for name in shown))
        for system in result.systems
    )
    return Grid("Held out, at the end", ("system", *(HELDOUT[name] for name in shown)), rows)


def _scores(result: Comparison) -> list[Grid]:
    """One grid a task: pre-trained, random start, and what needs no model."""
    tasks = dict.fromkeys(name for system in result.systems for name in system.scores)
    return [_score_grid(result, task) for task in tasks]


def _score_grid(result: Comparison, task: str) -> Grid:
    scored = [system for system in result.systems if task in system.scores]
    figures = list(scored[0].scores[task]["pretrained"])
    rows = [_score_row(system, task, figures) for system in scored]
    for baseline, values in result.baselines[task].items():
        cells = (cell for name in figures for cell in (f"{values[name]:.4f}", ""))
        rows.append((baseline, *cells))
    header = (cell for name in figures for cell in (name, f"{name}, random start"))
    return Grid(f"Fine-tuned: {task}", ("system", *header), tuple(rows))


def _score_row(system: SystemResult, task: str, figures: Sequence[str]) -> tuple[str, ...]:
    starts = system.scores[task]
    cells = (str(starts[start][name]) for name in figures for start in ("pretrained", "random"))
    return (system.name, *cells)


def _cosines(result: Comparison) -> Grid:
    rows = tuple(
        (system.name, *(_cell(system.cosines.get(name)) for name in _TABLES))
        for system in result.systems
    )
    return Grid("Average cosine of word embeddings", ("system", *_TABLES), rows)


def _cell(value: Spread | None) -> str:
    return "-" if value is None else str(value)


def markdown(result: Comparison) -> str:
    """Write comparison.md.

    Args:
        result: The comparison.

    Returns:
        The document.
    """
    seeds = ", ".join(map(str, result.seeds))
    machine = result.environment
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "deepspeed", "python"))
    lines = [
        "# Comparison",
        "",
        f"Matched by {result.match}, {result.budget:.4g} a run; seeds {seeds}, each with the same"
        " sequences in the same order for all systems. Figures are means over the seeds and their"
        " sample standard deviations; FLOPs are those of the minimal exact algorithm, the"
        " generator's included.",
        "",
        f"```\n{result.command}\n```",
        "",
        f"Finished {result.finished} on {machine['device']} ({machine['machine']},"
        f" {machine['threads']} threads); {versions}; dataset {result.dataset}, fingerprint"
        f" {result.dataset_fingerprint[:12]}.",
        "",
        "![held-out figures against FLOPs](comparison.png)",
        "",
        *(grid.to_markdown() for grid in grids(result)),
    ]
    if result.notes:
        lines += ["## To be read with care", "", *(f"- {note}" for note in result.notes), ""]
    for failure in result.failures:
        lines += [f"## Failed: {failure.run}", "", f"```\n{failure.reason}\n```", ""]
    return "\n".join(lines)
