"""`deberta-prep export-megatron`, `export-datasets`, `import-megatron`: parse, call, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from data_prep import console
from data_prep.manifest import SPLITS

_EndOption = Annotated[
    int | None, typer.Option("--end-of-document", help="Id behind each document.")
]
_DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program.

    Args:
        app: `deberta-prep`.
    """
    for command in (export_megatron, export_datasets, import_megatron):
        app.command()(command)


def export_megatron(
    dataset: _DatasetArgument,
    prefix: Annotated[
        Path, typer.Argument(metavar="PREFIX", help="What stands before -train.bin.")
    ],
    end_of_document: _EndOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Write a dataset as Megatron's .bin and .idx, a pair for each split.

    Example: deberta-prep export-megatron dataset megatron/corpus --end-of-document 2
    """
    from data_prep.interchange import export_megatron as run

    _print(run(dataset, prefix, end_of_document), "pair of files", as_json)


def export_datasets(
    dataset: _DatasetArgument,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.")],
    as_json: _JsonOption = False,
) -> None:
    """Write a dataset as a folder that `datasets.load_from_disk` opens.

    Example: deberta-prep export-datasets dataset arrow
    """
    from data_prep.interchange import export_datasets as run

    _print(run(dataset, output), "split", as_json)


def import_megatron(
    prefixes: Annotated[
        list[Path], typer.Argument(metavar="PREFIX", help="Pairs, by what stands before .bin.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that the pairs were made with.")],
    output: Annotated[Path, typer.Option(help="Dataset folder to make.")],
    heldout_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is held out for evaluation.")
    ] = 0.01,
    end_of_document: _EndOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Make a dataset of pairs of Megatron's files that were tokenized with the same model.

    Example: deberta-prep import-megatron corpus-train --tokenizer tokenizer --output dataset
    """
    from data_prep.interchange import import_megatron as run

    manifest = run(prefixes, tokenizer, output, heldout_fraction, end_of_document)
    _print({split: manifest.num_documents(split) for split in SPLITS}, "split", as_json)


def _print(documents: dict[str, int], what: str, as_json: bool) -> None:
    if as_json:
        console.write_line(json.dumps(documents, indent=2))
    else:
        console.print_table("written", (what, "documents"), list(documents.items()))
