"""`deberta extend`: more steps for a run, and what happens to its learning rate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipeline.extend import Extension


def extend_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    max_steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps, those that are done included.")
    ],
    decay: Annotated[
        Literal["continue", "restart"],
        typer.Option(help="Go on from the present learning rate, or warm up again first."),
    ] = "continue",
    peak_factor: Annotated[
        float, typer.Option(help="With restart: share of the peak rates to warm up to.")
    ] = 1.0,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="With restart; by default the run's, at most a tenth of the new steps."
        ),
    ] = None,
    from_step: Annotated[
        int | None, typer.Option(help="Checkpoint to go on from; by default the newest.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="NEW_RUN", help="Branch into this new folder; RUN stays as it is."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the learning rates, change nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Give a run more steps, or let a branch of it go on from an older checkpoint.

    Completed steps keep the learning rates that they had. The table shows those of the steps
    before and after; then the new configuration is written, and the command that trains with it is
    printed.

    Examples:

    deberta extend runs/base --max-steps 750_000 --decay restart --peak-factor 0.5

    deberta extend runs/base --max-steps 600000 --from-step 400000 --output runs/base-longer
    """
    from pipeline.extend import ExtendOptions, apply_extension, plan_extension  # costs seconds

    options = ExtendOptions(max_steps, decay, peak_factor, warmup_steps, from_step, output)
    extension = plan_extension(run, options)
    if not as_json:
        _show(extension)
    if not dry_run:
        apply_extension(extension)
    if as_json:
        typer.echo(json.dumps(_values(extension, is_dry_run=dry_run), indent=2))
    elif dry_run:
        typer.echo("dry run: nothing was written")
    else:
        typer.echo(f"wrote {extension.folder}; train it with:\n\n  {extension.command}")
        if extension.world_size > 1:
            typer.echo(f"\n(or with the launcher that started its {extension.world_size} ranks)")


def _values(extension: "Extension", *, is_dry_run: bool) -> dict[str, object]:
    return {
        "run": str(extension.run),
        "folder": str(extension.folder),
        "commit": str(extension.commit.path),
        "step": extension.commit.step,
        "extensions": extension.document["run_config"]["schedule"]["extensions"],
        "max_steps": extension.new.schedule.max_steps,
        "learning_rates": [row.to_dict() for row in extension.rows],
        "notes": extension.notes,
        "written": not is_dry_run,
        "command": extension.command,
    }


def _show(extension: "Extension") -> None:
    """Print the learning rates before and after."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.rate_table import show_rates

    old, new, step = extension.old.schedule, extension.new.schedule, extension.commit.step
    where = f"branch {extension.folder}" if extension.is_branch else str(extension.run)
    typer.echo(
        f"{where}: goes on from {extension.commit.path}, to step {new.max_steps:,}"
        f" (so far {old.max_steps:,})"
    )
    for note in extension.notes:
        typer.echo(f"note: {note}")
    networks = ", ".join(extension.new.networks)
    table = Table("step", f"so far ({networks})", f"from now on ({networks})", "")
    for row in extension.rows:
        done = "done" if row.step < step else "next" if row.step == step else ""
        table.add_row(f"{row.step:,}", show_rates(row.old), show_rates(row.new), done)
    Console().print(table)
