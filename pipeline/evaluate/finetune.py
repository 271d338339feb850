"""Fine-tuning on a labelled task: what the pre-training is worth against a random start.

For every seed the same network is trained twice on the same batches, from the pre-trained weights
and from random ones, and both are scored on the test file. The models are transformers' own
(AutoModelForSequenceClassification, AutoModelForTokenClassification), as a user would fine-tune
them. AdamW, linear warm-up and decay, gradients clipped at norm 1; nothing is chosen on the test
file.

Letters: B sequences, L sequence length, C labels.
"""

import math
import pickle
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.heldout_model import choose_device
from pipeline.evaluate.labelled import DEFAULT_COLUMNS, Columns, TaskKind, task_kind
from pipeline.evaluate.load import encoder_repository
from pipeline.evaluate.tasks import IGNORED, Feature, Scores, Task, build_task, read_task

STARTS = ("pretrained", "random")
_WARMUP_SHARE = 0.1
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0
# The released recipes for MNLI (large 7e-6, base 1.5e-5, small and xsmall 4.5e-5) lie between 0.14
# and 0.21 over layers x width.
_RATE_TIMES_SIZE = 0.2


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
    task: TaskKind | None = None,
    dataset: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> FinetuneReport:
    """Fine-tune a model on a labelled file, from its weights and from random ones.

    Args:
        model: A run folder, a commit, an export or a repository with spm.model.
        train: Training file.
        test: Test file.
        options: How to fine-tune.
        columns: Columns of a classification file.
        task: Kind of task; by the name of the training file where None.
        dataset: For a run or commit, where its dataset is now.
        say: Gets a line after every trained model.

    Returns:
        Scores of all runs and of the baselines.

    Raises:
        UserError: A file or an option is unusable, or training diverged.
        CorruptError: The model is damaged.
    """
    _check_options(options)
    device, kind = choose_device(options.device), task_kind(train, task)
    files = read_task(kind, train, test, columns, options.max_train)
    with encoder_repository(model, dataset) as repository:
        from transformers import AutoConfig  # costs seconds to import

        with _loaded_from(repository):
            config = AutoConfig.from_pretrained(repository, trust_remote_code=False)
        if options.max_length > config.max_position_embeddings:
            raise UserError(
                f"--max-length {options.max_length}: the model takes at most "
                f"{config.max_position_embeddings} tokens (max_position_embeddings)"
            )
        size = config.num_hidden_layers * config.hidden_size
        rate = options.learning_rate or _RATE_TIMES_SIZE / size
        data = build_task(files, Tokenizer.load(repository), options.max_length)
        runs = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for start in options.starts:
                scores = _train_and_score(repository, start, data, options, rate, seed, device)
                runs.append(FinetuneRun(start, seed, scores))
                figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
                say(f"seed {seed}, {start}: {figures}")
    return FinetuneReport(
        str(model),
        kind,
        len(files.train),
        len(files.test),
        data.labels,
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


@contextmanager
def _loaded_from(repository: Path) -> Iterator[None]:
    """Say of a repository that transformers refuses what is wrong with it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{repository}: its weights are damaged, or hold Python objects beside the tensors; "
            "such a file can run any program and is not loaded: convert it to model.safetensors "
            "where that may do no harm"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{repository}: transformers cannot load this model ({reason}); name a run, an export, "
            "or a DeBERTa-v2/v3 repository"
        ) from error


def _build_model(repository: Path, start: str, task: Task) -> Any:
    """Build transformers' model for a task, with pre-trained or random weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # the new head's missing weights are no news
    transformers.utils.logging.disable_progress_bar()
    auto_class = (
        transformers.AutoModelForSequenceClassification
        if task.kind == "classification"
        else transformers.AutoModelForTokenClassification
    )
    if start == "pretrained":
        return auto_class.from_pretrained(
            repository,
            num_labels=len(task.labels),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    config = transformers.AutoConfig.from_pretrained(
        repository, num_labels=len(task.labels), trust_remote_code=False
    )
    return auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _train_and_score(
    repository: Path,
    start: str,
    task: Task,
    options: FinetuneOptions,
    learning_rate: float,
    seed: int,
    device: torch.device,
) -> Scores:
    """Train one model and score it on the test file."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with _loaded_from(repository):
            model = _build_model(repository, start, task)
        model.to(device)
        # Drawn after the new weights, dropout would follow from how many there are.
        torch.manual_seed(seed)
        _train(model, task.train, options, learning_rate, seed, device)
    return task.score(_predict(model, task.test, options.batch_size, device))


def _train(
    model: Any,
    features: Sequence[Feature],
    options: FinetuneOptions,
    learning_rate: float,
    seed: int,
    device: torch.device,
) -> None:
    """Train for some epochs with linear warm-up and decay."""
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=learning_rate)
    num_steps = options.epochs * math.ceil(len(features) / options.batch_size)
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    order = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for _ in range(options.epochs):
        shuffled = torch.randperm(len(features), generator=order).tolist()
        for batch in _batches([features[i] for i in shuffled], options.batch_size, device):
            factor = min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            logits = model(batch.input_ids_BL, attention_mask=batch.mask_BL).logits
            loss = F.cross_entropy(
                logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED
            )
            if not torch.isfinite(loss):
                raise UserError(
                    f"fine-tuning diverged in step {step + 1}: give a lower --learning-rate than "
                    f"{learning_rate:.2g}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def _parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Decay matrices, but no bias and no LayerNorm weight."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _predict(
    model: Any, features: Sequence[Feature], batch_size: int, device: torch.device
) -> list[int]:
    """Predict every label of some features, in order."""
    model.eval()
    predictions: list[int] = []
    for batch in _batches(features, batch_size, device):
        best = model(batch.input_ids_BL, attention_mask=batch.mask_BL).logits.argmax(-1)
        predictions += best[batch.labels != IGNORED].tolist()
    return predictions


@dataclass(frozen=True)
class _Batch:
    """Padded features on the device."""

    input_ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    labels: torch.Tensor
    """int64 [B] for classification, [B, L] for tagging."""


def _batches(
    features: Sequence[Feature], batch_size: int, device: torch.device
) -> Iterator[_Batch]:
    """Pad neighbours to the longest of each batch."""
    for first in range(0, len(features), batch_size):
        chosen = features[first : first + batch_size]
        ids_BL = _padded([f.input_ids for f in chosen], Tokenizer.pad_id)
        lengths_B = torch.tensor([len(f.input_ids) for f in chosen])
        mask_BL = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        labels = _padded([f.labels for f in chosen], IGNORED)
        if labels.shape[1] == 1:  # of a sequence; tags are at least three, with [CLS] and [SEP]
            labels = labels[:, 0]
        yield _Batch(ids_BL.to(device), mask_BL.long().to(device), labels.to(device))


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Stack rows of different lengths."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
