"""The recipe of a chain: one TOML that names the stages and what each is given.

    [run]                     # folder: everything of the chain lies there unless said otherwise
    [site]                    # what differs from slurm/site.env
    [tokenizer] [prep] [pretrain] [export] [evaluate]   # a stage is there if its table is there

Keys of jobs are sbatch's (nodes, gpus_per_node, time, mem, ...), keys of a stage are the options of
its command. All problems are reported in one message. Paths are seen from where `deberta submit` is
typed, as on any command line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from pipeline.config_files import read_toml
from pipeline.findings import describe_error, dotted, model_at, nearest, raise_findings

STAGES = ("tokenizer", "prep", "pretrain", "export", "evaluate")

# What `deberta submit` says itself; two answers to one question would hide one of them.
_OWN_OPTIONS = frozenset(
    (
        *("array", "chdir", "comment", "dependency", "error", "export", "job-name"),
        *("kill-on-invalid-dep", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output"),
        *("parsable", "requeue", "no-requeue", "signal", "test-only", "wait", "wrap"),
    )
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d(:\d\d)?)?")


def _one_line(value: str) -> str:
    """A line break would end a line of a script and begin one of its own."""
    if not value:
        raise PydanticCustomError("empty", "give a text, or leave the key out")
    if _CONTROL.search(value):
        raise PydanticCustomError("control", "control characters and line breaks are not allowed")
    return value


def _matching(pattern: str, cure: str) -> AfterValidator:
    """Accept what matches as a whole."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PydanticCustomError("form", "{cure}", {"cure": cure})
        return value

    return AfterValidator(check)


def _time(value: str) -> str:
    if not _TIME.fullmatch(value):
        raise PydanticCustomError(
            "time", "write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
        )
    return value


def _sbatch_option(value: str) -> str:
    name = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", value)
    if name is None or _CONTROL.search(value):
        raise PydanticCustomError("option", "write --option or --option=value")
    if name[1] in _OWN_OPTIONS:
        raise PydanticCustomError(
            "option", "--{name} is set by `deberta submit`; leave it out", {"name": name[1]}
        )
    return value


Text = Annotated[str, AfterValidator(_one_line)]
Time = Annotated[str, AfterValidator(_time)]
Name = Annotated[
    str, _matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "use letters, digits and . _ - alone")
]
Memory = Annotated[str, _matching(r"\d+[KMGT]?", "write a number with K, M, G or T")]
SbatchOption = Annotated[str, AfterValidator(_sbatch_option)]
Variable = Annotated[
    str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "it is no name of an environment variable")
]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A table of the recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Placement(Strict):
    """Where jobs run; names are those of sbatch's options."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    reservation: Text | None = None
    constraint: Text | None = None
    clusters: Text | None = None


class SiteSection(Placement):
    """[site]: what differs from slurm/site.env, for all stages."""

    file: Text | None = None
    """Another site.env."""
    setup: Text | None = None
    """DEBERTA_SETUP: a file that every job sources first."""
    container: str | None = None
    """DEBERTA_CONTAINER: words before every command; empty for none."""
    environment: dict[Variable, Text] = Field(default_factory=dict)
    """Further variables for all jobs."""


class RunSection(Strict):
    """[run]: the folder of the chain."""

    folder: Text
    """Run folder: scripts, logs, checkpoints; outputs of other stages where they name none."""
    name: Name | None = None
    """Begins the names of the jobs; the folder's own name where not given."""


class JobSection(Placement):
    """What every stage may ask of SLURM."""

    nodes: Count | None = None
    gpus_per_node: NotNegative | None = None
    cpus_per_task: Count | None = None
    mem: Memory | None = None
    time: Time | None = None
    sbatch_options: tuple[SbatchOption, ...] = ()
    """Further options, as they stand on sbatch's command line."""


class ReadingSection(JobSection):
    """How text is read, by the tokenizer and by prep."""

    text_field: Text | None = None
    txt_document: Literal["file", "line"] | None = None
    max_document_bytes: Count | None = None


class TokenizerSection(ReadingSection):
    """[tokenizer]: `deberta-prep train-tokenizer`."""

    WORDS: ClassVar = (
        *("vocab_size", "sample_bytes", "character_coverage"),
        *("text_field", "txt_document", "max_document_bytes"),
    )
    sources: Annotated[tuple[Text, ...], Field(min_length=1)]
    output: Text | None = None
    """RUN/tokenizer where not given."""
    vocab_size: Count = 128_000
    sample_bytes: Count | None = None
    character_coverage: Share | None = None


