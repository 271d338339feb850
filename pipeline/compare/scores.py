"""Fine-tuned scores of finished runs on labelled files, each stored as soon as it is there.

The encoder is the discriminator of replaced token detection, or the network of masked language
modelling. Every seed of pre-training is fine-tuned with the same seeds of fine-tuning.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.commit import list_commits
from pipeline.compare.figures import Spread, spreads
from pipeline.compare.plan import Plan, Run
from pipeline.compare.systems import System
from pipeline.evaluate.finetune import STARTS, FinetuneOptions, finetune
from pipeline.evaluate.labelled import Columns, task_kind
from pipeline.evaluate.load import encoder_repository
from pipeline.evaluate.tasks import read_task
from pipeline.run_folder import to_json, write_durably


@dataclass(frozen=True)
class LabelledTask:
    """A training and a test file."""

    train: Path
    test: Path

    @property
    def name(self) -> str:
        """The training file's name; of a `train.*` that of its folder."""
        return self.train.resolve().parent.name if self.train.stem == "train" else self.train.stem


@dataclass(frozen=True)
class Scoring:
    """What is fine-tuned, and how."""

    tasks: tuple[LabelledTask, ...]
    options: FinetuneOptions
    columns: Columns


def check_scoring(scoring: Scoring, systems: Sequence[System]) -> None:
    """Read all labelled files before anything is trained.

    Args:
        scoring: What will be fine-tuned.
        systems: Whose encoders.

    Raises:
        UserError: A file is unusable, two tasks have one name, or sequences are too long.
    """
    names = [task.name for task in scoring.tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--train: two tasks have the name {name!r}; name the files, or the folders of"
                " files called train.*, after their tasks"
            )
    for task in scoring.tasks:
        kind = task_kind(task.train, None)
        read_task(kind, task.train, task.test, scoring.columns, scoring.options.max_train)
    for system in systems if scoring.tasks else ():
        encoder = system.config.discriminator or system.config.generator
        if scoring.options.max_length > encoder.max_position_embeddings:
            raise UserError(
                f"--max-length {scoring.options.max_length}: {system.name} takes at most"
                f" {encoder.max_position_embeddings} tokens (max_position_embeddings)"
            )


def score_run(
    run: Run, plan: Plan, scoring: Scoring, starts: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, Any]:
    """Fine-tune a finished run on all tasks, or read what an earlier call has stored.

    Args:
        run: A finished run.
        plan: Its comparison.
        scoring: What is fine-tuned, and how.
        starts: What to begin from; a random start is the same for all runs of a system.
        say: Gets a line after every model.

    Returns:
        Task -> `FinetuneReport.to_dict()`.

    Raises:
        UserError: A model cannot be fine-tuned.
        CorruptError: The run's commit is damaged.
    """
    scoring = dataclasses.replace(
        scoring, options=dataclasses.replace(scoring.options, starts=starts)
    )
    files = {
        task.name: plan.output / "finetuned" / f"{run.name}-{task.name}.json"
        for task in scoring.tasks
    }
    keys = {task.name: _key(task, run, scoring) for task in scoring.tasks}
    reports = {name: _stored(path, keys[name]) for name, path in files.items()}
    missing = [task for task in scoring.tasks if reports[task.name] is None]
    if missing:
        with encoder_repository(run.folder, plan.dataset.folder) as repository:
            for task in missing:
                report = finetune(
                    repository,
                    task.train,
                    task.test,
                    options=scoring.options,
                    columns=scoring.columns,
                    say=lambda line, name=task.name: say(f"{run.name}, {name}: {line}"),
                ).to_dict()
                value = {"key": keys[task.name], "report": {**report, "model": str(run.folder)}}
                write_durably(files[task.name], to_json(value))
                reports[task.name] = _stored(files[task.name], keys[task.name])
    return reports


def _key(task: LabelledTask, run: Run, scoring: Scoring) -> dict[str, Any]:
    """What a stored score depends on, JSON-ready."""
    files = {"train": task.train, "test": task.test}
    commit = list_commits(run.folder / "checkpoints")[-1].path
    return {
        "weights": (commit / "manifest.sha256").read_text(encoding="utf-8").strip(),
        "options": {**dataclasses.asdict(scoring.options), "starts": [*scoring.options.starts]},
        "columns": dataclasses.asdict(scoring.columns),
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
    }


def _stored(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Read a stored report; None where there is none, or one of something else."""
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return value["report"] if value["key"] == key else None


def summarize(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Sum up a task over the runs of a system.

    Args:
        reports: One a pre-training seed, as `score_run` gives them.

    Returns:
        Start -> figure -> spread: "pretrained" over pre-training seeds, each the mean over its
        fine-tunings; "random" over seeds of fine-tuning, because no pre-training enters there.
    """
    pretrained = [
        {name: value["mean"] for name, value in report["summary"]["pretrained"].items()}
        for report in reports
    ]
    runs = [run for report in reports for run in report["runs"]]
    random = [run["scores"] for run in runs if run["start"] == "random"]
    return dict(zip(STARTS, (spreads(pretrained), spreads(random)), strict=True))
