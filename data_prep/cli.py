"""`deberta-prep`: text in, a verified dataset out. Each command parses, calls and prints.

Exit codes: 0 done, 1 a worker died, 2 bad usage or input, 88 damaged dataset, 130 Ctrl-C.
"""

import json
import os
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep import commands_interchange, commands_report, console
from data_prep.array_build import ShareReport, build_share
from data_prep.array_tasks import ArrayTask
from data_prep.build import MAX_MALFORMED
from data_prep.build import build as run_build
from data_prep.build_plan import SHARD_TOKENS, BuildOptions
from data_prep.build_steps import BuildReport
from data_prep.cleaning import CLEANING_WORDS, CleaningOptions
from data_prep.commands_dedup import dedup_command
from data_prep.commands_recipe import RecipeOption, sources_and_options
from data_prep.dedup_decisions import Decisions, Duplicates
from data_prep.documents import ACCEPTED, ReadOptions, ReadReport
from data_prep.errors import UserError
from data_prep.executor_choice import ExecutorName, open_executor
from data_prep.manifest import Split
from data_prep.mpi_executor import rank_in_environment
from data_prep.shards import Dataset
from data_prep.source_units import TARGET_BYTES
from data_prep.stats import dataset_stats
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify as run_verify

app = typer.Typer(
    help="Prepare text for pre-training: train a tokenizer, build a dataset, check and inspect it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich markup would swallow the square brackets of [MASK], and importing it is slow.
    rich_markup_mode=None,
)

SourcesArgument = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE", help=f"Files, folders or quoted globs: {ACCEPTED}."),
]
ShardTokensOption = Annotated[
    int, typer.Option(help="A shard of this many tokens takes no further document.")
]
MaxMalformedOption = Annotated[
    float, typer.Option(help="Share of malformed inputs above which the build stops.")
]
RecipeSourcesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="SOURCE", help=f"Files, folders, URLs or quoted globs: {ACCEPTED}."),
]
DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")]
TextFieldOption = Annotated[
    str, typer.Option(help="Field of a JSON line, column of a Parquet or Arrow file.")
]
TxtDocumentOption = Annotated[
    Literal["file", "line"], typer.Option(help="What one document is in a .txt file.")
]
MaxDocumentBytesOption = Annotated[
    int, typer.Option(help="Longer lines and rows are dropped; bounds the memory of a worker.")
]
DedupOption = Annotated[
    Path | None, typer.Option(help="Folder of decisions that `deberta-prep dedup` made.")
]
DuplicatesOption = Annotated[
    Duplicates, typer.Option(help="With --dedup: keep them in one split with the first.")
]
CleanOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORD", help=f"What to clean by; may be repeated: {', '.join(CLEANING_WORDS)}."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

DEFAULTS = ReadOptions()


@app.command()
def train_tokenizer(
    sources: SourcesArgument,
    output: Annotated[Path, typer.Option(help="Tokenizer folder to make.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces of the model.")] = 128_000,
    sample_bytes: Annotated[
        int, typer.Option(help="Text to train on, at most; memory is a few times that.")
    ] = 512 << 20,
    character_coverage: Annotated[
        float, typer.Option(help="Share of the characters with pieces; others become bytes.")
    ] = 0.9995,
    text_field: TextFieldOption = DEFAULTS.text_field,
    txt_document: TxtDocumentOption = DEFAULTS.txt_document,
    max_document_bytes: MaxDocumentBytesOption = DEFAULTS.max_document_bytes,
    as_json: JsonOption = False,
) -> None:
    """Train a SentencePiece tokenizer in DeBERTaV3's layout.

    Example: deberta-prep train-tokenizer corpus --output tokenizer --vocab-size 32000
    """
    from data_prep.tokenizer_training import TrainingOptions, train_tokenizer_from_sources

    reading = ReadReport()
    report = train_tokenizer_from_sources(
        sources,
        output,
        TrainingOptions(vocab_size, sample_bytes, character_coverage),
        ReadOptions(text_field, txt_document, max_document_bytes),
        reading,
    )
    if as_json:
        _print_json({**report.to_dict(), "reading": reading.to_dict()})
        return
    console.print_table(f"tokenizer {output}", ("figure", "value"), list(report.to_dict().items()))
    console.print_reading(reading)


