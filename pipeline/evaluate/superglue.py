"""SuperGLUE: eight tasks (Wang et al. 2019, arXiv:1905.00537).

Records are lines of the published .jsonl files or rows of `aps/super_glue`; readers take both. The
texts of a pair stand as in DeBERTa's superglue_tasks.py. Of the recipes the authors published
ReCoRD's for DeBERTaV3-large and COPA's for DeBERTa-large; the others are chosen near these.

The model of RTE also reads the diagnostics: AX-b (linguistic phenomena) and AX-g (Winogender, pairs
of sentences that differ in a pronoun's gender).
"""

import re
from typing import Any

from data_prep.errors import UserError
from pipeline.evaluate.declaration import Diagnostic, Recipe, Split, TaskSpec
from pipeline.evaluate.examples import (
    ChoiceExample,
    EntityExample,
    MarkedExample,
    Range,
    TextExample,
)
from pipeline.evaluate.records import Record
from pipeline.evaluate.text_readers import record_key, text_reader

_BOOLEAN = ("false", "true")
_CB = ("entailment", "contradiction", "neutral")
_RTE = ("entailment", "not_entailment")
_GAP = "@placeholder"
_CHOSEN = "chosen near the authors' recipes for ReCoRD and RTE"


def _copa(record: Record, is_labelled: bool) -> list[Any]:
    """Put cause before effect in both choices."""
    premise = record.text("premise")
    choices = [record.text(name) for name in ("choice1", "choice2")]
    if record.text("question") == "cause":
        pairs = tuple((choice, premise) for choice in choices)
    else:
        pairs = tuple((premise, choice) for choice in choices)
    label = record.label(("0", "1"), "label") if is_labelled else None
    return [ChoiceExample(record_key(record), pairs, label)]


def _multirc(record: Record, is_labelled: bool) -> list[Any]:
    """Make an example of every answer: the passage, and question and answer."""
    if record.has("paragraph"):
        keys = record.inner(record.value("idx"), "idx")
        names = ("paragraph", "question", "answer")
        key = tuple(keys.whole(name) for name in names)
        asked = f"{record.text('question')} {record.text('answer')}"
        label = record.label(("0", "1"), "label") if is_labelled else None
        return [TextExample(key, record.text("paragraph"), asked, label, key[:2])]
    passage = record.inner(record.value("passage"), "passage")
    text, number = passage.text("text"), record.whole("idx")
    examples = []
    for values in passage.items("questions"):
        question = passage.inner(values, "questions")
        for option in question.items("answers"):
            answer = question.inner(option, "answers")
            key = (number, question.whole("idx"), answer.whole("idx"))
            asked = f"{question.text('question')} {answer.text('text')}"
            label = answer.label(("0", "1"), "label") if is_labelled else None
            examples.append(TextExample(key, text, asked, label, key[:2]))
    return examples


def _record(record: Record, is_labelled: bool) -> list[Any]:
    """Make an example of every query."""
    if not record.has("qas"):
        passage = record.text("passage")
        names = {str(name) for name in record.items("entities")}
        entities = sorted(place for name in names for place in _places(passage, name))
        keys = record.inner(record.value("idx"), "idx")
        answers = record.items("answers") if is_labelled else []
        return [_entity_example(record, keys.whole("query"), passage, entities, answers)]
    nested = record.inner(record.value("passage"), "passage")
    passage = nested.text("text")
    marks = [nested.inner(entity, "entities") for entity in nested.items("entities")]
    # The published ends are the last characters themselves.
    ends = ((mark, mark.whole("start"), mark.whole("end") + 1) for mark in marks)
    entities = sorted({mark.place(start, end, passage, "an entity") for mark, start, end in ends})
    examples = []
    for values in record.items("qas"):
        query = record.inner(values, "qas")
        options = query.items("answers") if is_labelled else []
        answers = [query.inner(option, "answers").text("text") for option in options]
        key = query.whole("idx")
        examples.append(_entity_example(query, key, passage, entities, answers))
    return examples


def _places(text: str, name: str) -> list[Range]:
    """Find all places of a name in a text."""
    return [match.span() for match in re.finditer(re.escape(name), text)] if name else []


def _entity_example(
    record: Record, key: int, passage: str, entities: list[Range], answers: list[Any]
) -> EntityExample:
    """Find the gap of a query."""
    query = record.text("query")
    start = query.find(_GAP)
    # A query without a gap asks for what follows it.
    gap = (start, start + len(_GAP)) if start >= 0 else (len(query), len(query))
    return EntityExample(key, passage, tuple(entities), query, gap, tuple(map(str, answers)))


def _wic(record: Record, is_labelled: bool) -> list[Any]:
    """Mark the word in both sentences."""
    texts = tuple(record.text(name) for name in ("sentence1", "sentence2"))
    first, second = (
        (number, record.place(*_ends(record, number + 1), text, "the word"))
        for number, text in enumerate(texts)
    )
    label = record.label(_BOOLEAN, "label") if is_labelled else None
    return [MarkedExample(record_key(record), texts, (first, second), label)]


