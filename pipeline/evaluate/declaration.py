"""What a published task is: a declaration, with nothing that computes.

    Split      one part of its data: the published file, and the name in `datasets`
    Diagnostic examples of its classes that are scored by figures of their own
    Recipe     how to fine-tune DeBERTaV3-large on it, and where that was read
    TaskSpec   everything: kind, reader of records, labels, figures, splits, submission format

`sources` finds the records of a split, the `read` function of a task makes examples of them, the
task's kind (`kinds`) trains and predicts, its figures (`figures`) compare.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.evaluate.records import Record

KindName = Literal[
    "classification", "regression", "tagging", "span", "multiple-choice", "marked", "entity"
]


@dataclass(frozen=True)
class Split:
    """One part of a task's data."""

    name: str
    """Its name in `datasets`, and the stem of a local .jsonl, .tsv, .csv or .parquet file."""
    files: tuple[str, ...] = ()
    """Published names below the task's folder, patterns allowed; the first that exists is read."""
    config: str | None = None
    """Configuration on the hub and folder of local files, where it is not the task's own."""
    only: tuple[str, str] | None = None
    """Of a published file that holds several languages: column and value of the rows to keep."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a published file without a header."""
    skips_ragged: bool = False
    """Whether the published file has broken rows, which everybody leaves out."""


@dataclass(frozen=True)
class Diagnostic:
    """Examples that are scored where they are at hand, and count in no average."""

    split: Split
    figures: tuple[str, ...]
    """Names of the figures that are reported, of `figures.FIGURES`."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; the rate is DeBERTaV3-large's, `recipes` scales it to other sizes."""

    learning_rate: float
    """Peak; as published."""
    epochs: int
    """Passes over the training split."""
    batch_size: int
    """Examples in a step."""
    warmup_steps: int
    """Steps of linear warm-up; at most a tenth of all where the training split is small."""
    max_length: int
    """Longest sequence in tokens."""
    dropout: float
    """In front of the last layer of the head."""
    source: str
    """Where the values were read, or how they were chosen."""


@dataclass(frozen=True)
class TaskSpec:
    """A published task."""

    name: str
    """As on the command line."""
    suite: str
    """The name that stands for this task and its companions."""
    kind: KindName
    folder: str
    """Folder of its published files."""
    hub: tuple[str, str | None]
    """Repository and configuration on the hub."""
    read: Callable[[Record, bool], list[Any]]
    """(record, whether it must have a label) -> examples of its kind."""
    figures: tuple[str, ...]
    """Names of the figures that are reported, of `figures.FIGURES`."""
    train: tuple[Split, ...]
    scored: Mapping[str, Split]
    """Part -> split with public labels; the part is "" where there is one."""
    recipe: Recipe
    """DeBERTaV3-large's."""
    labels: tuple[str, ...] = ()
    """Names of the classes or tags in the order of `datasets`."""
    predicted: Mapping[str, Split] = field(default_factory=dict)
    """File of the submission -> split without public labels."""
    submission: str = "jsonl"
    """Format of these files, of `submissions.FORMATS`."""
    groups: tuple[str, ...] = ()
    """Values of the examples' `group` whose figures are reported beside those of all."""
    diagnostics: Mapping[str, Diagnostic] = field(default_factory=dict)
    """Part -> diagnostic, as of SuperGLUE's RTE."""
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    """Published recipes of other sizes: xsmall, small, base."""
    is_averaged: bool = True
    """Whether it counts in the average of its suite."""
    averages_parts: bool = False
    """Whether the mean of its parts is reported beside them, as of XNLI's languages."""
    allows_no_answer: bool = False
    """Whether a span may be missing, as in SQuAD 2.0."""
