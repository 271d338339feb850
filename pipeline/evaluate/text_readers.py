"""Readers of records that are one text or a pair of texts with a label."""

from collections.abc import Callable
from typing import Any

from pipeline.evaluate.examples import TextExample
from pipeline.evaluate.records import Record

_KEYS = ("idx", "index", "id", "uid")

Reader = Callable[[Record, bool], list[Any]]


def record_key(record: Record) -> Any:
    """Find what a submission names a record by.

    Args:
        record: The record.

    Returns:
        Its index or id where it has one, else its number in the split.
    """
    return record.value(*_KEYS) if record.has(*_KEYS) else record.row


def text_reader(
    text: tuple[str, ...],
    text_pair: tuple[str, ...] = (),
    *,
    label: tuple[str, ...] = ("label",),
    labels: tuple[str, ...] = (),
    group: tuple[str, ...] = (),
) -> Reader:
    """Make the reader of a task.

    Args:
        text: Names of the column of the text that comes first.
        text_pair: Names of the column of the second; none where there is one text.
        label: Names of the column of the label.
        labels: Names of the classes; none for regression.
        group: Names of the column that pairs of examples share; where a file does not have it,
            neighbours are pairs.

    Returns:
        (record, whether it must have a label) -> one example.
    """

    def read(record: Record, is_labelled: bool) -> list[Any]:
        value = None
        if is_labelled:
            value = record.label(labels, *label) if labels else record.number(*label)
        pair = record.text(*text_pair) if text_pair else None
        shared = None
        if group:
            shared = record.value(*group) if record.has(*group) else record.row // 2
        return [TextExample(record_key(record), record.text(*text), pair, value, shared)]

    return read
