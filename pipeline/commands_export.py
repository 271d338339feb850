"""`deberta export`: a run or a commit as two Hugging Face repositories."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipeline.export import ExportReport


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
    max_shard_size: Annotated[
        str, typer.Option(help='Largest file of weights: "500MB", "2GB", ...')
    ] = "5GB",
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
        max_shard_size=max_shard_size,
        force=force,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)


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
    ties = f" but for {proof.ties} ties of score" if proof.ties else ""
    typer.echo(
        f"outputs of {proof.tokens:,} tokens and ids of {proof.texts} texts compared in a "
        f"clean process with transformers {proof.versions['transformers']}: ids equal{ties}\n\n"
        "  from transformers import AutoModel, AutoTokenizer\n"
        f'  tokenizer = AutoTokenizer.from_pretrained("{report.encoder}")\n'
        f'  model = AutoModel.from_pretrained("{report.encoder}")'
    )
