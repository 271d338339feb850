"""The options of `deberta evaluate`, by type; `commands_evaluate` has the defaults."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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
MinimalPairsOption = Annotated[
    Path | None,
    typer.Option(help="Score minimal pairs: a .jsonl file, or a folder of them, as BLiMP's."),
]
TaskOption = Annotated[
    str | None,
    typer.Option(help="Fine-tune on published tasks: names or suites, divided by commas."),
]
DataOption = Annotated[
    str | None,
    typer.Option(help="Folder with the tasks' files, `hub`, or a repository on the hub."),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option(help="Keep finished models' figures here; repeated, the command goes on there."),
]
PredictionsOption = Annotated[
    Path | None, typer.Option(help="Write the test predictions of --task here, for submission.")
]
ShardOption = Annotated[
    str,
    typer.Option(metavar="I/N", help="Train every N-th model (of --train: seed) from the I-th."),
]
TrainOption = Annotated[
    Path | None,
    typer.Option(
        help="Fine-tune on this file: .jsonl .csv .tsv (classes), .conll (tags), .json (SQuAD)."
    ),
]
TestOption = Annotated[Path | None, typer.Option(help="Score the fine-tuned models on this file.")]
SaveOption = Annotated[
    Path | None, typer.Option(help="Keep the models of --train here, as START-seed-K.")
]
KindOption = Annotated[
    Literal["classification", "regression", "tagging", "span", "multiple-choice"] | None,
    typer.Option(help="Kind of --train and --test; by their suffix by default."),
]
RandomStartOption = Annotated[
    bool | None,
    typer.Option(
        "--random-start/--no-random-start",
        help="Also train from random weights; by default for --train, not for --task.",
    ),
]
DeepSpeedOption = Annotated[
    Path | None,
    typer.Option(
        "--deepspeed_config",
        "--deepspeed-config",
        metavar="JSON",
        help="Fine-tune under DeepSpeed with this JSON, by all ranks that a launcher started.",
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; a GPU if there is one.")
]
EpochsOption = Annotated[
    int | None, typer.Option(help="Passes over the training data; 5, or the recipe's of --task.")
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(help="Peak; 0.2 / (layers x hidden size), or the recipe's of --task."),
]
MaxTrainOption = Annotated[
    int | None, typer.Option(help="Use so many training examples, evenly spaced.")
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences in a pass; 16 or the recipe's to fine-tune."),
]
MaxLengthOption = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; 128, or the recipe's of --task.")
]
