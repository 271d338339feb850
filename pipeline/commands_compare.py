"""`deberta compare`: systems trained on equal budgets, measured and put side by side."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_prep.errors import UserError
from pipeline.compare.plan import CompareOptions, Plan
from pipeline.compare.planning import check_machine, make_plan

if TYPE_CHECKING:
    from pipeline.compare.scores import LabelledTask, Scoring

SystemsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SYSTEM... [section.key=value]...",
        help="Presets or TOML files, two or more; words with = are for all of them.",
    ),
]
DeepSpeedOption = Annotated[
    Path,
    typer.Option("--deepspeed_config", metavar="JSON", help="For all runs, see ds_configs/."),
]
MatchOption = Annotated[
    Literal["flops", "steps", "tokens"],
    typer.Option(help="What every run spends alike; FLOPs include the generator's."),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(help="So many FLOPs, steps or tokens a run; by default those of the first."),
]
TrainOption = Annotated[
    list[Path] | None,
    typer.Option(help="Fine-tune on this file: .jsonl .csv .tsv (classes), .conll (tags)."),
]
TestOption = Annotated[
    list[Path] | None, typer.Option(help="Score on this file; one for each --train, in order.")
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to fine-tune; a GPU if there is one.")
]
FinetuneSeedsOption = Annotated[
    int, typer.Option(min=1, help="Fine-tunings of every pre-trained model.")
]
MaxTrainOption = Annotated[
    int | None, typer.Option(min=2, help="Use so many training examples, evenly spaced.")
]
LearningRateOption = Annotated[
    float | None, typer.Option(help="To fine-tune; 0.2 / (layers x hidden size) by default.")
]


def compare_command(
    context: typer.Context,
    systems: SystemsArgument,
    deepspeed_config: DeepSpeedOption,
    dataset: Annotated[Path, typer.Option(help="Train on it, and measure on its held-out split.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs and the result.")],
    match: MatchOption = "flops",
    budget: BudgetOption = None,
    seeds: Annotated[int, typer.Option(help="Runs of each system, from run.seed on.")] = 3,
    train: TrainOption = None,
    test: TestOption = None,
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text, if there is one.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    finetune_seeds: FinetuneSeedsOption = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over a training file.")] = 5,
    learning_rate: LearningRateOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a fine-tuning step.")] = 16,
    max_length: Annotated[int, typer.Option(min=8, help="Longest sequence to fine-tune on.")] = 128,
    max_train: MaxTrainOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what it costs, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train systems with equal budgets and several seeds, and measure them side by side.

    Each run is a training of its own in OUTPUT/runs; the same command goes on after an
    interruption, and runs that are done are not repeated. Held-out figures, fine-tuned scores and
    the likeness of word embeddings go to OUTPUT/comparison.json, .md and .png.

    Examples:

    deberta compare demo demo_es demo_mlm --deepspeed_config ds_configs/cpu_debug.json
    --dataset dataset --output comparison

    deberta compare mine.toml electra_small --deepspeed_config ds_configs/gpu1_bf16.json
    --dataset dataset --output comparison --match tokens --budget 1e9
    --train task/train.jsonl --test task/test.jsonl data.sequence_length=128
    """
    options = CompareOptions(
        systems=tuple(word for word in systems if "=" not in word),
        deepspeed_config=deepspeed_config,
        dataset=dataset,
        output=output,
        match=match,
        budget=budget,
        seeds=seeds,
        words=tuple(word for word in systems if "=" in word),
    )
    plan = make_plan(options)
    check_machine(plan)
    # Costs seconds to import, which a mistake in the configuration must not.
    from pipeline.compare.scores import Scoring, check_scoring
    from pipeline.evaluate.finetune import FinetuneOptions
    from pipeline.evaluate.labelled import Columns

    numbers = (finetune_seeds, epochs, learning_rate, batch_size, max_length, max_train, device)
    columns = Columns(text_column, label_column, text_pair_column)
    scoring = Scoring(_tasks(train or [], test or []), FinetuneOptions(*numbers), columns)
    check_scoring(scoring, plan.systems)
    _announce(plan, as_json, dry_run)
    if not dry_run:
        _compare(plan, scoring, ["deberta", "compare", *_typed(context)], as_json)


def _tasks(train: Sequence[Path], test: Sequence[Path]) -> tuple["LabelledTask", ...]:
    """Pair training and test files."""
    from pipeline.compare.scores import LabelledTask

    if len(train) != len(test):
        raise UserError(
            f"--train is given {len(train)} times and --test {len(test)} times: give a test file"
            " for each training file, in the same order"
        )
    return tuple(LabelledTask(*files) for files in zip(train, test, strict=True))


def _typed(context: typer.Context) -> Iterator[str]:
    """Write the command's words again, without those that say what is the default."""
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if parameter.param_type_name == "argument":
            yield from value
        elif value is True:
            yield parameter.opts[0]
        elif value != parameter.get_default(context):
            for each in value if isinstance(value, list | tuple) else (value,):
                yield from (parameter.opts[0], str(each))


def _announce(plan: Plan, as_json: bool, dry_run: bool) -> None:
    """Print what will be trained and what it costs; the stream of results stays pure JSON."""
    from rich.console import Console

    from pipeline.compare.report import plan_grid

    console = Console(stderr=as_json)
    console.print(plan_grid(plan).to_rich())
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if dry_run and as_json:
        typer.echo(json.dumps(plan.to_dict(), indent=2))


def _compare(plan: Plan, scoring: "Scoring", command: Sequence[str], as_json: bool) -> None:
    """Do everything, write the result and print it."""
    from rich.console import Console

    from pipeline.compare.comparison import compare
    from pipeline.compare.report import grids, markdown
    from pipeline.run_folder import to_json, write_durably

    result = compare(plan, scoring, shlex.join(command), lambda line: typer.echo(line, err=True))
    values, document = to_json(result.to_dict()), plan.output / "comparison"
    write_durably(document.with_suffix(".json"), values)
    write_durably(document.with_suffix(".md"), markdown(result))
    if any(system.seeds for system in result.systems):
        from pipeline.compare.plot import plot

        plot(result, document.with_suffix(".png"))
    if as_json:
        typer.echo(values, nl=False)
    else:
        console = Console()
        for grid in grids(result):
            console.print(grid.to_rich())
        console.print(f"{document}.json, .md, .png", highlight=False, markup=False)
    if result.failures:
        lines = "\n".join(f"{failure.run}: {failure.reason}" for failure in result.failures)
        count = len(result.failures)
        raise UserError(
            f"{count} of {len(plan.runs)} runs failed; the same command tries them again\n{lines}"
        )
