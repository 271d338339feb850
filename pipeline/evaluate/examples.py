"""Examples: what a record says, in the form that the kind of its task takes.

    TextExample     one text or a pair, with a class or a number
    ChoiceExample   several pairs of texts, one of which is right
    TaggedExample   words with tags
    SpanExample     a question and a text that holds its answer, or does not
    MarkedExample   one text or a pair with two marked places, and a class
    EntityExample   a passage with marked entities and a query with a gap

Labels are None where they are not public. `key` is what a submission names the example by.
"""

from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True)
class TextExample:
    """A text, or a pair of texts, in the order of the original code."""

    key: Any
    text: str
    text_pair: str | None
    label: float | None
    """Number of the class; for regression the number itself."""
    group: Any = None
    """What examples are scored together by: the question of MultiRC, the pair of Winogender."""


@dataclass(frozen=True)
class ChoiceExample:
    """Pairs of texts; the model scores each, the best is chosen."""

    key: Any
    choices: tuple[tuple[str, str], ...]
    label: int | None
    group: Any = None
    """What is reported apart: the level of RACE."""


@dataclass(frozen=True)
class TaggedExample:
    """A sentence."""

    key: Any
    words: tuple[str, ...]
    tag_names: tuple[str, ...] | None
    document: Any = None
    """What neighbours share that are read together; None where each sentence stands alone."""


@dataclass(frozen=True)
class SpanExample:
    """A question about a text."""

    key: Any
    question: str
    context: str
    answers: tuple[str, ...]
    """All that count as right; none where the text holds no answer."""
    start: int | None
    """First character of the first answer, to train on."""


@dataclass(frozen=True)
class MarkedExample:
    """Two marked places, in one text or in one each."""

    key: Any
    texts: tuple[str, ...]
    marks: tuple[tuple[int, Range], tuple[int, Range]]
    """Each the number of its text, and its characters there."""
    label: int | None


@dataclass(frozen=True)
class EntityExample:
    """A passage, and a query in which `gap` stands for one of the passage's entities."""

    key: Any
    passage: str
    entities: tuple[Range, ...]
    query: str
    gap: Range
    answers: tuple[str, ...]
    """Texts of the right entities."""
