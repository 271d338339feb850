"""comparison.png: held-out curves against FLOPs, and fine-tuned scores, a panel each."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compare.comparison import Comparison, SystemResult
from pipeline.compare.figures import HELDOUT, PRINCIPAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_COLUMNS = 2


def plot(result: Comparison, path: Path) -> None:
    """Draw a comparison into a file.

    Args:
        result: The comparison; at least one run is finished.
        path: The .png file to write.
    """
    draw(result).savefig(path)


def draw(result: Comparison) -> "Figure":
    """Draw a comparison without a display.

    Args:
        result: The comparison; at least one run is finished.

    Returns:
        A panel for each held-out figure and each task.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # costs a second to import
    from matplotlib.figure import Figure

    curves = [name for name in PRINCIPAL if any(name in each.heldout for each in result.systems)]
    tasks = list(dict.fromkeys(task for system in result.systems for task in system.scores))
    rows = math.ceil((len(curves) + len(tasks)) / _COLUMNS)
    figure = Figure(figsize=(6 * _COLUMNS, 3.8 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for name in curves:
        _draw_curves(next(axes), result, name)
    for task in tasks:
        _draw_scores(next(axes), result, task)
    for unused in axes:
        unused.set_axis_off()
    figure.suptitle(
        f"matched by {result.match}; seeds {', '.join(map(str, result.seeds))}: mean and sample"
        " standard deviation"
    )
    return figure


def _style(index: int) -> tuple[str, str]:
    """Colour and marker of a system, the same in all panels."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def _draw_curves(axes: "Axes", result: Comparison, name: str) -> None:
    """Draw one held-out figure of all systems that have it."""
    for index, system in enumerate(result.systems):
        points = [point for point in system.curve if name in point.figures]
        if not points:
            continue
        flops = [point.cost.flops for point in points]
        means = [point.figures[name].mean for point in points]
        stds = [point.figures[name].std for point in points]
        colour, marker = _style(index)
        axes.plot(flops, means, label=system.name, markersize=4, color=colour, marker=marker)
        lower = [mean - std for mean, std in zip(means, stds, strict=True)]
        upper = [mean + std for mean, std in zip(means, stds, strict=True)]
        axes.fill_between(flops, lower, upper, color=colour, alpha=0.2, linewidth=0)
    axes.set(title=f"held-out {HELDOUT[name]}", xlabel="training FLOPs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_scores(axes: "Axes", result: Comparison, task: str) -> None:
    """Draw the last figure of a task: systems beside each other, because budgets are equal.

    Accuracy comes first and says little where one label is frequent.
    """
    scored = [(i, system) for i, system in enumerate(result.systems) if task in system.scores]
    figure = list(scored[0][1].scores[task]["pretrained"])[-1]
    for place, (index, system) in enumerate(scored):
        starts = system.scores[task]
        for start, offset, filled in (("pretrained", -0.1, True), ("random", 0.1, False)):
            spread, (colour, marker) = starts[start][figure], _style(index)
            axes.errorbar(
                place + offset,
                spread.mean,
                spread.std,
                capsize=4,
                linestyle="none",
                color=colour,
                marker=marker,
                markerfacecolor=colour if filled else "none",
            )
    axes.set_xticks(range(len(scored)), [_label(system) for _, system in scored], fontsize="small")
    for number, (baseline, values) in enumerate(result.baselines[task].items()):
        axes.axhline(
            values[figure], color="grey", linestyle=("--", ":")[number % 2], label=baseline
        )
    axes.set_xlim(-0.5, len(scored) - 0.5)
    axes.set(title=f"fine-tuned on {task}: {figure} (hollow: random start)")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")


def _label(system: SystemResult) -> str:
    return f"{system.name}\n{system.cost.flops:.2e} FLOPs"
