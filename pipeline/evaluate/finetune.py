"""Fine-tuning on a labelled task: what the pre-training is worth against a random start.

For every seed the same network is trained twice on the same batches, from the pre-trained weights
and from random ones, and both are scored on the test file. The models are transformers' own
(AutoModelForSequenceClassification, AutoModelForTokenClassification), as a user would fine-tune
them. AdamW, linear warm-up and decay, gradients clipped at norm 1; nothing is chosen on the test
file.

Letters: B sequences, L sequence length, C labels.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.figures import interval
from pipeline.evaluate.fitting import Head, fine_tuned
from pipeline.evaluate.heads import loaded_from
from pipeline.evaluate.heldout_model import choose_device
from pipeline.evaluate.labelled import DEFAULT_COLUMNS, Columns, TaskKind, task_kind
from pipeline.evaluate.load import encoder_repository
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.recipes import RATE_TIMES_SIZE
from pipeline.evaluate.saving import check_place, save_model
from pipeline.evaluate.sift import SiftOptions
from pipeline.evaluate.stepping import AloneStrategy, Strategy
from pipeline.evaluate.task_runs import (
    RunName,
    RunResult,
    check_shard,
    file_digest,
    model_digest,
    read_runs,
    results_folder,
    write_run,
)
from pipeline.evaluate.tasks import Scores, Task, build_task, figures_of, read_task
from pipeline.evaluate.training import outputs

STARTS = ("pretrained", "random")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune; the same for every seed and start."""

    seeds: int = 3
    """How many seeds, from `first_seed` on: of new weights, the order of the batches, dropout."""
    epochs: int = 5
    """Passes over the training file."""
    learning_rate: float | None = None
    """Peak; 0.2 / (layers x hidden size) where None."""
    batch_size: int = 16
    """Sequences in a step."""
    max_length: int = 128
    """Longest sequence in tokens; at most the model's max_position_embeddings."""
    max_train: int | None = None
    """Training examples to use, evenly spaced over the file; all where None."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    starts: tuple[str, ...] = STARTS
    """What to begin from: "pretrained", "random" or both."""
    bf16: bool = False
    """Whether to compute in bf16 where torch's autocast holds that safe; weights stay fp32."""
    sift: SiftOptions | None = None
    """Adversarial perturbation of the embeddings, if any."""
    first_seed: int = 0
    """The first of them: processes that share the seeds among them begin at different ones."""
    save: str | None = None
    """Folder for the trained models, as START-seed-K; none are kept where None."""


@dataclass(frozen=True)
class FinetuneRun:
    """One model that was trained and scored."""

    start: str
    """"pretrained" or "random"."""
    seed: int
    scores: Scores


@dataclass(frozen=True)
class FinetuneReport:
    """All runs of a task."""

    model: str
    kind: TaskKind
    train_examples: int
    test_examples: int
    labels: tuple[str, ...]
    num_truncated: int
    learning_rate: float
    options: FinetuneOptions
    runs: tuple[FinetuneRun, ...]
    baselines: dict[str, Scores]
    files: tuple[str, str]
    """For training, and for the test."""
    model_sha256: str
    """Fingerprint of what was fine-tuned."""
    rows: Sequence[Mapping[str, np.ndarray]] = field(default=(), repr=False, compare=False)
    """Of each run: figure -> rows of the test examples, as in `figures`."""

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Average over seeds.

        Returns:
            start -> figure -> "mean" and "std" (of the sample; 0 for one seed).
        """
        result: dict[str, dict[str, dict[str, float]]] = {}
        for start in self.options.starts:
            scores = [run.scores for run in self.runs if run.start == start]
            result[start] = {
                name: {
                    "mean": statistics.fmean(s[name] for s in scores),
                    "std": statistics.stdev(s[name] for s in scores) if len(scores) > 1 else 0.0,
                }
                for name in scores[0]
            }
        return result

    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """Draw the test examples again and again, which takes a second a figure.

        Returns:
            start -> figure -> ends of where the mean over seeds lies in 95 % of the draws.
        """
        figures = figures_of(self.kind, self.labels)
        found: dict[str, dict[str, list[float]]] = {}
        for start in self.options.starts:
            chosen = [r for run, r in zip(self.runs, self.rows, strict=True) if run.start == start]
            found[start] = {
                name: list(interval([rows[name] for rows in chosen], figure))
                for name, figure in figures.items()
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values, the summary included, without the rows.
        """
        values = asdict(replace(self, rows=()))
        del values["rows"]
        return {**values, "summary": self.summary()}


def finetune(model: Path, train: Path, test: Path, **named: Any) -> FinetuneReport:
    """Do all runs of a task.

    Args:
        model: As for `finetune_share`.
        train: Likewise.
        test: Likewise.
        named: Likewise, but no shard.

    Returns:
        Scores of all runs and of the baselines.

    Raises:
        UserError: A file or an option is unusable, or training diverged.
        CorruptError: The model is damaged.
    """
    report = finetune_share(model, train, test, **named)
    assert report is not None, "without shards nothing is left for others"
    return report


