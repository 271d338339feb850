"""`deberta export`, `push` and `export-onnx`: models for others to use."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.export import ExportReport
    from pipeline.export_onnx import OnnxReport


def export_command(
    run_or_commit: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_COMMIT",
            help="Run folder (its newest valid checkpoint is taken) or one checkpoint.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", help="Folder to make, with a repository for each network in it."
        ),
    ],
    dataset: Annotated[
        Path | None,
        typer.Option(help="Where the run's dataset is now; its tokenizer is exported."),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="How the weights are stored.")
    ] = "fp32",
    average: Annotated[
        int, typer.Option(min=1, help="Mean of the weights of so many newest checkpoints.")
    ] = 1,
    steps: Annotated[
        str,
        typer.Option(
            help="Checkpoints to export beside it, into OUTPUT/step-...: 1000,2000 or all."
        ),
    ] = "",
    max_shard_size: Annotated[
        str, typer.Option(help='Largest file of weights: "500MB", "2GB", ...')
    ] = "5GB",
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write the encoder as ONNX, in fp32.")
    ] = False,
    onnx_int8: Annotated[
        bool, typer.Option("--onnx-int8", help="And in int8 (weights, and activations by call).")
    ] = False,
    push: Annotated[
        str, typer.Option(metavar="REPO_ID", help="Also upload it to the hub; see `deberta push`.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="New repositories of --push are for everybody.")
    ] = False,
    license: Annotated[
        str,
        typer.Option(help='For the model cards, as the hub names it: "mit", "apache-2.0", ...'),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Export the networks for transformers, and prove that they are the trained ones.

    The repositories are reloaded in a clean process; hidden states and the discriminator's scores
    must agree with the trainer's to 1e-5 in fp32 and 1e-9 in fp64, token ids exactly. Otherwise
    nothing is written.

    Example: deberta export runs/base exports/base
    """
    from pipeline.export import export_run  # costs seconds to import

    report = export_run(
        run_or_commit,
        output,
        dataset=dataset,
        dtype=dtype,
        licence=license,
        average=average,
        steps=_parse_steps(steps),
        max_shard_size=max_shard_size,
        onnx=("fp32", "int8") if onnx_int8 else ("fp32",) if onnx else (),
        force=force,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    if push:
        _push(output, push, public)


def _parse_steps(steps: str) -> tuple[int, ...] | None:
    """Read --steps; None for all."""
    if steps == "all":
        return None
    words = [word.strip() for word in steps.split(",")] if steps else []
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UserError(f"--steps {steps}: give numbers, such as 1000,2000, or all")
    return tuple(int(word) for word in words)


def push_command(
    export: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="Folder written by `deberta export`.")
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="NAMESPACE/NAME of the discriminator.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="New repositories are for everybody.")
    ] = False,
) -> None:
    """Upload an export to a hub of models; repeated, only what is new.

    The discriminator becomes REPO_ID, the generator REPO_ID-generator; intermediate steps become
    branches (revision="step-00010000"). New repositories are private without --public.

    Example: deberta push exports/base me/deberta-base
    """
    _push(export, repo_id, public)


def _push(export: Path, repo_id: str, public: bool) -> None:
    """Upload, and tell of it where it does not mix with results."""
    from pipeline.hub_push import push_export  # costs seconds to import

    push_export(export, repo_id, public=public, say=lambda line: typer.echo(line, err=True))


def _print(report: "ExportReport") -> None:
    """Say what was exported, how close it is, and how to load it."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.export_verify import KINDS

    console, proof = Console(), report.verification
    console.print(f"{report.output}: step {report.step:,} of {report.commit}", soft_wrap=True)
    table = Table("network", "parameters", "compared", "in", "largest difference", "allowed")
    for parity in proof.parities:
        table.add_row(
            parity.network,
            f"{report.parameters[parity.network]:,}",
            KINDS[parity.kind],
            parity.dtype,
            f"{parity.max_difference:.2e}",
            f"{parity.tolerance:.2e}",
        )
    console.print(table)
    if report.onnx is not None:
        _print_onnx(report.onnx)
    for step, other in report.steps.items():
        worst = max(other.parities, key=lambda parity: parity.max_difference / parity.tolerance)
        typer.echo(
            f"step {step:,}: at worst {worst.max_difference:.2e} of {worst.tolerance:.2e} allowed "
            f"({worst.network}, {KINDS[worst.kind]}, {worst.dtype})"
        )
    ties = f" but for {proof.ties} ties of score" if proof.ties else ""
    typer.echo(
        f"outputs of {proof.tokens:,} tokens and ids of {proof.texts} texts compared in a "
        f"clean process with transformers {proof.versions['transformers']}: ids equal{ties}\n\n"
        "  from transformers import AutoModel, AutoTokenizer\n"
        f'  tokenizer = AutoTokenizer.from_pretrained("{report.encoder}")\n'
        f'  model = AutoModel.from_pretrained("{report.encoder}")'
    )


def export_onnx_command(
    repository: Annotated[
        Path,
        typer.Argument(
            metavar="REPOSITORY",
            help="Exported discriminator, or a model that was fine-tuned from one.",
        ),
    ],
    int8: Annotated[
        bool, typer.Option("--int8", help="Also in int8 (weights, and activations by call).")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to compare on; sample speeches by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model as ONNX into its folder `onnx`, compared with torch on 200 sentences.

    The fp32 graph must agree to 1e-4, or nothing is written. Models: encoders, and classifiers of
    texts, text pairs and tokens, regression, and answers (spans).

    Example: deberta export-onnx fine_tuned/pretrained-seed-0 --int8
    """
    from pipeline.export_onnx import export_onnx  # costs seconds to import

    report = export_onnx(repository, int8=int8, text=text, force=force)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo(f"{repository}/onnx")
        _print_onnx(report)


def _print_onnx(report: "OnnxReport") -> None:
    """Say how close the graphs are."""
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "MB", "largest difference", "allowed", "share of the norm")
    for each in report.figures:
        allowed = "" if each.tolerance is None else f"{each.tolerance:.2e}"
        size, largest = f"{each.bytes / 1e6:,.1f}", f"{each.max_difference:.2e}"
        table.add_row(each.file, size, largest, allowed, f"{each.relative_distance:.2e}")
    Console().print(table)
    typer.echo(
        f"compared with torch on {report.tokens:,} tokens of {report.sequences} sequences by "
        f"onnxruntime {report.versions['onnxruntime']}"
    )
