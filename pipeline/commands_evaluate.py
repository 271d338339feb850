"""`deberta evaluate`: held-out figures, published tasks, and fine-tuning on own files."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.errors import UserError
from pipeline.commands_evaluate_options import (
    BatchSizeOption,
    DataOption,
    DatasetOption,
    DeepSpeedOption,
    DeviceOption,
    EpochsOption,
    KindOption,
    LearningRateOption,
    MaxLengthOption,
    MaxSequencesOption,
    MaxTrainOption,
    MinimalPairsOption,
    ModelArgument,
    PredictionsOption,
    RandomStartOption,
    ResultsOption,
    SaveOption,
    ShardOption,
    TaskOption,
    TestOption,
    TrainOption,
)

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.evaluate.sift import SiftOptions
    from pipeline.evaluate.stepping import Strategy


def evaluate_command(
    model: ModelArgument,
    dataset: DatasetOption = None,
    max_sequences: MaxSequencesOption = None,
    minimal_pairs: MinimalPairsOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    results: ResultsOption = None,
    predictions: PredictionsOption = None,
    shard: ShardOption = "0/1",
    train: TrainOption = None,
    test: TestOption = None,
    kind: KindOption = None,
    save: SaveOption = None,
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text, if there is one.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    seeds: Annotated[int, typer.Option(help="Models to train from each start.")] = 3,
    first_seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 0,
    random_start: RandomStartOption = None,
    epochs: EpochsOption = None,
    learning_rate: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    max_length: MaxLengthOption = None,
    max_train: MaxTrainOption = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Fine-tune in bf16 autocast.")] = False,
    sift: Annotated[bool, typer.Option("--sift", help="Fine-tune by SiFT.")] = False,
    vat_lambda: Annotated[float, typer.Option(help="SiFT: weight of the divergence.")] = 5.0,
    vat_learning_rate: Annotated[float, typer.Option(help="SiFT: its step.")] = 1e-4,
    vat_init_perturbation: Annotated[float, typer.Option(help="SiFT: its first noise.")] = 1e-2,
    deepspeed_config: DeepSpeedOption = None,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a model: held-out figures, minimal pairs, published tasks, own files, or several.

    Published tasks (--task, --data) are fine-tuned by DeBERTa's recipes. Own files (--train,
    --test) train every seed from the pre-trained weights and from random ones, and add trivial
    baselines. Nothing is chosen on the examples that are scored.

    Examples:

    deberta evaluate runs/base --dataset dataset

    deberta evaluate exports/base --task glue --data glue_data --seeds 3 --results scores

    deberta evaluate exports/base --train train.conll --test test.conll --seeds 3
    """
    given = dict(locals())
    _check(given)
    report = _Report()
    if dataset is not None:
        _measure_heldout(report, given)
    if minimal_pairs is not None:
        _score_pairs(report, given)
    if task is None and train is None:
        report.show(output, as_json)
        return
    with _strategy(given) as strategy:
        if task is not None:
            _fine_tune_tasks(report, given, strategy)
        if train is not None:
            _fine_tune_files(report, given, strategy)
        if strategy.rank == 0:
            report.show(output, as_json)


_LOG_COLUMNS = 160


