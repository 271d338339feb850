"""Own files of the kinds that are not classes or tags: numbers, choices and answers.

regression        a text or pair, and a number in the column of the label
multiple-choice   a text, `choices` (a list of texts), and the number of the right one, from 0
span              SQuAD's form: `context`, `question`, `answers`; or its .json document
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from data_prep.errors import UserError
from pipeline.evaluate.examples import ChoiceExample, TextExample
from pipeline.evaluate.labelled import Columns
from pipeline.evaluate.reading import read_squad
from pipeline.evaluate.records import Record
from pipeline.evaluate.sources import file_rows
from pipeline.evaluate.text_readers import record_key


def read_own_file(kind: str, path: Path, columns: Columns) -> list[Any]:
    """Read a file of one of these kinds.

    Args:
        kind: "regression", "multiple-choice" or "span".
        path: .jsonl, .csv, .tsv, .parquet or .json.
        columns: Names of the columns.

    Returns:
        Its examples, at least one.

    Raises:
        UserError: Something is wrong; the message names the line or column.
    """
    readers = {"regression": _regression, "multiple-choice": _choices}
    examples: list[Any] = []
    for row, (where, values) in enumerate(file_rows(path)):
        record = Record(where, row, values)
        reader = readers.get(kind)
        examples += read_squad(record, True) if reader is None else reader(record, columns)
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def _regression(record: Record, columns: Columns) -> list[Any]:
    """Read texts with a number."""
    pair = record.text(columns.text_pair) if columns.text_pair else None
    number = record.number(columns.label)
    return [TextExample(record_key(record), record.text(columns.text), pair, number)]


def _choices(record: Record, columns: Columns) -> list[Any]:
    """Read a text with the texts to choose from."""
    choices = [str(choice) for choice in record.items("choices")]
    label = record.whole(columns.label)
    if len(choices) < 2 or not 0 <= label < len(choices):
        raise UserError(
            f"{record.where}: {columns.label} is {label}, but there are {len(choices)} choices, "
            "counted from 0; give two or more"
        )
    text = record.text(columns.text)
    return [ChoiceExample(record_key(record), tuple((text, c) for c in choices), label)]


def guess_own(kind: str, train: Sequence[Any], test: Sequence[Any]) -> dict[str, list[Any]]:
    """Predict without a model.

    Args:
        kind: "regression", "multiple-choice" or "span".
        train: Examples to go by.
        test: Examples to predict.

    Returns:
        Predictions by the name of the baseline.
    """
    if kind == "regression":
        return {"mean of the training file": [fmean(e.label for e in train)] * len(test)}
    if kind == "multiple-choice":
        best = Counter(e.label for e in train).most_common(1)[0][0]
        return {"most frequent place": [best] * len(test)}
    return {"no answer": [""] * len(test)}
