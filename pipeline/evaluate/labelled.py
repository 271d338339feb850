"""Labelled files: texts with a class, and sentences with a tag for every token.

    .jsonl .csv .tsv         one example a record, with a text column or two and a label column
    .conll .iob .iob2 .bio   one token a line, its tag last; a blank line ends a sentence

A .csv has quotes and a header, a .tsv has a header and no quotes (a quotation mark is text). CoNLL
columns are divided by spaces or tabs; the first is the token, the last the tag; -DOCSTART- lines
begin documents. What is wrong with a file is said with its line.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError

TaskKind = Literal["classification", "regression", "tagging", "span", "multiple-choice"]
KIND_OF_SUFFIX: dict[str, TaskKind] = {
    ".jsonl": "classification",
    ".csv": "classification",
    ".tsv": "classification",
    ".conll": "tagging",
    ".iob": "tagging",
    ".iob2": "tagging",
    ".bio": "tagging",
    ".json": "span",
}
_MAX_FIELD_CHARACTERS = 1 << 26


@dataclass(frozen=True)
class Columns:
    """Where a classification file keeps what."""

    text: str = "text"
    label: str = "label"
    text_pair: str | None = None


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class LabelledText:
    """One example of a classification task."""

    line: int
    """Line of the file, from 1."""
    text: str
    text_pair: str | None
    label: str


@dataclass(frozen=True)
class TaggedSentence:
    """One sentence of a tagging task."""

    line: int
    """Line of its first token, from 1."""
    words: tuple[str, ...]
    tags: tuple[str, ...]
    document: int | None = None
    """Number of its document, from 1, where -DOCSTART- lines tell documents."""


def task_kind(path: Path, asked: TaskKind | None) -> TaskKind:
    """Tell what kind of task a file holds.

    Args:
        path: The training file.
        asked: What the user says; None goes by the name.

    Returns:
        The kind.

    Raises:
        UserError: The name says nothing.
    """
    kind = asked or KIND_OF_SUFFIX.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{path}: cannot tell the task from the suffix {path.suffix!r}; rename it to one of "
            f"{' '.join(KIND_OF_SUFFIX)}, or give --kind tagging for a CoNLL file"
        )
    return kind


def read_texts(path: Path, columns: Columns) -> list[LabelledText]:
    """Read a classification file.

    Args:
        path: A .jsonl, .csv or .tsv file.
        columns: Names of the columns.

    Returns:
        Its examples, at least one.

    Raises:
        UserError: Something is wrong; the message names the line or column.
    """
    readers = {".jsonl": jsonl_records, ".csv": csv_records, ".tsv": csv_records}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: not a classification format {path.suffix!r}; accepted: {' '.join(readers)}"
        )
    examples = [
        LabelledText(
            line,
            _text(path, line, record, columns.text),
            _text(path, line, record, columns.text_pair) if columns.text_pair else None,
            _label(path, line, record, columns.label),
        )
        for line, record in reader(path)
    ]
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def read_sentences(path: Path) -> list[TaggedSentence]:
    """Read a CoNLL file.

    Args:
        path: The file.

    Returns:
        Its sentences, at least one.

    Raises:
        UserError: Something is wrong; the message names the line.
    """
    sentences: list[TaggedSentence] = []
    pairs: list[tuple[str, str]] = []
    num_columns, document = 0, None
    for number, line in enumerate((*_lines(path), ""), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        fields = [field.strip() for field in fields]
        is_mark = bool(fields) and fields[0] == "-DOCSTART-"
        if not any(fields) or is_mark:
            if pairs:
                words, tags = zip(*pairs, strict=True)
                sentences.append(TaggedSentence(number - len(pairs), words, tags, document))
                pairs = []
            document = (document or 0) + 1 if is_mark else document
            continue
        num_columns = num_columns or len(fields)
        if len(fields) < 2 or len(fields) != num_columns or not (fields[0] and fields[-1]):
            raise UserError(
                f"{path}, line {number}: {shown(line)} is no token and tag in "
                f"{max(2, num_columns)} columns divided by spaces or tabs"
            )
        pairs.append((fields[0], fields[-1]))
    if not sentences:
        raise UserError(f"{path}: holds no tagged tokens")
    return sentences


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their ends."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not UTF-8 text (byte {error.start} of the line)"
                    ) from error
                yield text.rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a .jsonl file with their lines.

    Args:
        path: The file.

    Yields:
        Line, from 1, and object.

    Raises:
        UserError: A line is no JSON object.
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: {shown(line)} is not a JSON object {{...}}")
        yield number, record


def csv_records(
    path: Path, columns: Sequence[str] = (), *, skips_ragged: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a .csv or .tsv file with their lines.

    Args:
        path: The file.
        columns: Names of the columns of a file without a header.
        skips_ragged: Leave rows with another number of fields out, instead of refusing the file.

    Yields:
        Line, from 1, and values by column.

    Raises:
        UserError: A row does not fit the header.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    lines = (line + "\n" for line in _lines(path))
    if path.suffix.lower() == ".csv":
        rows = csv.reader(lines, strict=True)
    else:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header: Sequence[str] | None = columns or None
    first = 1
    try:
        for row in rows:
            line, first = first, rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                if len(set(header)) != len(header):
                    raise UserError(f"{path}, line {line}: a column is named twice: {header}")
            elif len(row) != len(header):
                if skips_ragged:
                    continue
                raise UserError(
                    f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}: "
                    f"{', '.join(header)}"
                )
            else:
                yield line, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error


def _text(path: Path, line: int, record: dict[str, Any], column: str) -> str:
    """Take a text from a record."""
    value = _value(path, line, record, column)
    # JSON can spell halves of characters, which no text has.
    if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{path}, line {line}: {column} is {shown(value)}, which is no text")
    return value


def _label(path: Path, line: int, record: dict[str, Any], column: str) -> str:
    """Take a label from a record: a text, an integer or a truth value, as text."""
    value = _value(path, line, record, column)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{path}, line {line}: {column} is {shown(value)}; a label is a text or an integer"
        )
    return value.strip()


def _value(path: Path, line: int, record: dict[str, Any], column: str) -> Any:
    if column not in record:
        raise UserError(
            f"{path}, line {line}: no column {column!r}; there are {', '.join(map(str, record))} "
            "(--text-column, --text-pair-column, --label-column)"
        )
    return record[column]


def shown(value: Any) -> str:
    """Quote something for a message.

    Args:
        value: What a file holds.

    Returns:
        Its form in Python, in ASCII and not too long.
    """
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