class _Report:
    """What was measured, as values and as tables."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.tables: list[Table] = []

    def show(self, output: Path | None, as_json: bool) -> None:
        """Print tables or JSON, and write JSON."""
        from rich.console import Console

        text = json.dumps(self.values, indent=2)
        if output is not None:
            output.write_text(text + "\n", encoding="utf-8")
        if as_json:
            typer.echo(text)
        else:
            console = Console()
            if not console.is_terminal:  # a job's log would cut each row into three lines
                console = Console(width=_LOG_COLUMNS)
            for table in self.tables:
                console.print(table)


def _check(given: dict[str, Any]) -> None:
    """Refuse options that do not fit together."""
    if (given["train"] is None) != (given["test"] is None):
        raise UserError("--train and --test go together: give both files")
    if (given["task"] is None) != (given["data"] is None):
        raise UserError("--task and --data go together: name tasks, and where their data are")
    if given["task"] is not None and given["first_seed"]:
        raise UserError("--first-seed goes with --train; jobs share --task by --shard i/n")
    if None not in (given["results"], given["task"], given["train"]):
        raise UserError("--results holds one table: give it with --task or with --train, not both")
    if given["save"] is not None and (given["train"] is None or given["deepspeed_config"]):
        raise UserError("--save keeps models of --train that one process trained: leave it out")
    if given["save"] is not None and given["results"] is not None:
        raise UserError("--save keeps what this call trains, and --results leaves out what it has")
    if all(given[name] is None for name in ("dataset", "minimal_pairs", "train", "task")):
        raise UserError(
            "nothing to measure: give --dataset DATASET for held-out figures, --minimal-pairs "
            "FILE, --task NAME and --data FOLDER for published tasks, or --train FILE and --test "
            "FILE to fine-tune"
        )
    output = given["output"]
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: {output.resolve().parent} is no folder; make it first")


def _say(line: str) -> None:
    """Tell of progress where it does not mix with results."""
    typer.echo(line, err=True)


@contextmanager
def _strategy(given: dict[str, Any]) -> "Iterator[Strategy]":
    """Find out who fine-tunes: this process, or the ranks that a launcher started."""
    from pipeline.evaluate.heldout_model import choose_device
    from pipeline.evaluate.stepping import AloneStrategy
    from pipeline.runtime import World, start_world

    world = World.from_environment()
    path = given["deepspeed_config"]
    if path is None:
        if world.world_size > 1:
            raise UserError(
                f"{world.world_size} ranks were started without --deepspeed_config: each would do "
                "all the work; give a JSON of ds_configs/, or start one process"
            )
        yield AloneStrategy(choose_device(given["device"]))
        return
    import torch.distributed as dist

    from pipeline.ds_config import check_device, load_deepspeed_config
    from pipeline.evaluate.engine_strategy import DeepSpeedStrategy

    ds = load_deepspeed_config(path)
    if given["device"] == "cpu":
        world = replace(world, device=choose_device("cpu"))
    check_device(ds, world.device.type)
    group = start_world(world)
    try:
        yield DeepSpeedStrategy(ds, world, group)
    finally:
        dist.destroy_process_group()


def _speaker(strategy: "Strategy") -> Callable[[str], None]:
    """Choose what progress is told to: rank 0 speaks for all."""
    return _say if strategy.rank == 0 else lambda _line: None


def _starts(given: dict[str, Any], by_default: bool) -> tuple[str, ...]:
    """What to begin from."""
    asked = by_default if given["random_start"] is None else given["random_start"]
    return ("pretrained", "random") if asked else ("pretrained",)


def _command() -> str:
    """Write the command of this process as it would be typed, for all shards together."""
    words = shlex.join(["deberta", *sys.argv[1:]])
    return re.sub(r" --shard[ =]\d+/\d+", "", words)


def _shard(given: dict[str, Any]) -> tuple[int, int]:
    """Read which part of the models is trained here."""
    if (match := re.fullmatch(r"(\d+)/(\d+)", given["shard"])) is None:
        raise UserError(f"--shard {given['shard']}: give i/n with 0 <= i < n, for example 0/8")
    return int(match[1]), int(match[2])


def _sift(given: dict[str, Any]) -> "SiftOptions | None":
    """Read the options of SiFT."""
    from pipeline.evaluate.sift import SiftOptions  # costs seconds to import

    names = ("vat_lambda", "vat_learning_rate", "vat_init_perturbation")
    return SiftOptions(**{name: given[name] for name in names}) if given["sift"] else None


def _measure_heldout(report: _Report, given: dict[str, Any]) -> None:
    """Measure on a held-out split."""
    from pipeline.evaluate.heldout_model import evaluate_heldout_model  # costs seconds to import
    from pipeline.evaluate.report import heldout_table

    names = ("max_sequences", "batch_size", "device")
    options = {name: given[name] for name in names}
    heldout = evaluate_heldout_model(given["model"], given["dataset"], **options)
    report.values["heldout"] = heldout.to_dict()
    report.tables.append(heldout_table(heldout))


def _score_pairs(report: _Report, given: dict[str, Any]) -> None:
    """Score minimal pairs."""
    from pipeline.evaluate.pairs_model import evaluate_pairs_model, pairs_table

    names = ("dataset", "batch_size", "device")
    options = {name: given[name] for name in names}
    found = evaluate_pairs_model(given["model"], given["minimal_pairs"], **options)
    report.values["minimal_pairs"] = found.to_dict()
    report.tables.append(pairs_table(found))


def _fine_tune_tasks(report: _Report, given: dict[str, Any], strategy: "Strategy") -> None:
    """Fine-tune on published tasks."""
    from pipeline.evaluate.catalogue import find_tasks
    from pipeline.evaluate.recipes import Overrides
    from pipeline.evaluate.sources import DataSource
    from pipeline.evaluate.suite import SuiteOptions, evaluate_tasks
    from pipeline.evaluate.suite_report import suite_table

    specs = find_tasks(given["task"])
    names = ("learning_rate", "epochs", "batch_size", "max_length")
    options = SuiteOptions(
        seeds=given["seeds"],
        starts=_starts(given, by_default=False),
        overrides=Overrides(**{name: given[name] for name in names}),
        max_train=given["max_train"],
        bf16=given["bf16"],
        sift=_sift(given),
        device=given["device"],
        results=given["results"],
        predictions=given["predictions"],
        shard=_shard(given),
        command=_command(),
    )
    source = DataSource(given["data"], is_for_one_task=len(specs) == 1)
    found = evaluate_tasks(
        given["model"],
        specs,
        source,
        options,
        dataset=given["dataset"],
        strategy=strategy,
        say=_speaker(strategy),
    )
    if found is not None:
        report.values["tasks"] = found.to_dict()
        report.tables.append(suite_table(found))


def _fine_tune_files(report: _Report, given: dict[str, Any], strategy: "Strategy") -> None:
    """Fine-tune on own files."""
    from pipeline.evaluate.finetune import FinetuneOptions, finetune_share
    from pipeline.evaluate.labelled import Columns
    from pipeline.evaluate.report import finetune_table
    from pipeline.evaluate.task_runs import write_whole

    names = ("epochs", "batch_size", "max_length")
    numbers = {name: given[name] for name in names if given[name] is not None}
    options = FinetuneOptions(
        seeds=given["seeds"],
        first_seed=given["first_seed"],
        learning_rate=given["learning_rate"],
        max_train=given["max_train"],
        device=given["device"],
        starts=_starts(given, by_default=True),
        bf16=given["bf16"],
        sift=_sift(given),
        save=None if given["save"] is None else str(given["save"]),
        **numbers,
    )
    columns = Columns(given["text_column"], given["label_column"], given["text_pair_column"])
    finetuned = finetune_share(
        given["model"],
        given["train"],
        given["test"],
        options=options,
        columns=columns,
        kind=given["kind"],
        dataset=given["dataset"],
        results=given["results"],
        shard=_shard(given),
        strategy=strategy,
        say=_speaker(strategy),
    )
    if finetuned is None:
        return
    intervals = finetuned.intervals()
    report.values["finetune"] = {
        **finetuned.to_dict(),
        "intervals": intervals,
        "command": _command(),
    }
    if given["results"] is not None and strategy.rank == 0:
        text = json.dumps(report.values["finetune"], indent=2) + "\n"
        write_whole(given["results"] / "results.json", text.encode("utf-8"))
    report.tables.append(finetune_table(finetuned, intervals))
