"""`deberta evaluate`: held-out figures of a model, and fine-tuning on labelled files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluate.finetune import FinetuneReport
    from pipeline.evaluate.heldout_model import HeldoutReport

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Run folder, checkpoint or export; to fine-tune, any DeBERTa-v2/v3 repository too.",
    ),
]
DatasetOption = Annotated[
    Path | None, typer.Option(help="Measure on the held-out split of this dataset.")
]
MaxSequencesOption = Annotated[
    int | None, typer.Option(min=1, help="Held-out sequences; as in training by default.")
]
TrainOption = Annotated[
    Path | None,
    typer.Option(help="Fine-tune on this file: .jsonl .csv .tsv (classes), .conll (tags)."),
]
TestOption = Annotated[Path | None, typer.Option(help="Score the fine-tuned models on this file.")]
TaskOption = Annotated[
    Literal["classification", "tagging"] | None,
    typer.Option(help="Kind of the files; by their suffix by default."),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; a GPU if there is one.")
]
LearningRateOption = Annotated[
    float | None, typer.Option(help="Peak; 0.2 / (layers x hidden size) by default.")
]
MaxTrainOption = Annotated[
    int | None, typer.Option(help="Use so many training examples, evenly spaced.")
]
BatchSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Sequences in a pass; 16 to fine-tune, else training's.")
]


def evaluate_command(
    model: ModelArgument,
    dataset: DatasetOption = None,
    max_sequences: MaxSequencesOption = None,
    train: TrainOption = None,
    test: TestOption = None,
    task: TaskOption = None,
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text, if there is one.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    seeds: Annotated[int, typer.Option(help="Models to train from each start.")] = 3,
    first_seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training file.")] = 5,
    learning_rate: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 128,
    max_train: MaxTrainOption = None,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a model: held-out figures (--dataset), fine-tuning (--train and --test), or both.

    Fine-tuning trains every seed from the pre-trained weights and from random ones, and adds
    trivial baselines. Nothing is chosen on the test file.

    Examples:

    deberta evaluate runs/base --dataset dataset

    deberta evaluate exports/base --train train.conll --test test.conll --seeds 3
    """
    if (train is None) != (test is None):
        raise UserError("--train and --test go together: give both files")
    if dataset is None and train is None:
        raise UserError(
            "nothing to measure: give --dataset DATASET for held-out figures, or --train FILE and "
            "--test FILE to fine-tune"
        )
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: {output.resolve().parent} is no folder; make it first")
    from pipeline.evaluate.finetune import FinetuneOptions, finetune  # costs seconds to import
    from pipeline.evaluate.heldout_model import evaluate_heldout_model
    from pipeline.evaluate.labelled import Columns

    heldout = finetuned = None
    if dataset is not None:
        heldout = evaluate_heldout_model(
            model, dataset, max_sequences=max_sequences, batch_size=batch_size, device=device
        )
    if train is not None and test is not None:
        options = FinetuneOptions(
            seeds,
            epochs,
            learning_rate,
            batch_size or 16,
            max_length,
            max_train,
            device,
            first_seed=first_seed,
        )
        finetuned = finetune(
            model,
            train,
            test,
            options=options,
            columns=Columns(text_column, label_column, text_pair_column),
            task=task,
            dataset=dataset,
            say=lambda line: typer.echo(line, err=True),
        )
    _show(heldout, finetuned, output, as_json)


def _show(
    heldout: "HeldoutReport | None",
    finetuned: "FinetuneReport | None",
    output: Path | None,
    as_json: bool,
) -> None:
    """Print tables or JSON, and write JSON."""
    from rich.console import Console

    from pipeline.evaluate.report import finetune_table, heldout_table

    values: dict[str, Any] = {}
    tables = []
    if heldout is not None:
        values["heldout"] = heldout.to_dict()
        tables.append(heldout_table(heldout))
    if finetuned is not None:
        values["finetune"] = finetuned.to_dict()
        tables.append(finetune_table(finetuned))
    text = json.dumps(values, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        console = Console()
        for table in tables:
            console.print(table)