class PrepSection(ReadingSection):
    """[prep]: `deberta-prep build`."""

    WORDS: ClassVar = (
        *("text_field", "txt_document", "max_document_bytes", "min_characters", "clean"),
        *("heldout_fraction", "unit_bytes", "shard_tokens", "max_malformed", "dedup", "duplicates"),
    )
    sources: tuple[Text, ...] = ()
    recipe: Text | None = None
    """In place of sources: a recipe of `deberta-prep build`."""
    tokenizer: Text | None = None
    """What [tokenizer] makes, where not given."""
    output: Text | None = None
    """RUN/dataset where not given."""
    executor: Literal["slurm-array", "mpi", "processes"] = "slurm-array"
    array_tasks: Count = 8
    """With slurm-array: tasks, each of which does its share."""
    array_at_once: Count | None = None
    """With slurm-array: tasks that run at the same time."""
    ntasks: Annotated[int, Field(ge=2)] | None = None
    """With mpi: ranks; one plans, the others work."""
    min_characters: NotNegative | None = None
    clean: tuple[Text, ...] = ()
    heldout_fraction: Share | None = None
    unit_bytes: Count | None = None
    shard_tokens: Count | None = None
    max_malformed: Share | None = None
    dedup: Text | None = None
    duplicates: Literal["drop", "keep"] | None = None


class PretrainSection(JobSection):
    """[pretrain]: `python -m pipeline.train`, one task a GPU."""

    config: Text
    """Preset or TOML: what is learned."""
    deepspeed_config: Text
    """DeepSpeed JSON: how it is computed."""
    dataset: Text | None = None
    """What [prep] makes, where not given."""
    overrides: tuple[Text, ...] = ()
    """`section.key=value` words, as `deberta train` takes them."""
    ntasks_per_node: Count | None = None
    """Ranks of a node; one for each GPU where not given."""
    launcher: Literal["srun", "torchrun", "deepspeed"] = "srun"
    preflight: bool = True
    """Check every node first; one that fails is left out."""
    signal_seconds: Annotated[int, Field(ge=30)] | None = None
    """Time before the limit at which training commits and makes way."""
    max_restarts: NotNegative | None = None
    max_crashes_without_progress: Count | None = None


class ExportSection(JobSection):
    """[export]: `deberta export`."""

    WORDS: ClassVar = ("dtype",)
    run: Text | None = None
    """Run or checkpoint; run.folder where not given."""
    output: Text | None = None
    """RUN/export where not given."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None


class TaskSection(Strict):
    """[[evaluate.tasks]]: labelled files to fine-tune on."""

    WORDS: ClassVar = (
        *("train", "test", "task", "text_column", "text_pair_column", "label_column"),
        *("epochs", "learning_rate", "batch_size", "max_length", "max_train"),
    )
    name: Name
    train: Text
    test: Text
    task: Literal["classification", "tagging"] | None = None
    text_column: Text | None = None
    text_pair_column: Text | None = None
    label_column: Text | None = None
    epochs: Count | None = None
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    batch_size: Count | None = None
    max_length: Count | None = None
    max_train: Count | None = None


class EvaluateSection(JobSection):
    """[evaluate]: `deberta evaluate`, an array over tasks and seeds."""

    model: Text | None = None
    """What [export] makes, where not given; else the run."""
    output: Text | None = None
    """RUN/evaluation where not given: a JSON for each array task."""
    dataset: Text | None = None
    """Held-out figures of this dataset; what [prep] makes or [pretrain] names, where not given."""
    seeds: Count = 3
    """Models that are fine-tuned for each task, each in an array task of its own."""
    array_at_once: Count | None = None
    device: Literal["auto", "cpu", "cuda"] | None = None
    tasks: tuple[TaskSection, ...] = ()


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
    if (evaluate := recipe.evaluate) is not None:
        names = [task.name for task in evaluate.tasks]
        for name in sorted({name for name in names if names.count(name) > 1 or name == "heldout"}):
            yield f"evaluate.tasks: the name '{name}' is taken; give another"
        if not names and _dataset_of(recipe) is None:
            yield "evaluate has nothing to do: give evaluate.dataset, or [[evaluate.tasks]]"


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
