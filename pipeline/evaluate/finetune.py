"""Fine-tuning on a labelled task: what the pre-training is worth against a random start.

For every seed the same network is trained twice on the same batches, from the pre-trained weights
and from random ones, and both are scored on the test file. The models are transformers' own
(AutoModelForSequenceClassification, AutoModelForTokenClassification), as a user would fine-tune
them. AdamW, linear warm-up and decay, gradients clipped at norm 1; nothing is chosen on the test
file.

Letters: B sequences, L sequence length, C labels.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.fitting import Head, fine_tuned
from pipeline.evaluate.heads import loaded_from
from pipeline.evaluate.heldout_model import choose_device
from pipeline.evaluate.labelled import DEFAULT_COLUMNS, Columns, TaskKind, task_kind
from pipeline.evaluate.load import encoder_repository
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.recipes import RATE_TIMES_SIZE
from pipeline.evaluate.sift import SiftOptions
from pipeline.evaluate.stepping import AloneStrategy, Strategy
from pipeline.evaluate.tasks import Scores, Task, build_task, read_task
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

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values, the summary included.
        """
        return {**asdict(self), "summary": self.summary()}


def finetune(
    model: Path,
    train: Path,
    test: Path,
    *,
    options: FinetuneOptions = FinetuneOptions(),
    columns: Columns = DEFAULT_COLUMNS,
    kind: TaskKind | None = None,
    dataset: Path | None = None,
    strategy: Strategy | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> FinetuneReport:
    """Fine-tune a model on a labelled file, from its weights and from random ones.

    Args:
        model: A run folder, a commit, an export or a repository with spm.model.
        train: Training file.
        test: Test file.
        options: How to fine-tune.
        columns: Columns of a classification file.
        kind: Kind of task; by the name of the training file where None.
        dataset: For a run or commit, where its dataset is now.
        strategy: Who takes part; this process alone, on `options.device`, where None.
        say: Gets a line after every trained model.

    Returns:
        Scores of all runs and of the baselines.

    Raises:
        UserError: A file or an option is unusable, or training diverged.
        CorruptError: The model is damaged.
    """
    _check_options(options)
    kind = task_kind(train, kind)
    strategy = strategy or AloneStrategy(choose_device(options.device))
    files = read_task(kind, train, test, columns, options.max_train)
    with encoder_repository(model, dataset) as repository:
        from transformers import AutoConfig  # costs seconds to import

        with loaded_from(repository):
            config = AutoConfig.from_pretrained(repository, trust_remote_code=False)
        if options.max_length > config.max_position_embeddings:
            raise UserError(
                f"--max-length {options.max_length}: the model takes at most "
                f"{config.max_position_embeddings} tokens (max_position_embeddings)"
            )
        size = config.num_hidden_layers * config.hidden_size
        rate = options.learning_rate or RATE_TIMES_SIZE / size
        data = build_task(files, Tokenizer.load(repository), options.max_length)
        runs = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for start in options.starts:
                scores = _train_and_score(repository, start, data, options, rate, seed, strategy)
                runs.append(FinetuneRun(start, seed, scores))
                figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
                say(f"seed {seed}, {start}: {figures}")
    return FinetuneReport(
        str(model),
        kind,
        len(files.train),
        len(files.test),
        files.labels,
        data.num_truncated,
        rate,
        options,
        tuple(runs),
        data.baselines,
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


def _train_and_score(
    repository: Path,
    start: str,
    task: Task,
    options: FinetuneOptions,
    learning_rate: float,
    seed: int,
    strategy: Strategy,
) -> Scores:
    """Train one model and score it on the test file."""
    kind, num_outputs = task.files.find_kind()
    plan = TrainingPlan(
        options.epochs, learning_rate, options.batch_size, bf16=options.bf16, sift=options.sift
    )
    head = Head(kind.head, num_outputs)
    with fine_tuned(repository, start, head, kind, task.train, plan, seed, strategy) as model:
        rows = outputs(model, kind, task.test, options.batch_size, strategy, bf16=options.bf16)
    return task.score(kind.predictions(rows, task.test, task.files.test))
