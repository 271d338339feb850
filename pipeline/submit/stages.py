"""A recipe as jobs, in the order in which they depend on each other.

    tokenizer -> prep (array) -> assemble -> pretrain -> export -> evaluate (array)

`assemble` is `prep` once more, as one process: it makes the dataset in case that no task of the
array saw what all others had finished, which a file server may show late; else it finds nothing to
do.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.manifest import is_complete
from pipeline.evaluate.catalogue import find_tasks
from pipeline.submit.recipe import Recipe
from pipeline.submit.rendering import Options, Parameters, PlainScript, render
from pipeline.submit.site_file import Site, placement_options
from pipeline.submit.tables import (
    EvaluateSection,
    ExportSection,
    JobSection,
    PrepSection,
    PretrainSection,
    TaskSection,
    TokenizerSection,
)

CONFIG_NAME = "config.json"
DEEPSPEED_NAME = "deepspeed.json"
EVALUATIONS_NAME = "evaluations.tsv"


@dataclass(frozen=True)
class Layout:
    """Where everything of a chain lies; all paths are absolute."""

    work: Path
    """Where `deberta submit` was typed, and where the jobs run."""
    run: Path
    tokenizer: Path
    dataset: Path | None
    export: Path
    evaluation: Path

    @property
    def slurm(self) -> Path:
        """The chain's own folder in the run folder."""
        return self.run / "slurm"

    @classmethod
    def of(cls, recipe: Recipe, work: Path) -> "Layout":
        """Find the paths of a recipe.

        Args:
            recipe: The recipe.
            work: Absolute folder that relative paths are seen from.

        Returns:
            The layout.

        Raises:
            UserError: The run's path holds what SLURM reads in its own way in names of logs.
        """
        run = work / recipe.run.folder
        if bad := {*"%\\"} & {*str(run)}:
            raise UserError(
                f"run.folder {run}: SLURM reads {' and '.join(sorted(bad))} in names of logs "
                "in its own way; submit from another folder, or name another run.folder"
            )

        def place(given: str | None, default: str) -> Path:
            return run / default if given is None else work / given

        tokenizer = recipe.prep.tokenizer if recipe.prep else None
        made = recipe.tokenizer.output if recipe.tokenizer else None
        given = recipe.pretrain.dataset if recipe.pretrain else None
        output = recipe.prep.output if recipe.prep else None
        has_dataset = given is not None or recipe.prep is not None
        return cls(
            work=work,
            run=run,
            tokenizer=place(tokenizer or made, "tokenizer"),
            dataset=place(given or output, "dataset") if has_dataset else None,
            export=place(recipe.export.output if recipe.export else None, "export"),
            evaluation=place(recipe.evaluate.output if recipe.evaluate else None, "evaluation"),
        )


@dataclass(frozen=True)
class Job:
    """One job, or one array of jobs.

    Attributes:
        stage: Its name in the chain.
        script: The plain script.
        options: sbatch option without dashes -> value, None for a flag.
        parameters: Variables of the script.
        results: What is there when it is done; see `is_done`.
        array_tasks: Tasks; None for a job that is no array.
    """

    stage: str
    script: PlainScript
    options: Options
    parameters: Parameters
    results: tuple[Path, ...]
    array_tasks: int | None = None

    def text(self, title: str) -> str:
        """Render the script.

        Args:
            title: What it is, for its first line.

        Returns:
            The script.

        Raises:
            UserError: A value cannot be in a script.
        """
        return render(title, self.script, self.options, self.parameters)

    def is_done(self) -> bool:
        """Whether its results are there, whole."""
        return all(_is_there(path) for path in self.results)


def _is_there(path: Path) -> bool:
    """A dataset by its seal, a run by its state.json, an export by a network; else a file."""
    if path.name == "state.json":
        try:
            return json.loads(path.read_text(encoding="utf-8"))["status"] == "done"
        except (OSError, ValueError, KeyError, TypeError):
            return False
    if path.name == "manifest.sha256":
        return is_complete(path.parent)
    if path.name == "*":
        return any(path.parent.glob("*/config.json"))
    return path.is_file()


