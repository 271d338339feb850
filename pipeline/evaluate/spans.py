"""Spans of BIO tags and their F1, by the rules of the CoNLL-2000 `conlleval` program.

A span begins at a tag that is not O, where the tag says B-, the tag before is O, or the type
changes; it goes on through I- tags of its type. IOB1 and IOB2 files both read right that way.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_BIO_TAG = re.compile(r"O|[BI]-.+")


class Span(NamedTuple):
    """Tokens [start, end) of one type."""

    start: int
    end: int
    type: str


def are_bio_tags(tags: Iterable[str]) -> bool:
    """Tell whether tags mark spans.

    Args:
        tags: All tags of a task.

    Returns:
        Whether each is O, B-TYPE or I-TYPE, and one of them is not O.
    """
    distinct = set(tags)
    return all(_BIO_TAG.fullmatch(tag) for tag in distinct) and distinct != {"O"}


def spans(tags: Sequence[str]) -> list[Span]:
    """Find the spans of one sentence.

    Args:
        tags: Its BIO tags.

    Returns:
        The spans, in order.
    """
    found: list[Span] = []
    start, previous = 0, "O"
    for position, tag in enumerate((*tags, "O")):
        goes_on = tag != "O" and tag[0] == "I" and previous != "O" and previous[2:] == tag[2:]
        if previous != "O" and not goes_on:
            found.append(Span(start, position, previous[2:]))
        if tag != "O" and not goes_on:
            start = position
        previous = tag
    return found


def span_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Score predicted spans: right are those with the same ends and type.

    Args:
        gold: Tags of each sentence.
        predicted: Predicted tags of each sentence, of the same lengths.

    Returns:
        Micro-averaged F1; 0 where there are no spans on either side.
    """
    num_gold = num_predicted = num_right = 0
    for right, guess in zip(gold, predicted, strict=True):
        expected, found = set(spans(right)), set(spans(guess))
        num_gold += len(expected)
        num_predicted += len(found)
        num_right += len(expected & found)
    return 2 * num_right / max(1, num_gold + num_predicted)