@app.command()
def build(
    context: typer.Context,
    sources: RecipeSourcesArgument = None,
    recipe: RecipeOption = None,
    *,
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder, or a .model file.")],
    output: Annotated[Path, typer.Option(help="Dataset folder to make, or to go on with.")],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes here, or in each array task; 1.5 GiB of memory each. 1 if not given."
        ),
    ] = None,
    executor: Annotated[
        ExecutorName,
        typer.Option(
            help="Who does the work: processes of this machine, the ranks of mpirun, or the tasks "
            "of a SLURM array, each its share."
        ),
    ] = "processes",
    text_field: TextFieldOption = DEFAULTS.text_field,
    txt_document: TxtDocumentOption = DEFAULTS.txt_document,
    max_document_bytes: MaxDocumentBytesOption = DEFAULTS.max_document_bytes,
    min_characters: Annotated[int, typer.Option(help="Shorter documents are dropped.")] = 1,
    clean: CleanOption = None,
    heldout_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is held out for evaluation.")
    ] = 0.01,
    unit_bytes: Annotated[
        int, typer.Option(help="Input bytes of one unit of work; part of what decides the shards.")
    ] = TARGET_BYTES,
    shard_tokens: ShardTokensOption = SHARD_TOKENS,
    max_malformed: MaxMalformedOption = MAX_MALFORMED,
    dedup: DedupOption = None,
    duplicates: DuplicatesOption = "drop",
    as_json: JsonOption = False,
) -> None:
    """Turn text into a dataset of token shards; run again after an interruption to continue.

    Example: deberta-prep build corpus --tokenizer tokenizer --output dataset --workers 8

    The result depends on the input alone: the same bytes for any --executor, any number of
    workers, and after any kill.

    \b
    On a cluster
      with MPI, one rank for the plan and the others for the work:
        mpirun -n 64 deberta-prep build corpus --tokenizer tokenizer --output dataset \\
            --executor mpi
      as a SLURM array, whose last task makes the dataset:
        sbatch --array=0-63 --cpus-per-task=4 --mem=8G --wrap "deberta-prep build corpus \\
            --tokenizer tokenizer --output dataset --executor slurm-array --workers 4"
      after an array of which tasks have failed, those alone, or the rest on one machine:
        sbatch --array=3,7 ... the same
        deberta-prep build corpus --tokenizer tokenizer --output dataset --workers 8
    """
    options = BuildOptions(
        read=ReadOptions(text_field, txt_document, max_document_bytes),
        cleaning=CleaningOptions.parse(clean or (), min_characters),
        heldout_fraction=heldout_fraction,
        unit_bytes=unit_bytes,
        shard_tokens=shard_tokens,
    )
    named, options = sources_and_options(context, sources, recipe, options)
    options = replace(options, duplicates=duplicates)
    task = ArrayTask.from_environment(os.environ) if executor == "slurm-array" else None
    with open_executor(executor, workers) as pool:
        if pool is None:
            return
        if dedup is not None:
            options = replace(options, dedup=Decisions.open(dedup))
        with console.until_interrupted(output), console.BuildProgress() as progress:
            words = (named, tokenizer, output, options, pool)
            hooks = (progress.start, progress.advance, max_malformed)
            if task is None:
                report = run_build(*words, *hooks)
            else:
                report = build_share(*words, task, *hooks)
        _print_build(report, as_json)


def _print_build(report: BuildReport | ShareReport, as_json: bool) -> None:
    if isinstance(report, ShareReport):
        if as_json:
            _print_json(console.share_values(report))
        else:
            console.print_share(report)
    elif as_json:
        _print_json(console.build_values(report))
    else:
        console.print_build(report)


app.command("dedup")(dedup_command)


@app.command()
def verify(
    dataset: DatasetArgument,
    sample: Annotated[
        int, typer.Option(min=1, help="Documents of each split to decode and encode again.")
    ] = 1000,
    full: Annotated[bool, typer.Option("--full", help="Decode and encode all of them.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Files hashed at the same time.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a dataset and what it means; exit code 88 if something is damaged.

    Example: deberta-prep verify dataset --workers 8
    """
    report = run_verify(dataset, None if full else sample, workers)
    if as_json:
        _print_json(report.to_dict())
    else:
        console.print_verify(report)


@app.command()
def show(
    dataset: DatasetArgument,
    document: Annotated[int, typer.Option(help="Number of the document, from 0.")],
    split: Annotated[Split, typer.Option(help="Split that it is counted in.")] = "train",
    as_json: JsonOption = False,
) -> None:
    """Print one document as text and as the pieces that a model reads.

    Example: deberta-prep show dataset --document 12 --split heldout
    """
    opened = Dataset.open(dataset)
    tokenizer = Tokenizer.load(opened.tokenizer_folder)
    ids, shard = opened.document(split, document)
    text, pieces = tokenizer.decode(ids), tokenizer.pieces(ids)
    if as_json:
        _print_json(
            {
                "document": document,
                "split": split,
                "shard": shard.name,
                "source": shard.source,
                "text": text,
                "pieces": pieces,
                "ids": ids.tolist(),
            }
        )
        return
    console.write_line(
        f"document {document} of {split}: {ids.size} tokens, in {shard.name}, from {shard.source}"
    )
    console.write_line(f"\n{text}\n")
    console.write_line(" ".join(pieces))


@app.command()
def stats(dataset: DatasetArgument, as_json: JsonOption = False) -> None:
    """Print sizes and document lengths for each source and split.

    Example: deberta-prep stats dataset
    """
    groups = dataset_stats(Dataset.open(dataset))
    if as_json:
        _print_json(console.stats_values(groups))
    else:
        console.print_stats(groups)


commands_interchange.register(app)
commands_report.register(app)


def _print_json(values: Any) -> None:
    console.write_line(json.dumps(values, indent=2))


def main() -> None:
    """Run the command line; what a user did wrong is told in one message, without a traceback."""
    # All ranks of an MPI world read the same words; one complaint about them is enough.
    is_spokesman = rank_in_environment(os.environ) == 0
    try:
        with nullcontext() if is_spokesman else redirect_stderr(StringIO()):
            app(prog_name="deberta-prep")
    except UserError as error:
        if is_spokesman:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