@dataclass
class _Builder:
    """What all jobs of a chain share."""

    recipe: Recipe
    site: Site
    layout: Layout
    jobs: list[Job] = field(default_factory=list)

    def add(
        self,
        stage: str,
        section: JobSection,
        parameters: Parameters,
        results: Sequence[Path],
        options: Options,
        *,
        script: str = "",
        array_tasks: int | None = None,
    ) -> None:
        """Add a job; `options` are what its stage asks of sbatch beside what every job may."""
        plain = PlainScript.read(self.site.folder / f"{script or stage}.sbatch")
        header = dict(plain.options) | dict(self.site.options) | placement_options(section)
        if "array" not in options:
            header.pop("array", None)
        asked = {"nodes": section.nodes, "cpus-per-task": section.cpus_per_task}
        asked |= {"mem": section.mem, "time": section.time}
        asked |= {"gpus-per-node": section.gpus_per_node}
        header |= dict(options)
        header |= {name: str(value) for name, value in asked.items() if value is not None}
        if section.mem is not None:
            header.pop("mem-per-cpu", None)
        if header.get("gpus-per-node") == "0":
            del header["gpus-per-node"]
        log = "%x-%A_%a.out" if array_tasks else "%x-%j.out"
        header |= {
            "job-name": f"{self.recipe.name}-{stage}",
            "chdir": str(self.layout.work),
            "output": str(self.layout.slurm / "logs" / log),
        }
        for word in section.sbatch_options:
            name, equals, value = word.removeprefix("--").partition("=")
            header[name] = value if equals else None
        # The scripts source what lies beside them in the run folder.
        shared = {**self.site.parameters, "DEBERTA_HOME": str(self.layout.run)}
        all_parameters = {**shared, **parameters}
        job = Job(stage, plain, header, all_parameters, tuple(results), array_tasks)
        self.jobs.append(job)


def plan_jobs(recipe: Recipe, site: Site, layout: Layout) -> list[Job]:
    """Turn the stages of a recipe into jobs.

    Args:
        recipe: The recipe.
        site: The site.
        layout: The recipe's paths.

    Returns:
        Jobs; each depends on the one before it.

    Raises:
        UserError: A plain script is missing or cannot be read.
    """
    builder = _Builder(recipe, site, layout)
    if recipe.tokenizer is not None:
        _add_tokenizer(builder, recipe.tokenizer)
    if recipe.prep is not None:
        _add_prep(builder, recipe.prep)
    if recipe.pretrain is not None:
        _add_pretrain(builder, recipe.pretrain)
    if recipe.export is not None:
        _add_export(builder, recipe.export)
    if recipe.evaluate is not None:
        _add_evaluate(builder, recipe.evaluate)
    return builder.jobs


def evaluations(recipe: Recipe, layout: Layout) -> list[list[str]]:
    """Give the evaluations of a recipe, each one array task.

    Args:
        recipe: A recipe with [evaluate].
        layout: Its paths.

    Returns:
        A name and words of `deberta evaluate` each.
    """
    section = recipe.evaluate
    assert section is not None, "no evaluation was asked for"
    rows = []
    dataset = layout.work / section.dataset if section.dataset else layout.dataset
    device = [] if section.device is None else ["--device", section.device]
    if dataset is not None:
        rows.append(["heldout", "--dataset", str(dataset), *device])
    for task in section.tasks:
        for number, words in enumerate(_models(task, section.seeds, layout)):
            rows.append([f"{task.name}-{number}", *_words(task), *words, *device])
    return rows


def _models(task: TaskSection, seeds: int, layout: Layout) -> Iterator[list[str]]:
    """The words that single out each model of a task."""
    # Own files: both starts of a seed stand side by side in one array task.
    starts = 2 if task.random_start else 1
    models = seeds if task.task is None else len(find_tasks(task.task)) * starts * seeds
    results = str(_results_folder(task, layout))
    for model in range(models):
        yield ["--seeds", str(seeds), "--shard", f"{model}/{models}", "--results", results]


def _results_folder(task: TaskSection, layout: Layout) -> Path:
    """Where the models of a task find each other; the last makes the report."""
    return layout.evaluation / task.name


