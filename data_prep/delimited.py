"""Rows of .csv and .tsv files, in bounded memory.

- `iter_delimited_rows`: the rows behind the header as lists of texts, each with its line.
- `BadRow`: a row that is no row, or too long; reading goes on behind it.

A .csv is read as RFC 4180 says: fields between quotes may hold commas, doubled quotes and line
ends. A .tsv is read as its media type says: a tab always separates, a line end always ends a row,
and a quote is a character of the text. Either way the first row names the columns.
"""

import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.byte_streams import Line, iter_lines


class Row(NamedTuple):
    """One row, the header included."""

    place: str
    """Where it begins: "line 3", counted from 1, or "byte 1024" in a range of a file."""
    fields: list[str]
    """Its fields; bytes that are not UTF-8 are lone surrogates (`surrogateescape`)."""


class BadRow(NamedTuple):
    """A row that could not be read."""

    place: str
    """Where it begins, as in `Row`."""
    is_too_long: bool
    """Whether it is above the limit; else it breaks the rules of quoting."""
    detail: str
    """What exactly was found."""


def iter_delimited_rows(
    stream: io.BufferedReader, kind: str, limit: int, start: int = 0, end: int | None = None
) -> Iterator[Row | BadRow]:
    """Read the rows of a file, or those in a range of a .tsv.

    Args:
        stream: The file's bytes, behind a byte order mark.
        kind: "csv" or "tsv".
        limit: Longest row that is held, in bytes.
        start: Offset of the first row, just behind a line end; or 0 to read on from where the
            stream is, from where the end is counted then.
        end: Offset behind the last row; None for the end of the file.

    Yields:
        Rows in order; blank lines between them are passed over.

    Raises:
        DamagedInput: Packed data is broken; the rows before were yielded.
    """
    if kind == "tsv":
        yield from _tsv_rows(stream, limit, start, end)
        return
    assert (start, end) == (0, None), "a .csv, whose quotes may hold line ends, has no ranges"
    # The limit of the csv module belongs to the whole process; rows are bounded by bytes below.
    csv.field_size_limit(limit + 1)
    lines = _Lines(stream, limit)
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_row()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield BadRow(f"line {lines.first}", False, str(error))
            continue
        except _RowTooLong as error:
            # Inside of quotes the reader would go on as if nothing had happened.
            reader = csv.reader(lines, strict=True)
            yield BadRow(f"line {lines.first}", True, str(error))
            continue
        if fields is None:
            return
        if fields:
            yield Row(f"line {lines.first}", fields)


class _RowTooLong(Exception):
    """The row above the limit ends the record; the message says how long it is."""


class _Lines:
    """The lines of a file for `csv.reader`, which asks for as many as its record needs.

    Args:
        stream: the file's bytes.
        limit: longest record, in bytes.
    """

    def __init__(self, stream: io.BufferedReader, limit: int) -> None:
        self._lines = iter_lines(stream, limit, 0, None)
        self._limit = limit
        self._number = self._row_bytes = 0
        self.first = 1

    def begin_row(self) -> None:
        """Count the record's bytes and its first line anew."""
        self._row_bytes = 0
        self.first = self._number + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number = line.number
        self._row_bytes += line.size
        # Also where no line is long: a quote that never closes makes all the rest one field.
        if line.data is None or self._row_bytes > self._limit + 2:
            what = "the quotes do not close within" if self._number > self.first else "a line of"
            raise _RowTooLong(f"{what} {self._row_bytes} bytes, the limit is {self._limit}")
        return _text(line) + "\n"


def _tsv_rows(
    stream: io.BufferedReader, limit: int, start: int, end: int | None
) -> Iterator[Row | BadRow]:
    for line in iter_lines(stream, limit, start, end):
        place = f"byte {line.offset}" if start else f"line {line.number}"
        if line.data is None:
            yield BadRow(place, True, f"{line.size} bytes, the limit is {limit}")
        elif line.data:
            yield Row(place, _text(line).split("\t"))


def _text(line: Line) -> str:
    return (line.data or b"").decode("utf-8", "surrogateescape")
