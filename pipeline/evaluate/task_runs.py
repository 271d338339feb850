"""One fine-tuned model of a published task: trained, scored, its predictions written, kept.

A finished run is two files, `TASK/START-seed-K.npz` (what its figures are made of) and then
`TASK/START-seed-K.json` (the figures), so that a killed evaluation goes on behind the last finished
run: a half-done one starts over, which costs at most one training.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data_prep.errors import UserError
from pipeline.evaluate.declaration import Recipe, TaskSpec
from pipeline.evaluate.features import Feature
from pipeline.evaluate.figures import FIGURES
from pipeline.evaluate.fitting import Head, fine_tuned
from pipeline.evaluate.kind import Kind, Limits
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.sift import SiftOptions
from pipeline.evaluate.stepping import Strategy
from pipeline.evaluate.submissions import FORMATS
from pipeline.evaluate.training import outputs

_WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "spm.model")


@dataclass(frozen=True)
class RunName:
    """Which model."""

    task: str
    start: str
    """"pretrained" or "random"."""
    seed: int

    @property
    def stem(self) -> str:
        """Path of its files without the suffix."""
        return f"{self.task}/{self.start}-seed-{self.seed}"


@dataclass(frozen=True)
class RunResult:
    """Figures of one model."""

    name: RunName
    scores: Mapping[str, Mapping[str, float]]
    """Part -> figure -> value."""
    rows: Mapping[str, np.ndarray]
    """"part:figure" -> rows, as in `figures`."""
    counts: Mapping[str, int]
    """Examples: "train", and each part."""


@dataclass(frozen=True)
class Inputs:
    """Examples with their features."""

    examples: Sequence[Any]
    features: Sequence[Feature]


@dataclass(frozen=True)
class PreparedTask:
    """A task whose data are read and tokenized."""

    spec: TaskSpec
    kind: Kind
    num_outputs: int
    recipe: Recipe
    train: Inputs
    scored: Mapping[str, Inputs]
    """Part -> its inputs; diagnostics included, where they are at hand."""
    predicted: Mapping[str, Inputs]
    """File of the submission -> its inputs."""

    def limits(self) -> Limits:
        """Give the length of the inputs."""
        return Limits(self.recipe.max_length)


def run_task(
    repository: Path,
    task: PreparedTask,
    name: RunName,
    *,
    bf16: bool,
    sift: SiftOptions | None = None,
    strategy: Strategy,
    predictions: Path | None,
) -> RunResult:
    """Train one model, score it, and write its predictions.

    Args:
        repository: Folder with config.json and weights.
        task: What to train on.
        name: Start and seed.
        bf16: Whether to compute in bf16.
        sift: Adversarial perturbation of the embeddings, if any.
        strategy: Who takes part, and where.
        predictions: Folder for submissions; none are written where None.

    Returns:
        Its figures.

    Raises:
        UserError: Training diverged.
    """
    recipe = task.recipe
    plan = TrainingPlan(
        recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.warmup_steps, bf16, sift
    )
    head = Head(task.kind.head, task.num_outputs, recipe.dropout)
    features = task.train.features
    with fine_tuned(
        repository, name.start, head, task.kind, features, plan, name.seed, strategy
    ) as model:

        def predict(inputs: Inputs) -> list[Any]:
            rows = outputs(
                model, task.kind, inputs.features, recipe.batch_size, strategy, bf16=bf16
            )
            return task.kind.predictions(rows, inputs.features, inputs.examples)

        scored = {part: predict(inputs) for part, inputs in task.scored.items()}
        predicted = {file: predict(inputs) for file, inputs in task.predicted.items()}
    if predictions is not None and strategy.rank == 0:
        for file, inputs in task.predicted.items():
            text = FORMATS[task.spec.submission](task.spec, inputs.examples, predicted[file])
            path = predictions / f"{name.start}-seed-{name.seed}" / file
            write_whole(path, text.encode("utf-8"))
    return _score(task, name, scored)


def _score(task: PreparedTask, name: RunName, found: Mapping[str, list[Any]]) -> RunResult:
    """Compare the predictions of every part, and of its groups, with the labels."""
    rows: dict[str, np.ndarray] = {}
    scores: dict[str, dict[str, float]] = {}
    counts = {"train": len(task.train.examples)}
    for part, inputs in task.scored.items():
        diagnostic = task.spec.diagnostics.get(part)
        figures = diagnostic.figures if diagnostic else task.spec.figures
        pairs = list(zip(inputs.examples, found[part], strict=True))
        chosen = {part: pairs}
        for group in task.spec.groups:
            chosen[f"{part} {group}".strip()] = [p for p in pairs if p[0].group == group]
        for label, some in chosen.items():
            if not some:
                continue
            examples, predictions = zip(*some, strict=True)
            for figure in figures:
                rows[f"{label}:{figure}"] = FIGURES[figure].rows(examples, predictions)
            scores[label] = {f: FIGURES[f].value(rows[f"{label}:{f}"]) for f in figures}
            counts[label] = len(examples)
    return RunResult(name, scores, rows, counts)


def write_run(folder: Path, result: RunResult, settings: Mapping[str, Any]) -> None:
    """Keep a finished run.

    Args:
        folder: Of all results.
        result: The run.
        settings: What it depends on; a run of other settings must not count.
    """
    path = folder / f"{result.name.stem}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    with partial.open("wb") as file:
        arrays: dict[str, Any] = dict(result.rows)
        np.savez_compressed(file, **arrays)
    partial.replace(path)
    values = {
        "task": result.name.task,
        "start": result.name.start,
        "seed": result.name.seed,
        "scores": result.scores,
        "counts": result.counts,
        "settings": settings,
    }
    # The mark that the run is finished is written last.
    write_whole(path.with_suffix(".json"), (json.dumps(values, indent=2) + "\n").encode())


def read_run(folder: Path, name: RunName, settings: Mapping[str, Any]) -> RunResult | None:
    """Read a finished run.

    Args:
        folder: Of all results.
        name: Which run.
        settings: What it must have been made with.

    Returns:
        The run; None where it is not finished.

    Raises:
        UserError: It was made with other settings, or is damaged.
    """
    path = folder / f"{name.stem}.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        with (
            path.with_suffix(".npz").open("rb") as stream,
            np.load(stream, allow_pickle=False) as file,
        ):
            rows = {key: file[key] for key in file.files}
        theirs = values["settings"]
        result = RunResult(name, values["scores"], rows, values["counts"])
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete it, and the run is made again"
        ) from error
    ours = json.loads(json.dumps(settings))
    if other := sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)):
        shown = ", ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} now" for k in other)
        raise UserError(
            f"{path} is of other settings: {shown}; give another --results, or delete the folder"
        )
    return result


def read_runs(
    folder: Path, names: Sequence[RunName], settings: Mapping[str, Mapping[str, Any]]
) -> dict[RunName, RunResult]:
    """Read those runs that are finished.

    Args:
        folder: Of all results.
        names: Which runs.
        settings: Task -> what its runs must have been made with.

    Returns:
        The finished runs, in the order of the names.

    Raises:
        UserError: One was made with other settings, or is damaged.
    """
    found = ((name, read_run(folder, name, settings[name.task])) for name in names)
    return {name: result for name, result in found if result is not None}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Args:
        path: The file; its folder is made.
        content: Its bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


@contextmanager
def results_folder(asked: Path | None) -> Iterator[Path]:
    """Provide the folder of finished runs.

    Args:
        asked: As the user says; a temporary one where None.

    Yields:
        The folder.
    """
    if asked is not None:
        asked.mkdir(parents=True, exist_ok=True)
        yield asked
        return
    with tempfile.TemporaryDirectory(prefix="deberta-evaluate-") as folder:
        yield Path(folder)


def check_shard(shard: tuple[int, int], results: Path | None) -> None:
    """Refuse a part of the runs that there is not, or that others could not find.

    Args:
        shard: Which part, counted from 0, of how many.
        results: Folder of finished runs.

    Raises:
        UserError: It is no part, or the runs are kept nowhere.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise UserError(f"--shard {part}/{parts}: give i/n with 0 <= i < n")
    if parts > 1 and results is None:
        raise UserError(
            "--shard needs --results FOLDER, which all shards share: there they find each other"
        )


def file_digest(path: Path) -> str:
    """Fingerprint a file.

    Args:
        path: The file.

    Returns:
        sha256, hexadecimal.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(repository: Path) -> str:
    """Fingerprint what is fine-tuned: weights, configuration and vocabulary.

    Args:
        repository: Its folder.

    Returns:
        sha256, hexadecimal.
    """
    paths = [path for pattern in _WEIGHT_FILES for path in sorted(repository.glob(pattern))]
    digests = "".join(file_digest(path) for path in paths)
    return hashlib.sha256(bytes.fromhex(digests)).hexdigest()