def finetune_share(
    model: Path,
    train: Path,
    test: Path,
    *,
    options: FinetuneOptions = FinetuneOptions(),
    columns: Columns = DEFAULT_COLUMNS,
    kind: TaskKind | None = None,
    dataset: Path | None = None,
    results: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    strategy: Strategy | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> FinetuneReport | None:
    """Fine-tune a model on a labelled file, from its weights and from random ones.

    Args:
        model: A run folder, a commit, an export or a repository with spm.model.
        train: Training file.
        test: Test file.
        options: How to fine-tune.
        columns: Columns of a classification file.
        kind: Kind of task; by the name of the training file where None.
        dataset: For a run or commit, where its dataset is now.
        results: Folder of finished runs; without one nothing can be resumed.
        shard: Which part of the seeds, counted from 0, of how many; the starts of a seed stay
            together.
        strategy: Who takes part; this process alone, on `options.device`, where None.
        say: Gets a line after every trained model.

    Returns:
        Scores of all runs and of the baselines; None where runs of other shards are not finished.

    Raises:
        UserError: A file or an option is unusable, or training diverged.
        CorruptError: The model is damaged.
    """
    _check_options(options)
    check_shard(shard, results)
    kind = task_kind(train, kind)
    strategy = strategy or AloneStrategy(choose_device(options.device))
    if options.save is not None:
        check_place(Path(options.save))
    files = read_task(kind, train, test, columns, options.max_train)
    with encoder_repository(model, dataset) as repository:
        rate = _learning_rate(repository, options)
        data = build_task(files, Tokenizer.load(repository), options.max_length)
        settings = _settings(repository, (train, test), columns, rate, options)
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        names = [RunName(train.stem, start, seed) for seed in seeds for start in options.starts]
        ours = [n for n in names if (n.seed - options.first_seed) % shard[1] == shard[0]]
        with results_folder(results) as folder:
            of_task = {train.stem: settings}
            done = strategy.agree(lambda: read_runs(folder, names, of_task))
            for name in (name for name in ours if name not in done):
                result = _train_and_score(repository, name, data, options, rate, strategy)
                if strategy.rank == 0:
                    write_run(folder, result, settings)
                scores = result.scores[""].items()
                figures = "  ".join(f"{figure} {value:.4f}" for figure, value in scores)
                say(f"seed {name.seed}, {name.start}: {figures}")
            found = list(strategy.agree(lambda: read_runs(folder, names, of_task)).values())
    if len(found) < len(names):
        say(f"{len(found)} of {len(names)} runs are finished; the others are of other shards")
        return None
    return FinetuneReport(
        str(model),
        kind,
        len(files.train),
        len(files.test),
        files.labels,
        data.num_truncated,
        rate,
        options,
        tuple(FinetuneRun(r.name.start, r.name.seed, dict(r.scores[""])) for r in found),
        data.baselines,
        (str(train), str(test)),
        settings["model_sha256"],
        [{key.removeprefix(":"): rows for key, rows in r.rows.items()} for r in found],
    )


def _check_options(options: FinetuneOptions) -> None:
    """Refuse numbers that cannot be meant."""
    least = {"seeds": 1, "epochs": 1, "batch_size": 1, "max_length": 8, "max_train": 2}
    least |= {"first_seed": 0}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {minimum} or more")
    if options.learning_rate is not None and not 0 < options.learning_rate < 1:
        raise UserError(f"--learning-rate {options.learning_rate}: give a number in (0, 1)")


def _learning_rate(repository: Path, options: FinetuneOptions) -> float:
    """Choose the rate for the model's size, and refuse a length that it cannot take."""
    from transformers import AutoConfig  # costs seconds to import

    with loaded_from(repository):
        config = AutoConfig.from_pretrained(repository, trust_remote_code=False)
    if options.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {options.max_length}: the model takes at most "
            f"{config.max_position_embeddings} tokens (max_position_embeddings)"
        )
    size = config.num_hidden_layers * config.hidden_size
    return options.learning_rate or RATE_TIMES_SIZE / size


def _settings(
    repository: Path,
    files: tuple[Path, Path],
    columns: Columns,
    learning_rate: float,
    options: FinetuneOptions,
) -> dict[str, Any]:
    """Name what a run depends on beside its start and seed."""
    names = ("epochs", "batch_size", "max_length", "max_train", "bf16")
    return {
        "model_sha256": model_digest(repository),
        "train_sha256": file_digest(files[0]),
        "test_sha256": file_digest(files[1]),
        "columns": asdict(columns),
        "learning_rate": learning_rate,
        "sift": asdict(options.sift) if options.sift else None,
        **{name: getattr(options, name) for name in names},
    }


def _train_and_score(
    repository: Path,
    name: RunName,
    task: Task,
    options: FinetuneOptions,
    learning_rate: float,
    strategy: Strategy,
) -> RunResult:
    """Train one model and score it on the test file."""
    kind, num_outputs = task.files.find_kind()
    plan = TrainingPlan(
        options.epochs, learning_rate, options.batch_size, bf16=options.bf16, sift=options.sift
    )
    head = Head(kind.head, num_outputs)
    how = (kind, task.train, plan, name.seed, strategy)
    with fine_tuned(repository, name.start, head, *how) as model:
        found = outputs(model, kind, task.test, options.batch_size, strategy, bf16=options.bf16)
        if options.save is not None:
            folder = Path(options.save) / f"{name.start}-seed-{name.seed}"
            save_model(model, repository, folder, task.files.labels)
    predictions = kind.predictions(found, task.test, task.files.test)
    figures = figures_of(task.files.kind, task.files.labels)
    rows = {f":{key}": f.rows(task.files.test, predictions) for key, f in figures.items()}
    scores = {key: f.value(rows[f":{key}"]) for key, f in figures.items()}
    counts = {"train": len(task.files.train), "": len(task.files.test)}
    return RunResult(name, {"": scores}, rows, counts)
