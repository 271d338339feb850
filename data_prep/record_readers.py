"""Records -> documents: JSON lines, JSON, CSV, TSV, Parquet, Arrow; the text is one field of each.

- `read_jsonl`, `read_json`: objects a line, or objects anywhere in a file.
- `read_delimited`: rows of .csv and .tsv, whose first row names the columns.
- `read_table`: rows of Parquet and Arrow.

A reader yields the place and the text of each document, and counts in the report what it drops.
"""

import io
import json
from collections.abc import Iterator

import orjson

from data_prep.byte_streams import BOMB, DamagedInput, is_bomb, open_bytes
from data_prep.columnar import DamagedTable, UnusableColumn, iter_rows
from data_prep.delimited import BadRow, Row, iter_delimited_rows
from data_prep.json_names import is_twice, may_be_twice
from data_prep.json_values import iter_json_values
from data_prep.read_report import ReadReport
from data_prep.source_units import ReadOptions, UnitPart
from data_prep.text_readers import (
    BYTE_ORDER_MARK,
    DAMAGED,
    TOO_LONG,
    decode,
    read_lines,
    without_mark,
)


def read_jsonl(
    part: UnitPart, options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """Read a file of one JSON object a line, or a range of it.

    Args:
        part: The file.
        options: The field that holds the text, and how long a line may be.
        report: Where everything that is dropped or odd is counted.

    Yields:
        Place and text of each document.

    Raises:
        OSError: The system cannot read the file.
    """
    for place, data in read_lines(part, options, report):
        text = _text_of_object(data, part.path, place, options.text_field, report)
        if text is not None:
            yield place, text


def read_json(
    part: UnitPart, options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """Read a file of JSON objects: one, an array of them, or one after the other.

    Args:
        part: The file.
        options: The field that holds the text, and how long an object may be.
        report: Where everything that is dropped or odd is counted.

    Yields:
        Place and text of each document.

    Raises:
        OSError: The system cannot read the file.
    """
    place = "the beginning"
    try:
        with open_bytes(part.path) as stream:
            _pass_mark(stream, part.path, report)
            for value in iter_json_values(stream, options.max_document_bytes):
                place = f"value {value.number}"
                if value.data is None:
                    detail = f"{value.size} bytes, the limit is {options.max_document_bytes}"
                    report.drop(TOO_LONG, part.path, place, detail)
                    continue
                text = _text_of_object(value.data, part.path, place, options.text_field, report)
                if text is not None:
                    yield place, text
    except DamagedInput as damage:
        report.drop(DAMAGED, part.path, place, f"{damage}; what follows is lost")


def _text_of_object(
    data: bytes, path: str, place: str, field: str, report: ReadReport
) -> str | None:
    text = _unquestioned_text(data, field)
    if text is not None:
        return text
    source = decode(data, path, place, report)
    if source is None:
        return None
    try:
        record = json.loads(source)
    except (ValueError, RecursionError) as error:
        report.drop("invalid JSON", path, place, str(error)[:120])
        return None
    if not isinstance(record, dict):
        report.drop("JSON value is not an object", path, place, type(record).__name__)
    elif field not in record:
        has = ", ".join(sorted(record)[:10])[:120]
        report.drop("missing field", path, place, f'no "{field}" (has: {has})')
    elif may_be_twice(data, field) and is_twice(source, field):
        report.drop("field given twice", path, place, f'"{field}"')
    elif not isinstance(record[field], str):
        found = type(record[field]).__name__
        report.drop("text is not a string", path, place, f'"{field}" is {found}')
    else:
        return record[field]
    return None


def _unquestioned_text(data: bytes, field: str) -> str | None:
    """The text of a sound record, six times as fast as `json`; None where `json` is to decide.

    What orjson refuses and `json` takes (NaN, lone surrogates, long numbers) and all that is to be
    named in the report goes the long way. It is asked for bytes, so that it checks the UTF-8 too.
    """
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict):
        return None
    text = record.get(field)
    if not isinstance(text, str) or may_be_twice(data, field):
        return None
    return text


def read_delimited(
    part: UnitPart, options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """Read the text column of a .csv or .tsv file, or of a range of a .tsv.

    The first row of the file names the columns, and is looked up there by the other ranges.

    Args:
        part: The file.
        options: The column that holds the text, and how long a row may be.
        report: Where everything that is dropped or odd is counted.

    Yields:
        Place and text of each document.

    Raises:
        OSError: The system cannot read the file.
    """
    place, header, limit = "the header", None, options.max_document_bytes
    try:
        with open_bytes(part.path) as stream:
            # The range that a mark stands in tells of it.
            passed = _pass_mark(stream, part.path, ReadReport() if part.start else report)
            end = part.end
            if part.start:
                rows = iter_delimited_rows(stream, part.kind, limit, 0, part.start - passed)
                header = next((row.fields for row in rows if isinstance(row, Row)), None)
            elif end is not None:
                end -= passed
            for row in iter_delimited_rows(stream, part.kind, limit, part.start, end):
                place = row.place
                if isinstance(row, BadRow):
                    reason = TOO_LONG if row.is_too_long else "invalid CSV"
                    report.drop(reason, part.path, place, row.detail)
                elif header is None:
                    header = row.fields
                else:
                    text = _text_of_row(row, header, part.path, options.text_field, report)
                    if text is not None:
                        yield place, text
    except DamagedInput as damage:
        report.drop(DAMAGED, part.path, place, f"{damage}; what follows is lost")


def _pass_mark(stream: io.BufferedReader, path: str, report: ReadReport) -> int:
    """Pass the byte order mark at the start of a file; returns the bytes that were passed."""
    if without_mark(stream.peek(3)[:3], 0, path, report) == b"":
        return len(stream.read(len(BYTE_ORDER_MARK)))
    return 0


def _text_of_row(
    row: Row, header: list[str], path: str, field: str, report: ReadReport
) -> str | None:
    place = row.place
    if header.count(field) > 1:
        report.drop("field given twice", path, place, f'"{field}" in the header')
    elif field not in header:
        has = ", ".join(header[:10])[:120].encode("utf-8", "replace").decode()
        report.drop("missing field", path, place, f'no column "{field}" (has: {has})')
    elif len(row.fields) != len(header):
        detail = f"{len(row.fields)} fields under {len(header)} columns"
        report.drop("invalid CSV", path, place, detail)
    else:
        # Back to the bytes, so that a row that is not UTF-8 is dropped like any other text.
        data = row.fields[header.index(field)].encode("utf-8", "surrogateescape")
        return decode(data, path, place, report)
    return None


def read_table(
    part: UnitPart, options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """Read the text column of a Parquet or Arrow file, or of some of its row groups.

    Args:
        part: The file.
        options: The column that holds the text, and how long a value may be.
        report: Where everything that is dropped or odd is counted.

    Yields:
        Place and text of each document.

    Raises:
        OSError: The system cannot read the file.
    """
    limit = options.max_document_bytes
    place, plain_bytes = "", 0
    try:
        for row in iter_rows(part.path, part.kind, options.text_field, limit, part.start, part.end):
            place = f"row {row.number}"
            plain_bytes += row.size
            if is_bomb(part.file_bytes, plain_bytes):
                raise DamagedTable(BOMB)
            if row.data is None and row.size:
                detail = f"{row.size} bytes, the limit is {limit}"
                report.drop(TOO_LONG, part.path, place, detail)
            elif row.data is None:
                report.drop("text is not a string", part.path, place, "null")
            else:
                text = decode(row.data, part.path, place, report)
                if text is not None:
                    yield place, text
    except UnusableColumn as problem:
        report.drop(problem.reason, part.path, "", str(problem), count=problem.num_rows)
    except DamagedTable as damage:
        report.drop(DAMAGED, part.path, place, f"{damage}; what follows is lost")
