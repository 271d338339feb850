"""`deberta checkpoint`: list, verify, prune, inspect and convert the checkpoints of a run."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.errors import EXIT_CORRUPT, CorruptError, UserError

if TYPE_CHECKING:
    from pipeline.commit import Commit

checkpoint_app = typer.Typer(
    help="List, verify, prune, inspect and convert checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
RunOrCommitArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_COMMIT",
        help="Run folder (its newest valid checkpoint is taken) or one checkpoint.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@checkpoint_app.command("list")
def list_command(
    run: RunArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a run, oldest first.

    Without --verify only sizes are compared, and a checkpoint that has them is "not checked".

    Example: deberta checkpoint list runs/base
    """
    rows = [_row(commit, verify=verify) for commit in _commits_of(run)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    lines = [
        (
            f"{row['step']:,}",
            _number(row["tokens"]),
            _megabytes(row["bytes"]),
            _age(row["age_seconds"]),
            _number(row["world_size"]),
            row["state"],
        )
        for row in rows
    ]
    _print_table(("step", "tokens", "size", "age", "ranks", "state"), lines)


def _row(commit: "Commit", *, verify: bool) -> dict[str, Any]:
    """Describe one checkpoint, whatever state it is in."""
    from pipeline.commit import check_names, check_sizes, read_manifest, verify_commit
    from pipeline.commit_upkeep import disk_bytes

    row: dict[str, Any] = {
        "path": str(commit.path),
        "step": commit.step,
        "bytes": disk_bytes(commit.path),
        "age_seconds": time.time() - commit.path.stat().st_mtime,
        "tokens": None,
        "world_size": None,
    }
    try:
        manifest = read_manifest(commit)
        row["world_size"] = manifest["world_size"]
        if verify:
            verify_commit(commit)
        else:
            check_names(commit, manifest)
            check_sizes(commit, manifest)
        saved = commit.read_json("train_state.json")
        row["tokens"] = saved.get("tokens") if isinstance(saved, dict) else None
        row["state"] = "valid" if verify else "not checked"
    except CorruptError as error:
        row["state"] = f"damaged: {error}"
    except UserError as error:
        row["state"] = str(error)
    return row


@checkpoint_app.command("verify")
def verify_command(
    run_or_commit: Annotated[
        Path, typer.Argument(metavar="RUN_OR_COMMIT", help="Run folder, or one checkpoint.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a checkpoint, or of all of a run, and name each damaged file.

    Ends with exit code 88 if anything is damaged.

    Example: deberta checkpoint verify runs/base
    """
    from pipeline.commit import Commit, damage_of

    path = run_or_commit
    is_commit = (path / "manifest.json").exists() or (path / "train_state.json").exists()
    commits = [Commit(path, 0)] if is_commit else _commits_of(path)
    damage: dict[str, list[str]] = {}
    for commit in commits:
        damage[str(commit.path)] = found = damage_of(commit)
        if not as_json:
            typer.echo("\n".join(found) or f"{commit.path}: valid")
    if as_json:
        typer.echo(json.dumps(damage, indent=2))
    if any(damage.values()):
        raise typer.Exit(EXIT_CORRUPT)


@checkpoint_app.command("prune")
def prune_command(
    run: RunArgument,
    keep_last: Annotated[int, typer.Option(min=1, help="Newest whole checkpoints to keep.")],
    milestone_interval_steps: Annotated[
        int, typer.Option(min=0, help="Keep multiples of this too; 0 keeps none.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove old checkpoints of a run that does not train.

    Every byte of those that stay is read first: a damaged one does not count as kept, and the
    newest whole one is never removed.

    Example: deberta checkpoint prune runs/base --keep-last 2 --milestone-interval-steps 100_000
    """
    from pipeline.commit import list_commits
    from pipeline.commit_upkeep import prune_commits
    from pipeline.run_folder import RunFolder

    folder = RunFolder(run)
    if not list_commits(folder.checkpoints):
        raise UserError(f"{run}: no run folder with a checkpoint")
    folder.acquire()
    try:
        report = prune_commits(
            folder.checkpoints, keep_last, milestone_interval_steps, dry_run=dry_run
        )
    except OSError as error:
        raise UserError(f"{run}: a checkpoint cannot be removed: {error}") from error
    finally:
        folder.release()
    value = {
        "removed": [str(commit.path) for commit in report.removed],
        "kept": [str(commit.path) for commit in report.kept],
        "damaged": {str(path): text for path, text in report.damaged.items()},
        "freed_bytes": report.freed_bytes,
        "dry_run": dry_run,
    }
    if as_json:
        typer.echo(json.dumps(value, indent=2))
        return
    verb = "would be removed" if dry_run else "removed"
    for commit in report.removed:
        typer.echo(f"{commit.path}: {verb}")
    for text in report.damaged.values():
        typer.echo(f"{text}; left where it is, and not counted")
    typer.echo(
        f"{len(report.removed)} {verb} ({_megabytes(report.freed_bytes)}), {len(report.kept)} stay"
    )


@checkpoint_app.command("inspect")
def inspect_command(run_or_commit: RunOrCommitArgument, as_json: JsonOption = False) -> None:
    """Say what a checkpoint holds, after every byte of it has been read.

    --json adds the whole configuration, the trainer's state and the hash of every file.

    Example: deberta checkpoint inspect runs/base
    """
    from pipeline.commit_conversion import summarize  # costs seconds to import
    from pipeline.export import find_commit

    summary = summarize(find_commit(run_or_commit))
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    _print_table(("", "value"), [(name, text) for name, text in _summary_lines(summary)])


def _summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a summary that people look for, by name."""

    def each(name: str, form: Callable[[Any], str]) -> str:
        return ", ".join(f"{key} {form(value)}" for key, value in summary[name].items())

    environment = summary["identity"].get("environment", {})
    return [
        ("checkpoint", summary["commit"]),
        ("step", f"{summary['step']:,}"),
        ("tokens", _number(summary["tokens"])),
        ("parameters", each("parameters", _number)),
        ("learning rate of that step", each("learning_rate", "{:.6g}".format)),
        ("steps of Adam", each("adam_step", _number)),
        ("skipped steps", each("skipped_steps", _number) or "none"),
        ("ranks", f"{summary['world_size']}, trained by {summary['trained_by_world_size']}"),
        ("files", f"{len(summary['files'])}, {_megabytes(summary['bytes'])}"),
        ("dataset", str(summary["identity"].get("dataset_fingerprint"))),
        ("tokenizer", str(summary["identity"].get("tokenizer_fingerprint"))),
        ("environment", ", ".join(f"{key} {value}" for key, value in environment.items())),
        ("sha256 of its manifest", summary["manifest_sha256"]),
    ]


@checkpoint_app.command("convert")
def convert_command(
    commit: Annotated[
        Path,
        typer.Argument(
            metavar="COMMIT", help="Checkpoint, or run folder (its newest valid one is taken)."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    world_size: Annotated[
        int | None, typer.Option(min=1, max=99_999, help="Rank files to make of each network.")
    ] = None,
    consolidated: Annotated[
        bool,
        typer.Option("--consolidated", help="One safetensors file a network, for other programs."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another form.

    Training never needs this: every number of ranks and every ZeRO stage reads every checkpoint,
    because its files hold elements of parameters and not the buffers of a stage.

    --world-size N makes a checkpoint of N files a network, for file systems that prefer few or
    many; in the checkpoints folder of a run it must be named step-NNNNNNNN. --consolidated makes
    NETWORK.safetensors with the tensors weight/NAME, exp_avg/NAME and exp_avg_sq/NAME, fp32, and
    checkpoint.json with what `inspect --json` prints.

    Example: deberta checkpoint convert runs/base /tmp/base --consolidated
    """
    if (world_size is None) == (not consolidated):
        raise UserError("give --world-size N or --consolidated, one of them")
    from pipeline.commit_conversion import consolidate, rewrite  # costs seconds to import
    from pipeline.commit_upkeep import disk_bytes
    from pipeline.export import find_commit

    found = find_commit(commit)
    if world_size is None:
        consolidate(found, output)
    else:
        rewrite(found, output, world_size)
    value = {"output": str(output), "step": found.step, "bytes": disk_bytes(output)}
    if as_json:
        typer.echo(json.dumps({**value, "source": str(found.path)}, indent=2))
    else:
        typer.echo(f"{output}: step {found.step:,} of {found.path}, {_megabytes(value['bytes'])}")


def _commits_of(run: Path) -> list["Commit"]:
    """List a run's commits; a checkpoints folder will do too."""
    from pipeline.commit import list_commits

    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run folder")
    commits = list_commits(run / "checkpoints") or list_commits(run)
    if not commits:
        raise UserError(f"{run}: no run folder with a checkpoint")
    return commits


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _age(seconds: float) -> str:
    """A duration in its largest unit."""
    for name, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"
