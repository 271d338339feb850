"""Runs as one HTML page that needs nothing beside it, and a PNG of every plot.

- `write_report`: OUTPUT/report.html and OUTPUT/PANEL.png.
- `overview_panels`, `overview`: some plots of a run, and these in one picture, for a model card.
- `RunFacts`: what the page's first table says of a run.

Plots are in the page as SVG; the values that they show are in it as JSON (`<script id="data">`),
for whoever wants to draw them otherwise. Everything that comes from outside is escaped.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline.reference_curves import ReferenceCurve, Verdict, find_reference, judge
from pipeline.report.drawing import draw, draw_together, svg_text, write_png
from pipeline.report.history import Event, RunHistory
from pipeline.report.panels import Panel, panels_of
from pipeline.run_folder import write_durably

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
_X_LABELS = {"steps": "optimizer steps", "tokens": "tokens"}
_HELDOUT_ROWS = 20
_OVERVIEW = ("mlm-loss", "rtd-loss", "mlm-accuracy", "rtd-accuracy", "learning-rate")


@dataclass(frozen=True)
class RunFacts:
    """A run in one line."""

    name: str
    status: str
    step: int
    max_steps: int
    tokens: int
    batch: str
    mlm_loss: float | None
    rtd_loss: float | None
    tokens_per_second: float | None
    """Median over the rows."""
    mfu: float | None
    """Median over the rows; None where the device's peak is not known."""
    device: str
    versions: str
    dataset: str
    num_starts: int
    verdicts: tuple[Verdict, ...]


def facts_of(run: RunHistory, reference: ReferenceCurve | None) -> RunFacts:
    """Sum a run up.

    Args:
        run: The run.
        reference: What it is compared with.

    Returns:
        Its facts.
    """
    kinds = [event.kind for event in run.events]
    status = run.state.get("status", "not started")
    if reason := run.state.get("reason"):
        status = f"{status}: {reason}"
    environment = run.environment
    processor = environment.get("processor", "")
    is_cpu = environment.get("device", "cpu") == "cpu"
    packages = ("deberta-pretrain", "torch", "deepspeed")
    return RunFacts(
        run.name,
        status,
        run.step,
        run.config.schedule.max_steps,
        run.schedule.tokens_before(run.step),
        run.plan.explain(run.config.data.sequence_length),
        run.last("train/mlm_loss"),
        run.last("train/rtd_loss"),
        _median(run, "perf/tokens_per_second"),
        _median(run, "perf/mfu"),
        f"{run.plan.world_size} x {processor if is_cpu else environment['device']}".strip(),
        ", ".join(f"{name} {environment[name]}" for name in packages if name in environment),
        run.train_content,
        kinds.count("start") + kinds.count("resume"),
        _verdicts(run, reference),
    )


def _median(run: RunHistory, name: str) -> float | None:
    values = [value for value in run.series(name)[1] if value is not None]
    return median(values) if values else None


def _verdicts(run: RunHistory, reference: ReferenceCurve | None) -> tuple[Verdict, ...]:
    if reference is None:
        return ()
    steps = [step for step in reference.milestones if step <= run.step]
    found = (judge(reference, run.rows, step, run.train_content) for step in steps)
    return tuple(verdict for verdict in found if verdict is not None)


def write_report(
    runs: Sequence[RunHistory],
    output: Path,
    *,
    x: str,
    references: Sequence[ReferenceCurve] = (),
    command: str,
) -> list[RunFacts]:
    """Write the page and the pictures.

    Args:
        runs: What it is about, at least one.
        output: An existing folder.
        x: "steps" or "tokens".
        references: To compare with; the shipped ones that belong to a run where none is given.
        command: That makes the page again.

    Returns:
        The facts of each run.
    """
    own = [
        references[0] if references else find_reference(run.config, run.plan.train_batch_size)
        for run in runs
    ]
    shown = list({id(each): each for each in own if each is not None}.values())
    shown += [each for each in references[1:] if each not in shown]
    facts = [facts_of(run, reference) for run, reference in zip(runs, own, strict=True)]
    panels = panels_of(runs, shown, x)
    images = {}
    for panel in panels:
        figure = draw(panel, _placed_events(runs, x), _X_LABELS[x])
        images[panel.name] = _address(svg_text(figure))
        write_png(figure, output / f"{panel.name}.png")
    text = _render(runs, facts, panels, images, command)
    write_durably(output / PAGE, text)
    return facts


def overview_panels(run: RunHistory) -> list[Panel]:
    """Choose what a model card shows of a run.

    Args:
        run: The run.

    Returns:
        Its losses, accuracies and learning rates; none where it has written none.
    """
    return [panel for panel in panels_of([run], (), "steps") if panel.name in _OVERVIEW]


def overview(run: RunHistory) -> "Figure":
    """Draw what a model card shows of a run.

    Args:
        run: The run, with at least one of `overview_panels`.

    Returns:
        All of them in one figure.
    """
    return draw_together(overview_panels(run), _X_LABELS["steps"])


def _placed_events(runs: Sequence[RunHistory], x: str) -> list[tuple[float, Event]]:
    """Where each event but the starts stands on the axis."""
    return [
        (run.schedule.tokens_before(event.step) if x == "tokens" else event.step, event)
        for run in runs
        for event in run.events
        if event.kind != "start"
    ]


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _render(
    runs: Sequence[RunHistory],
    facts: Sequence[RunFacts],
    panels: Sequence[Panel],
    images: dict[str, str],
    command: str,
) -> str:
    source = files("pipeline.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    data = json.dumps([asdict(panel) for panel in panels], allow_nan=False)
    return template.render(
        facts=facts,
        runs=runs,
        panels=panels,
        images=images,
        heldout=[_heldout(run) for run in runs],
        command=command,
        # Inside of a script element only this sequence could end it.
        data=Markup(data.replace("<", "\\u003c")),
    )


def _heldout(run: RunHistory) -> tuple[list[str], list[tuple[int, list[float | None]]]]:
    """Names and newest rows of the held-out figures."""
    names = [name for name in run.figures if name.startswith("eval/")]
    rows = [row for row in run.rows if any(name in row for name in names)][-_HELDOUT_ROWS:]
    return names, [(row["step"], [row.get(name) for name in names]) for row in rows]
