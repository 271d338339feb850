"""Tables of evaluation results for a terminal; the JSON forms are the reports' own `to_dict`."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from pipeline.evaluate.finetune import FinetuneReport
from pipeline.evaluate.heldout_model import HeldoutReport

_NAMES = {"pretrained": "pre-trained", "random": "random start"}


def heldout_table(report: HeldoutReport) -> Table:
    """Tabulate held-out figures.

    Args:
        report: The figures.

    Returns:
        One row a figure.
    """
    table = Table(title=f"held out, step {report.step:,}")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_row("sequences", f"{report.sequences:,}")
    table.add_row("sequence length", f"{report.sequence_length:,}")
    for name, value in report.figures.items():
        table.add_row(name, f"{value:.4f}")
    return table


def finetune_table(
    report: FinetuneReport, intervals: Mapping[str, Mapping[str, Sequence[float]]]
) -> Table:
    """Tabulate both starts and the baselines of a task.

    Args:
        report: All runs.
        intervals: start -> figure -> ends of its interval.

    Returns:
        One row a start or baseline: mean +- sample standard deviation over the seeds, and interval.
    """
    table = Table(
        title=f"{report.kind}: {report.train_examples:,} training, {report.test_examples:,} test"
        + (f", {len(report.labels)} labels" if report.labels else ""),
        caption=f"{report.options.seeds} seeds, {report.options.epochs} epochs, learning rate "
        f"{report.learning_rate:.2g}; {report.num_truncated:,} truncated; mean +- standard "
        "deviation over seeds (interval: 95 % of draws of test examples)",
    )
    figures = list(report.runs[0].scores)
    table.add_column("model", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    for start, values in report.summary().items():
        cells = [
            f"{values[name]['mean']:.4f} +- {values[name]['std']:.4f} "
            "({:.4f} .. {:.4f})".format(*intervals[start][name])
            for name in figures
        ]
        table.add_row(_NAMES[start], *cells)
    for baseline, scores in report.baselines.items():
        table.add_row(baseline, *(f"{scores[name]:.4f}" for name in figures))
    return table
