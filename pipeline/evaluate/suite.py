"""Published tasks: every seed of every task trained, scored and kept; then one report.

    1. the tasks' columns are looked at, before anything is computed
    2. runs (task, start, seed) that RESULTS already has are left out, and those of other shards
    3. each task is read and tokenized once, and trained with each seed
    4. when all runs of all shards are there, the report is made of their files

With `--shard i/n` a process takes every n-th run; the process that finds all runs finished writes
RESULTS/results.json.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.declaration import Recipe, Split, TaskSpec
from pipeline.evaluate.heads import loaded_from
from pipeline.evaluate.heldout_model import choose_device
from pipeline.evaluate.kind import Limits
from pipeline.evaluate.kinds import find_kind
from pipeline.evaluate.load import encoder_repository
from pipeline.evaluate.recipes import Overrides, choose_recipe
from pipeline.evaluate.sift import SiftOptions
from pipeline.evaluate.sources import DataSource
from pipeline.evaluate.stepping import AloneStrategy, Strategy
from pipeline.evaluate.suite_report import SuiteReport, build_report
from pipeline.evaluate.task_runs import (
    Inputs,
    PreparedTask,
    RunName,
    check_shard,
    model_digest,
    read_runs,
    results_folder,
    run_task,
    write_run,
    write_whole,
)


@dataclass(frozen=True)
class SuiteOptions:
    """What to run, and where to keep it."""

    seeds: int = 3
    """Seeds 0 .. seeds - 1 of the new weights, the order of the batches and dropout."""
    starts: tuple[str, ...] = ("pretrained",)
    """What to begin from: "pretrained", "random" or both."""
    overrides: Overrides = field(default_factory=Overrides)
    """In place of the recipes' values."""
    max_train: int | None = None
    """Training examples to use, evenly spaced; all where None."""
    bf16: bool = False
    """Whether to compute in bf16; the weights stay fp32."""
    sift: SiftOptions | None = None
    """Adversarial perturbation of the embeddings, if any."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    results: Path | None = None
    """Folder of finished runs; without one nothing can be resumed."""
    predictions: Path | None = None
    """Folder for submissions; none are written where None."""
    shard: tuple[int, int] = (0, 1)
    """Which part of the runs, counted from 0, of how many."""
    command: str = ""
    """Told in the report."""


def evaluate_tasks(
    model: Path,
    specs: Sequence[TaskSpec],
    source: DataSource,
    options: SuiteOptions = SuiteOptions(),
    *,
    dataset: Path | None = None,
    strategy: Strategy | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> SuiteReport | None:
    """Fine-tune a model on published tasks.

    Args:
        model: A run folder, a commit, an export or a repository with spm.model.
        specs: The tasks.
        source: Where their data are.
        options: How to run.
        dataset: For a run or commit, where its dataset is now.
        strategy: Who takes part; this process alone, on `options.device`, where None.
        say: Gets a line after every trained model.

    Returns:
        The report; None where runs of other shards are not finished.

    Raises:
        UserError: Data or an option are unusable, or training diverged.
        CorruptError: The model is damaged.
    """
    _check_options(options)
    strategy = strategy or AloneStrategy(choose_device(options.device))
    for spec in specs:
        for split in (*spec.train, *_scored(source, spec).values()):
            _check_columns(source, spec, split)
    with (
        encoder_repository(model, dataset) as repository,
        results_folder(options.results) as folder,
    ):
        recipes = {spec.name: _recipe(repository, spec, options) for spec in specs}
        shared = _settings(repository, source, options)
        settings = {name: {**asdict(recipe), **shared} for name, recipe in recipes.items()}
        names = [
            RunName(spec.name, start, seed)
            for spec in specs
            for start in options.starts
            for seed in range(options.seeds)
        ]
        ours = set(names[options.shard[0] :: options.shard[1]])
        done = strategy.agree(lambda: read_runs(folder, names, settings))
        for spec in specs:
            todo = [n for n in names if n.task == spec.name and n in ours and n not in done]
            if not todo:
                continue
            task = _prepare(repository, spec, recipes[spec.name], source, options)
            for name in todo:
                result = run_task(
                    repository,
                    task,
                    name,
                    bf16=options.bf16,
                    sift=options.sift,
                    strategy=strategy,
                    predictions=options.predictions,
                )
                if strategy.rank == 0:
                    write_run(folder, result, settings[spec.name])
                say(f"{name.stem}: {_scores_line(result.scores)}")
        results = list(strategy.agree(lambda: read_runs(folder, names, settings)).values())
        if len(results) < len(names):
            say(f"{len(results)} of {len(names)} runs are finished; the others are of other shards")
            return None
        origin = (shared["model_sha256"], options.command)
        report = build_report(str(model), specs, recipes, results, *origin)
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        if strategy.rank == 0:
            write_whole(folder / "results.json", text.encode("utf-8"))
        return report


def _check_options(options: SuiteOptions) -> None:
    """Refuse numbers that cannot be meant."""
    given = {"seeds": options.seeds, "max_train": options.max_train, **vars(options.overrides)}
    least = {"seeds": 1, "epochs": 1, "batch_size": 1, "max_length": 8, "max_train": 2}
    for name, minimum in least.items():
        if given[name] is not None and given[name] < minimum:
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: give {minimum} or more")
    rate = options.overrides.learning_rate
    if rate is not None and not 0 < rate < 1:
        raise UserError(f"--learning-rate {rate}: give a number in (0, 1)")
    check_shard(options.shard, options.results)


def _scored(source: DataSource, spec: TaskSpec) -> dict[str, Split]:
    """Find what is scored: the task's parts, and the diagnostics that are at hand."""
    found = {part: diagnostic.split for part, diagnostic in spec.diagnostics.items()}
    at_hand = {part: split for part, split in found.items() if source.has_labels(spec, split)}
    return {**spec.scored, **at_hand}