def _add_tokenizer(builder: _Builder, section: TokenizerSection) -> None:
    output = builder.layout.work / section.output if section.output else builder.layout.tokenizer
    parameters = {
        "SOURCES": section.sources,
        "OUTPUT": str(output),
        "TOKENIZER_WORDS": _words(section),
    }
    builder.add("tokenizer", section, parameters, [output / "spm.model"], {})


def _add_prep(builder: _Builder, section: PrepSection) -> None:
    layout = builder.layout
    output = layout.work / section.output if section.output else layout.run / "dataset"
    sources = ["--recipe", section.recipe] if section.recipe else []
    parameters: dict[str, str | Sequence[str]] = {
        "SOURCES": section.sources,
        "TOKENIZER": str(layout.tokenizer),
        "OUTPUT": str(output),
        "PREP_WORDS": [*sources, *_words(section)],
        "EXECUTOR": section.executor,
    }
    results = [output / "manifest.sha256"]
    if section.executor == "mpi":
        ranks = {"ntasks": str(section.ntasks), "cpus-per-task": "1"}
        builder.add("prep", section, parameters, results, ranks)
        return
    if section.executor == "processes":
        builder.add("prep", section, parameters, results, {})
        return
    tasks = section.array_tasks
    array = {"array": _array(tasks, section.array_at_once)}
    builder.add("prep", section, parameters, results, array, array_tasks=tasks)
    alone = parameters | {"EXECUTOR": "processes"}
    builder.add("assemble", section, alone, results, {}, script="prep")


def _add_pretrain(builder: _Builder, section: PretrainSection) -> None:
    layout = builder.layout
    limits = {
        "MAX_RESTARTS": section.max_restarts,
        "MAX_CRASHES_WITHOUT_PROGRESS": section.max_crashes_without_progress,
    }
    parameters = {
        "RUN": str(layout.run),
        "DATASET": str(layout.dataset),
        "CONFIG": str(layout.slurm / CONFIG_NAME),
        "DEEPSPEED_CONFIG": str(layout.slurm / DEEPSPEED_NAME),
        "LAUNCHER": section.launcher,
        "PREFLIGHT": str(int(section.preflight)),
        **{name: str(value) for name, value in limits.items() if value is not None},
    }
    gpus = section.gpus_per_node or 0
    options = {
        "ntasks-per-node": str(section.ntasks_per_node or gpus),
        "gpus-per-node": str(gpus),
    }
    if section.signal_seconds is not None:
        options["signal"] = f"B:USR1@{section.signal_seconds}"
    builder.add("pretrain", section, parameters, [layout.run / "state.json"], options)


def _add_export(builder: _Builder, section: ExportSection) -> None:
    layout = builder.layout
    run = layout.work / section.run if section.run else layout.run
    # The dataset may have been moved since the run began; its tokenizer is exported.
    dataset = ["--dataset", str(layout.dataset)] if layout.dataset else []
    parameters = {
        "RUN": str(run),
        "OUTPUT": str(layout.export),
        "EXPORT_WORDS": [*dataset, *_words(section)],
    }
    builder.add("export", section, parameters, [layout.export / "*"], {})


def _add_evaluate(builder: _Builder, section: EvaluateSection) -> None:
    layout = builder.layout
    default = layout.export if builder.recipe.export else layout.run
    model = layout.work / section.model if section.model else default
    rows = evaluations(builder.recipe, layout)
    parameters = {
        "MODEL": str(model),
        "OUTPUT": str(layout.evaluation),
        "EVALUATIONS": str(layout.slurm / EVALUATIONS_NAME),
    }
    results = [layout.evaluation / f"{name}.json" for name, *_ in rows]
    results += [_results_folder(task, layout) / "results.json" for task in section.tasks]
    array = {"array": _array(len(rows), section.array_at_once)}
    builder.add("evaluate", section, parameters, results, array, array_tasks=len(rows))


def _array(tasks: int, at_once: int | None) -> str:
    """Write sbatch's --array."""
    limit = "" if at_once is None else f"%{at_once}"
    return f"0-{tasks - 1}{limit}"


def _words(section: Any) -> list[str]:
    """Write the options of a stage's command, those that the recipe names."""
    return list(_options(section))


def _options(section: Any) -> Iterator[str]:
    for name in section.WORDS:
        value, option = getattr(section, name), name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
            continue
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            yield from (f"--{option}", str(each))