def _ends(record: Record, number: int) -> tuple[int, int]:
    """Take the characters of the word in one of the sentences."""
    return record.whole(f"start{number}"), record.whole(f"end{number}")


def _wsc(record: Record, is_labelled: bool) -> list[Any]:
    """Mark the noun phrase and the pronoun, which are given by the number of their first word."""
    target = record.inner(record.value("target"), "target") if record.has("target") else record
    text = record.text("text")
    words = [match.span() for match in re.finditer(r"\S+", text)]
    marks = []
    for name in ("span1", "span2"):
        number, phrase = target.whole(f"{name}_index"), target.text(f"{name}_text")
        # Words between two spaces may be empty, and count for who made the file.
        if not words or not 0 <= number < len(text.split(" ")):
            raise UserError(
                f"{target.where}: {name}_index is {number}, but the text has {len(words)} words, "
                "counted from 0"
            )
        last = min(number + max(1, len(phrase.split())), len(words)) - 1
        start = words[min(number, last)][0]
        # The last word may have a full stop or "'s" that the phrase does not have.
        fits = text[start : start + len(phrase)].casefold() == phrase.casefold()
        marks.append((0, (start, start + len(phrase) if fits else words[last][1])))
    label = record.label(_BOOLEAN, "label") if is_labelled else None
    return [MarkedExample(record_key(record), (text,), (marks[0], marks[1]), label)]


def _task(name: str, folder: str, figures: tuple[str, ...], **values: Any) -> TaskSpec:
    """Fill what all tasks of SuperGLUE share."""
    shared = {
        "suite": "superglue",
        "kind": "classification",
        "hub": ("aps/super_glue", name),
        "train": (Split("train", ("train.jsonl",)),),
        "scored": {"": Split("validation", ("val.jsonl",))},
        "predicted": {f"{folder}.jsonl": Split("test", ("test.jsonl",))},
    }
    return TaskSpec(name=name, folder=folder, figures=figures, **{**shared, **values})


_PREMISE = (("premise",), ("hypothesis",))
# The diagnostics lie beside RTE, where the archives are unpacked.
_AX_B = Split("test", ("../AX-b/AX-b.jsonl", "AX-b.jsonl"), "axb")
_AX_G = Split("test", ("../AX-g/AX-g.jsonl", "AX-g.jsonl"), "axg")

SUPERGLUE = (
    _task(
        "boolq",
        "BoolQ",
        ("accuracy",),
        labels=_BOOLEAN,
        read=text_reader(("passage",), ("question",), labels=_BOOLEAN),
        recipe=Recipe(7e-6, 6, 32, 100, 512, 0.1, _CHOSEN),
    ),
    _task(
        "cb",
        "CB",
        ("accuracy", "macro_f1"),
        labels=_CB,
        read=text_reader(*_PREMISE, labels=_CB),
        recipe=Recipe(1e-5, 10, 16, 30, 256, 0.1, _CHOSEN),
    ),
    _task(
        "copa",
        "COPA",
        ("accuracy",),
        kind="multiple-choice",
        read=_copa,
        recipe=Recipe(5e-6, 4, 16, 30, 136, 0.1, "experiments/superglue/copa.sh, DeBERTa-large"),
    ),
    _task(
        "multirc",
        "MultiRC",
        ("f1_of_answers", "exact_match_of_questions"),
        labels=("0", "1"),
        read=_multirc,
        submission="multirc",
        recipe=Recipe(7e-6, 4, 32, 500, 512, 0.1, _CHOSEN),
    ),
    _task(
        "record",
        "ReCoRD",
        ("token_f1", "exact_match"),
        kind="entity",
        read=_record,
        recipe=Recipe(7e-6, 3, 64, 500, 512, 0.1, "experiments/superglue/record.sh"),
    ),
    _task(
        "superglue-rte",
        "RTE",
        ("accuracy",),
        labels=_RTE,
        hub=("aps/super_glue", "rte"),
        read=text_reader(
            ("premise", "sentence1"), ("hypothesis", "sentence2"), labels=_RTE, group=("pair_id",)
        ),
        predicted={
            "RTE.jsonl": Split("test", ("test.jsonl",)),
            "AX-b.jsonl": _AX_B,
            "AX-g.jsonl": _AX_G,
        },
        diagnostics={
            "AX-b": Diagnostic(_AX_B, ("matthews_correlation",)),
            "AX-g": Diagnostic(_AX_G, ("accuracy", "gender_parity")),
        },
        recipe=Recipe(1e-5, 6, 32, 50, 320, 0.3, "experiments/glue/rte.sh"),
    ),
    _task(
        "wic",
        "WiC",
        ("accuracy",),
        kind="marked",
        labels=_BOOLEAN,
        read=_wic,
        recipe=Recipe(1e-5, 10, 32, 50, 128, 0.1, _CHOSEN),
    ),
    _task(
        "wsc",
        "WSC",
        ("accuracy",),
        kind="marked",
        labels=("False", "True"),
        read=_wsc,
        recipe=Recipe(1e-5, 20, 16, 30, 128, 0.1, _CHOSEN),
    ),
)