def _check_columns(source: DataSource, spec: TaskSpec, split: Split) -> None:
    """Make the examples of a split's first record, which names wrong columns at once."""
    for record in source.records(spec, split):
        spec.read(record, True)
        return


def _recipe(repository: Path, spec: TaskSpec, options: SuiteOptions) -> Recipe:
    """Choose the recipe for the model, which bounds its length."""
    from transformers import AutoConfig  # costs seconds to import

    with loaded_from(repository):
        config = AutoConfig.from_pretrained(repository, trust_remote_code=False)
    most, asked = config.max_position_embeddings, options.overrides.max_length
    if asked is not None and asked > most:
        raise UserError(
            f"--max-length {asked}: the model takes at most {most} tokens (max_position_embeddings)"
        )
    sizes = (config.num_hidden_layers, config.hidden_size)
    recipe = choose_recipe(spec, *sizes, options.overrides)
    if recipe.max_length > most:
        bounded = Overrides(**{**vars(options.overrides), "max_length": most})
        recipe = choose_recipe(spec, *sizes, bounded)
    return recipe


def _settings(repository: Path, source: DataSource, options: SuiteOptions) -> dict[str, Any]:
    """Name what a run depends on beside its recipe, task, start and seed."""
    return {
        "model_sha256": model_digest(repository),
        "data": source.data,
        "max_train": options.max_train,
        "bf16": options.bf16,
        "sift": asdict(options.sift) if options.sift else None,
    }


def _prepare(
    repository: Path, spec: TaskSpec, recipe: Recipe, source: DataSource, options: SuiteOptions
) -> PreparedTask:
    """Read and tokenize a task."""
    tokenizer, limits = Tokenizer.load(repository), Limits(recipe.max_length)
    kind, num_outputs = find_kind(spec.kind, spec.labels, allows_no_answer=spec.allows_no_answer)

    def inputs(splits: Sequence[Split], is_labelled: bool, most: int | None = None) -> Inputs:
        examples = source.read(spec, splits, is_labelled)
        if most is not None and most < len(examples):
            examples = [examples[i * len(examples) // most] for i in range(most)]
        return Inputs(examples, kind.features(examples, tokenizer, limits))

    predicted = {
        file: inputs([split], False)
        for file, split in spec.predicted.items()
        if options.predictions is not None and source.has(spec, split)
    }
    return PreparedTask(
        spec,
        kind,
        num_outputs,
        recipe,
        inputs(spec.train, True, options.max_train),
        {part: inputs([split], True) for part, split in _scored(source, spec).items()},
        predicted,
    )


def _scores_line(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Write the figures of a run in one line."""
    return "  ".join(
        f"{part} {figure} {value:.4f}".strip()
        for part, figures in scores.items()
        for figure, value in figures.items()
    )
