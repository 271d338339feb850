"""The tables of a recipe: their keys, and what may stand in them.

JobSection, Placement      what every stage may ask of SLURM; names are those of sbatch's options
TokenizerSection ... EvaluateSection    a stage each; `WORDS` are options of its command
SiteSection, RunSection    what all stages share
"""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

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
Kind = Literal["classification", "regression", "tagging", "span", "multiple-choice"]


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

    WORDS: ClassVar = ("dtype", "average", "license")
    run: Text | None = None
    """Run or checkpoint; run.folder where not given."""
    output: Text | None = None
    """RUN/export where not given."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    average: Count | None = None
    license: Text | None = None


class TaskSection(Strict):
    """[[evaluate.tasks]]: published tasks, or labelled files of one's own, to fine-tune on."""

    OF_OWN_FILES: ClassVar = (
        *("train", "test", "kind", "text_column", "text_pair_column", "label_column"),
    )
    WORDS: ClassVar = (
        *("task", "data", *OF_OWN_FILES, "random_start"),
        *("epochs", "learning_rate", "batch_size", "max_length", "max_train", "bf16", "sift"),
    )
    name: Name
    task: Text | None = None
    """Published tasks or suites, divided by commas."""
    data: Text | None = None
    """Their folder, `hub`, or a repository on the hub."""
    train: Text | None = None
    test: Text | None = None
    kind: Kind | None = None
    text_column: Text | None = None
    text_pair_column: Text | None = None
    label_column: Text | None = None
    random_start: bool | None = None
    """Train from random weights, too; by default for own files alone."""
    epochs: Count | None = None
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    batch_size: Count | None = None
    max_length: Count | None = None
    max_train: Count | None = None
    bf16: Literal[True] | None = None
    sift: Literal[True] | None = None


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
