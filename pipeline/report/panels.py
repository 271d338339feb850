"""Which figures of a run are drawn together, and the lines that come of them.

- `panels_of`: the panels of some runs; every figure that a run has written is in one, and held-out
  figures of which there is one for each source or group in their table.
- `Panel`, `Line`, `Point`: what a plot shows, as plain values; a page carries them as JSON.

A line has at most 1,000 points: of longer runs neighbouring rows become one point, their mean with
their lowest and highest value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.reference_curves import ReferenceCurve
from pipeline.report.history import RunHistory

MAX_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """One row, or several neighbours."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One figure of one run."""

    label: str
    run: int
    """Number of the run among those of the report; -1 for a reference."""
    figure: int
    """Number of the figure within its panel."""
    points: tuple[Point, ...]
    not_finite: tuple[float, ...] = ()
    """Where the run has rows without a finite value."""


@dataclass(frozen=True)
class Panel:
    """One plot."""

    name: str
    """Of its file: lower case, without spaces."""
    title: str
    unit: str
    is_logarithmic: bool
    lines: tuple[Line, ...]
    marks: tuple[Line, ...]
    """Held-out figures, drawn as single marks."""


@dataclass(frozen=True)
class _Kind:
    """A panel before there are runs."""

    name: str
    title: str
    unit: str
    figures: tuple[str, ...]
    """Names in metrics.jsonl; one that ends in `*` stands for all that begin so."""
    marks: tuple[str, ...] = ()
    is_logarithmic: bool = False


_KINDS = (
    _Kind(
        "mlm-loss",
        "Generator: masked language modelling loss",
        "nats a masked token",
        ("train/mlm_loss",),
        ("eval/mlm_loss",),
    ),
    _Kind(
        "rtd-loss",
        "Discriminator: replaced token detection loss",
        "nats a token",
        ("train/rtd_loss",),
        ("eval/rtd_loss",),
    ),
    _Kind(
        "mlm-accuracy",
        "Generator: accuracy",
        "share",
        ("train/mlm_accuracy",),
        ("eval/mlm_accuracy",),
    ),
    _Kind(
        "rtd-accuracy",
        "Discriminator: accuracy on replaced and on original tokens",
        "share",
        ("train/rtd_accuracy_replaced", "train/rtd_accuracy_original"),
        ("eval/rtd_accuracy_replaced", "eval/rtd_accuracy_original"),
    ),
    _Kind("rtd-auc", "Discriminator: area under the ROC curve", "share", ("eval/rtd_auc",)),
    _Kind(
        "minimal-pairs",
        "Minimal pairs: the better sentence scores higher",
        "share of the pairs",
        ("eval/minimal_pairs_generator", "eval/minimal_pairs_discriminator"),
    ),
    _Kind(
        "replaced",
        "Replaced tokens",
        "share of all tokens",
        ("train/replaced_fraction",),
        ("eval/replaced_fraction",),
    ),
    _Kind("delta", "Norm of Delta: how far E_D is from E_G", "norm", ("train/delta_norm",)),
    _Kind("learning-rate", "Learning rates", "", ("optim/*_learning_rate",)),
    _Kind(
        "gradient-norm",
        "Gradient norms before clipping",
        "norm",
        ("optim/*_grad_norm",),
        is_logarithmic=True,
    ),
    _Kind("skipped", "Refused steps so far", "steps", ("optim/*_skipped_steps",)),
    _Kind("throughput", "Throughput", "tokens a second", ("perf/tokens_per_second",)),
    _Kind("mfu", "Model FLOPs utilisation", "share of the peak", ("perf/mfu",)),
    _Kind("data-wait", "Waiting for data", "share of the time", ("perf/data_wait_fraction",)),
    _Kind("step-time", "Time of a step", "seconds", ("perf/step_seconds",)),
    _Kind("memory", "Peak memory of rank 0", "GiB", ("perf/memory_gib",)),
    _Kind("epochs", "Passes over the data", "epochs", ("train/epochs", "train/epochs/*")),
)


def panels_of(
    runs: Sequence[RunHistory], references: Sequence[ReferenceCurve], x: str
) -> list[Panel]:
    """Arrange what runs have written.

    Args:
        runs: The runs.
        references: Drawn beside them; only where the axis is in steps.
        x: "steps" or "tokens".

    Returns:
        The panels that have something to show; figures of no known kind get panels of their own.
    """
    written = list(dict.fromkeys(name for run in runs for name in run.figures))
    left = [name for name in written if not name.startswith("eval/")]
    panels = []
    for kind in _KINDS:
        figures = [name for name in written if any(_fits(name, each) for each in kind.figures)]
        left = [name for name in left if name not in figures]
        panels.append(_panel(kind, figures, runs, references if x == "steps" else (), x))
    for name in left:
        kind = _Kind(name.replace("/", "-").replace("_", "-").lower(), name, "", (name,))
        panels.append(_panel(kind, [name], runs, (), x))
    return [panel for panel in panels if panel.lines or panel.marks]


def _fits(name: str, pattern: str) -> bool:
    before, star, behind = pattern.partition("*")
    if not star:
        return name == pattern
    return name.startswith(before) and name.endswith(behind) and len(name) > len(before + behind)


def _panel(
    kind: _Kind,
    figures: Sequence[str],
    runs: Sequence[RunHistory],
    references: Sequence[ReferenceCurve],
    x: str,
) -> Panel:
    lines = [
        _line(run, number, name, index, len(runs) > 1, len(figures) > 1, x)
        for number, run in enumerate(runs)
        for index, name in enumerate(figures)
    ]
    lines += [
        _reference_line(reference, name, index)
        for reference in references
        for index, name in enumerate(figures)
        if name in reference.figures
    ]
    marks = [
        _line(run, number, name, index, len(runs) > 1, True, x)
        for number, run in enumerate(runs)
        for index, name in enumerate(kind.marks)
    ]
    return Panel(
        kind.name,
        kind.title,
        kind.unit,
        kind.is_logarithmic,
        tuple(line for line in lines if line.points or line.not_finite),
        tuple(line for line in marks if line.points or line.not_finite),
    )


def _line(
    run: RunHistory, number: int, name: str, index: int, names_run: bool, names_figure: bool, x: str
) -> Line:
    place: Callable[[int], float] = run.schedule.tokens_before if x == "tokens" else float
    rows = [(place(step), value) for step, value in zip(*run.series(name), strict=True)]
    finite = [(where, value) for where, value in rows if value is not None]
    short = name.replace("eval/", "held-out ").removeprefix("train/").removeprefix("optim/")
    words = [run.name] * names_run + [short.replace("_", " ")] * (names_figure or not names_run)
    return Line(
        ": ".join(words),
        number,
        index,
        tuple(_thinned(finite)),
        tuple(where for where, value in rows if value is None),
    )


def _thinned(rows: Sequence[tuple[float, float]]) -> Iterator[Point]:
    size = max(1, -(-len(rows) // MAX_POINTS))
    for first in range(0, len(rows), size):
        group = rows[first : first + size]
        values = [value for _, value in group]
        yield Point(group[-1][0], fmean(values), min(values), max(values))


def _reference_line(reference: ReferenceCurve, name: str, index: int) -> Line:
    """Mean of the seeds, with their lowest and highest."""
    columns = zip(*reference.figures[name], strict=True)
    points = (
        Point(step, fmean(values), min(values), max(values))
        for step, values in zip(reference.steps, columns, strict=True)
    )
    return Line(f"reference: {reference.label}", -1, index, tuple(points))
