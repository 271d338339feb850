"""A report as one HTML page that needs nothing beside it.

- `render`: the page; plots are in it as SVG, and everything that comes from outside is escaped.
"""

import base64
import io
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from data_prep.report import DatasetReport, Histogram

_COLOURS = ("#3b6fb6", "#d1793a", "#4f9d69", "#a05195", "#7a7a7a")
_SHOWN_SOURCES = len(_COLOURS)


def render(report: DatasetReport) -> str:
    """Make the page.

    Args:
        report: what it shows.

    Returns:
        HTML.
    """
    source = files("data_prep").joinpath("report_page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    every = [group for group in report.groups if group.source != "all"]
    totals = {
        key: sum(getattr(group, key) for group in every)
        for key in ("tokens", "documents", "text_bytes")
    }
    images = {
        "lengths": _plot(lambda axes: _draw_lengths(axes, report.lengths)),
        "fertility": _plot(lambda axes: _draw_fertility(axes, report.fertility)),
    }
    return template.render(report=report, totals=totals, images=images)


def _draw_lengths(axes: Any, lengths: dict[str, Histogram]) -> None:
    for (split, histogram), colour in zip(lengths.items(), _COLOURS, strict=False):
        if any(histogram.counts):
            axes.stairs(
                histogram.counts, histogram.edges, label=split, color=colour, fill=True, alpha=0.6
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.legend()


def _draw_fertility(axes: Any, fertility: dict[str, Histogram]) -> None:
    largest = sorted(fertility, key=lambda source: -sum(fertility[source].counts))
    for source, colour in zip(largest[:_SHOWN_SOURCES], _COLOURS, strict=False):
        histogram = fertility[source]
        total = max(1, sum(histogram.counts))
        shares = [count / total for count in histogram.counts]
        axes.stairs(shares, histogram.edges, label=source[-60:], color=colour, linewidth=1.8)
    axes.set_xlabel("tokens a word")
    axes.set_ylabel("share of the documents")
    axes.legend()


def _plot(draw: Callable[[Any], None]) -> str:
    """Draw to SVG, as the address of an image."""
    # Not pyplot, which keeps figures and wants a display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    written = io.BytesIO()
    # Without a date and with fixed ids equal reports are equal files.
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode()}"
