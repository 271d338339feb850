"""Panels as figures: SVG for the page, PNG beside it.

- `draw`: a panel -> a matplotlib figure, without a display.
- `draw_together`: several panels -> one figure.
- `svg_text`, `write_png`: that figure as a file.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.history import Event
from pipeline.report.panels import Line, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_ORDINARY_EVENTS = ("resume", "requeue", "job")
_ORDINARY_COLOUR = "#999999"
_FAULT_COLOUR = "#c00000"
_MARKERS = ("o", "s", "^", "D")
_MAX_LEGEND = 10
_COLUMNS = 2


def draw(panel: Panel, events: Sequence[tuple[float, Event]], x_label: str) -> "Figure":
    """Draw a panel.

    Args:
        panel: What it shows.
        events: Where on the axis something happened.
        x_label: What the axis counts.

    Returns:
        The figure.
    """
    # Not pyplot, which keeps figures and wants a display.
    from matplotlib.figure import Figure  # costs a second to import

    figure = Figure(figsize=(7.2, 3.4))
    # Fixed margins: to find the best ones takes as long as to draw.
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.15, top=0.95)
    _draw_panel(figure.subplots(), panel, events, x_label)
    return figure


def draw_together(panels: Sequence[Panel], x_label: str) -> "Figure":
    """Draw panels beside and below each other, with their titles.

    Args:
        panels: What they show.
        x_label: What the axes count.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(7.2 * _COLUMNS, 3.8 * rows), layout="constrained")
    places = [*figure.subplots(rows, _COLUMNS, squeeze=False).flat]
    for axes, panel in zip(places, panels, strict=False):
        _draw_panel(axes, panel, (), x_label)
        axes.set_title(panel.title, fontsize="medium")
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return figure


def _draw_panel(
    axes: "Axes", panel: Panel, events: Sequence[tuple[float, Event]], x_label: str
) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    one_run = len({line.run for line in panel.lines if line.run >= 0}) == 1
    for line in panel.lines:
        _draw_line(axes, line, one_run)
    several = len({line.figure for line in panel.marks}) > 1
    for line in panel.marks:
        # As the lines are told apart; a single figure stands out against its line.
        number = line.figure if one_run and several else line.run + one_run
        axes.plot(
            [p.x for p in line.points],
            [p.y for p in line.points],
            _MARKERS[line.figure % len(_MARKERS)],
            color=_COLOURS[number % len(_COLOURS)],
            markersize=4.5,
            label=line.label,
        )
    for where, event in events:
        colour = _ORDINARY_COLOUR if event.kind in _ORDINARY_EVENTS else _FAULT_COLOUR
        axes.axvline(where, color=colour, linewidth=0.8, linestyle=":")
    if panel.is_logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel=x_label, ylabel=panel.unit)
    axes.grid(alpha=0.25)
    if len(panel.lines) + len(panel.marks) <= _MAX_LEGEND:
        axes.legend(fontsize="small", frameon=False)


def _draw_line(axes: "Axes", line: Line, one_run: bool) -> None:
    xs, ys = [p.x for p in line.points], [p.y for p in line.points]
    low, high = [p.low for p in line.points], [p.high for p in line.points]
    if line.run < 0:
        axes.plot(xs, ys, color="#777777", linewidth=1.2, linestyle="--", label=line.label)
        axes.fill_between(xs, low, high, color="#777777", alpha=0.15, linewidth=0)
        return
    # Runs are told apart by colour; within one run, figures are.
    colour = _COLOURS[(line.figure if one_run else line.run) % len(_COLOURS)]
    style = "-" if one_run else _STYLES[line.figure % len(_STYLES)]
    marker = "o" if len(xs) == 1 else None
    axes.plot(xs, ys, color=colour, linewidth=1.5, linestyle=style, marker=marker, label=line.label)
    if low != high:
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    if line.not_finite:
        top = [1.0] * len(line.not_finite)
        axes.plot(
            *(line.not_finite, top, "v"),
            color=_FAULT_COLOUR,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label=f"{line.label}: not finite",
        )


def svg_text(figure: "Figure") -> str:
    """Write a figure as SVG.

    Args:
        figure: The figure.

    Returns:
        The same text for the same figure: without a date, and with fixed ids.
    """
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def write_png(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG.

    Args:
        figure: The figure.
        path: The file.
    """
    figure.savefig(path, format="png", dpi=130)
