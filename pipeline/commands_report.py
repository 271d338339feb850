"""`deberta report`: curves, events and health of runs on one page."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_prep.errors import UserError
from pipeline.reference_curves import (
    ReferenceCurve,
    make_reference,
    read_reference,
    reference_keys,
    to_json_value,
)
from pipeline.report.history import RunHistory, read_history
from pipeline.run_folder import write_durably

if TYPE_CHECKING:
    from pipeline.report.page import RunFacts

RunsArgument = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]
OutputOption = Annotated[
    Path | None, typer.Option(help="Folder of the page; RUN/report where there is one run.")
]
AxisOption = Annotated[
    Literal["steps", "tokens"], typer.Option("--x", help="What the axis counts.")
]
ReferenceOption = Annotated[
    list[Path] | None,
    typer.Option(help="Draw and judge beside this reference; else one that comes along."),
]
WriteReferenceOption = Annotated[
    Path | None,
    typer.Option(help="Make a reference of these runs, which differ in run.seed alone; no page."),
]


def report_command(
    runs: RunsArgument,
    output: OutputOption = None,
    x: AxisOption = "steps",
    reference: ReferenceOption = None,
    write_reference: WriteReferenceOption = None,
    data: Annotated[
        str, typer.Option(help="For --write-reference: what the text is, in a few words.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show one or several runs: OUTPUT/report.html, which needs nothing beside it, and PNGs.

    Losses, accuracies, learning rates, gradient norms, throughput, MFU, refused steps, faults and
    resumes, beside the curves of runs that were made. A run that is going on can be shown too.

    Examples:

    deberta report runs/base

    deberta report runs/gdes runs/nes --output comparison --x tokens

    deberta report runs/seed1 runs/seed2 runs/seed3 --write-reference base.json --data "Wikipedia"
    """
    histories = _read_all(runs)
    if write_reference is not None:
        write_durably(
            write_reference,
            json.dumps(to_json_value(_reference(write_reference.stem, histories, data))) + "\n",
        )
        typer.echo(f"{write_reference}: reference of {len(histories)} runs")
        return
    if output is None and len(runs) > 1:
        raise UserError("--output FOLDER is missing: the page of several runs belongs to none")
    folder = output or runs[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be made ({error.strerror}); choose another folder"
        ) from error
    from pipeline.report.page import PAGE, write_report  # costs a second to import

    facts = write_report(
        histories,
        folder,
        x=x,
        references=[read_reference(path) for path in reference or []],
        command=_command(runs, x, reference or []),
    )
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in facts], indent=2))
    else:
        _show(facts, folder / PAGE)


def _read_all(folders: Sequence[Path]) -> list[RunHistory]:
    """Read runs, each under the shortest end of its path that tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(
            folder for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1
        )
        raise UserError(f"{twice} is named twice; name every run once")
    length = 1
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    names = ["/".join(own[-length:]) for own in parts]
    return [read_history(folder, name) for folder, name in zip(folders, names, strict=True)]


def _command(runs: Sequence[Path], x: str, references: Sequence[Path]) -> str:
    words = ["deberta", "report", *map(str, runs), "--x", x]
    words += [word for path in references for word in ("--reference", str(path))]
    return shlex.join(words)


def _reference(name: str, runs: Sequence[RunHistory], data: str) -> ReferenceCurve:
    """Make a reference of runs that differ in the seed alone."""
    if not data:
        raise UserError('--data is missing: say what the text is, as in --data "Wikipedia, 2026"')
    first = runs[0]
    keys = reference_keys(first.config, first.plan.train_batch_size)
    for run in runs:
        if run.state.get("status") != "done":
            raise UserError(
                f"{run.folder}: is {run.state.get('status', 'not started')}; a reference is made "
                "of runs that are done"
            )
        others = reference_keys(run.config, run.plan.train_batch_size)
        if different := [key for key in keys | others if keys.get(key) != others.get(key)]:
            raise UserError(
                f"{run.folder}: {different[0]} differs from that of {first.folder}; the runs of a "
                "reference differ in run.seed alone"
            )
        if run.train_content != first.train_content:
            raise UserError(f"{run.folder}: has another dataset than {first.folder}")
    seeds = [run.config.run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs have the seeds {seeds}; each needs one of its own")
    processors = dict.fromkeys(_place(run) for run in runs)
    return make_reference(
        name,
        [run.rows for run in runs],
        where=" and ".join(processors),
        date=max(_date(run) for run in runs).isoformat(),
        data=data,
        train_content=first.train_content,
        keys=keys,
    )


def _place(run: RunHistory) -> str:
    """What a run was made on."""
    device = run.environment.get("device", "cpu")
    name = run.environment.get("processor", "a CPU") if device == "cpu" else device
    return f"{run.plan.world_size} x {name}"


def _date(run: RunHistory) -> date:
    """When its last row was written."""
    return datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime, UTC).date()


def _show(facts: Sequence["RunFacts"], page: Path) -> None:
    """Print what a person wants to know at once."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("run", no_wrap=True)
    table.add_column("status")
    for name in ("step", "MLM loss", "RTD loss", "tokens/s"):
        table.add_column(name, justify="right")
    for each in facts:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (each.mlm_loss, each.rtd_loss)]
        rate = "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}"
        table.add_row(each.name, each.status, f"{each.step:,}", *losses, rate)
    console = Console()
    console.print(table)
    for each in facts:
        for verdict in each.verdicts:
            line = f"{each.name}: {verdict.text}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(str(page), markup=False, highlight=False, soft_wrap=True)
