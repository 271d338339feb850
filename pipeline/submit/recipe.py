"""The recipe of a chain: one TOML that names the stages and what each is given.

    [run]                     # folder: everything of the chain lies there unless said otherwise
    [site]                    # what differs from slurm/site.env
    [tokenizer] [prep] [pretrain] [export] [evaluate]   # a stage is there if its table is there

Keys of jobs are sbatch's (nodes, gpus_per_node, time, mem, ...), keys of a stage are the options of
its command: `pipeline.submit.tables` has them. All problems are reported in one message. Paths are
seen from where `deberta submit` is typed, as on any command line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.errors import UserError
from pipeline.config_files import read_toml
from pipeline.evaluate.catalogue import find_tasks
from pipeline.findings import describe_error, dotted, model_at, nearest, raise_findings
from pipeline.submit.tables import (
    EvaluateSection,
    ExportSection,
    PrepSection,
    PretrainSection,
    RunSection,
    SiteSection,
    Strict,
    TaskSection,
    TokenizerSection,
)

STAGES = ("tokenizer", "prep", "pretrain", "export", "evaluate")


class Recipe(Strict):
    """A whole recipe."""

    run: RunSection
    site: SiteSection = SiteSection()
    tokenizer: TokenizerSection | None = None
    prep: PrepSection | None = None
    pretrain: PretrainSection | None = None
    export: ExportSection | None = None
    evaluate: EvaluateSection | None = None

    @property
    def name(self) -> str:
        """What begins the names of the jobs."""
        folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.run.folder).name).strip("-.")
        return self.run.name or folder or "run"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that the recipe has, in their order."""
        return tuple(stage for stage in STAGES if getattr(self, stage) is not None)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: A TOML file.

    Returns:
        The checked recipe.

    Raises:
        UserError: With every problem in one message.
    """
    # As tuples, because the models are frozen; TOML knows lists alone.
    values = _with_tuples(read_toml(path))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        findings = [_line(problem) for problem in error.errors(include_url=False)]
        raise_findings(str(path), findings)
        raise AssertionError("a validation error without a finding") from error
    raise_findings(str(path), list(_contradictions(recipe)))
    return recipe


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _line(problem: Any) -> str:
    """Translate one pydantic error."""
    location = problem["loc"]
    path = dotted(location)
    if problem["type"] == "extra_forbidden":
        parent = model_at(Recipe, [part for part in location[:-1] if isinstance(part, str)])
        table = dotted(location[:-1])
        known = parent.model_fields
        kind = f"key in [{table}]" if table else "table"
        return f"'{location[-1]}' is no {kind}{nearest(str(location[-1]), known)}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    if location[-1] == "[key]":
        path = dotted(location[:-2])
    return f"{path} {describe_error(problem)}"


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """Rules that join keys."""
    if not recipe.stages:
        yield f"no stage is named; add one of {', '.join(f'[{stage}]' for stage in STAGES)}"
    if (prep := recipe.prep) is not None:
        yield from _prep_contradictions(prep, has_tokenizer=recipe.tokenizer is not None)
    if (pretrain := recipe.pretrain) is not None:
        if pretrain.dataset is None and recipe.prep is None:
            yield "pretrain.dataset is missing: give a dataset, or a stage [prep] that makes it"
        if not pretrain.gpus_per_node and not pretrain.ntasks_per_node:
            yield (
                "pretrain.gpus_per_node is missing: ranks of a node; without GPUs give"
                " pretrain.ntasks_per_node"
            )
        for word in pretrain.overrides:
            if word.startswith(("data.path=", "run.folder=")):
                key = "pretrain.dataset" if word.startswith("data") else "run.folder"
                yield f"pretrain.overrides: '{word}' has a key of its own, {key}"
    if recipe.evaluate is not None:
        yield from _evaluate_contradictions(recipe.evaluate, has_dataset=bool(_dataset_of(recipe)))


def _evaluate_contradictions(evaluate: EvaluateSection, *, has_dataset: bool) -> Iterator[str]:
    names = [task.name for task in evaluate.tasks]
    for name in sorted({name for name in names if names.count(name) > 1 or name == "heldout"}):
        yield f"evaluate.tasks: the name '{name}' is taken; give another"
    if not names and not has_dataset:
        yield "evaluate has nothing to do: give evaluate.dataset, or [[evaluate.tasks]]"
    for task in evaluate.tasks:
        yield from (f"evaluate.tasks {task.name}: {line}" for line in _task_contradictions(task))


def _task_contradictions(task: TaskSection) -> Iterator[str]:
    own = [name for name in TaskSection.OF_OWN_FILES if getattr(task, name) is not None]
    if task.task is None and task.data is None:
        if missing := [name for name in ("train", "test") if name not in own]:
            yield (
                f"{' and '.join(missing)} missing: give train and test, files of your own, or task "
                "and data, a published one"
            )
        return
    if own:
        yield f"{', '.join(own)} belong to files of your own; a published task has task and data"
    if task.task is None or task.data is None:
        yield "task and data go together: name tasks or suites, and where their data are"
    if task.task is not None:
        try:
            find_tasks(task.task)
        except UserError as error:
            yield str(error)


def _prep_contradictions(prep: PrepSection, *, has_tokenizer: bool) -> Iterator[str]:
    if bool(prep.sources) == (prep.recipe is not None):
        yield "prep: give one of prep.sources and prep.recipe"
    if prep.tokenizer is None and not has_tokenizer:
        yield "prep.tokenizer is missing: give one, or a stage [tokenizer] that makes it"
    if prep.executor == "mpi" and prep.ntasks is None:
        yield "prep.ntasks is missing: with executor 'mpi', the ranks (one plans)"
    if prep.executor != "mpi" and prep.ntasks is not None:
        yield f"prep.ntasks belongs to executor 'mpi'; prep.executor is '{prep.executor}'"


def _dataset_of(recipe: Recipe) -> str | None:
    """Whether evaluation has a held-out split to measure on."""
    pretrain, evaluate = recipe.pretrain, recipe.evaluate
    named = (evaluate and evaluate.dataset, pretrain and pretrain.dataset)
    return next((name for name in named if name), "RUN/dataset" if recipe.prep else None)
