"""Sources of text -> documents, one at a time: every format, every compression, every damage.

    units = plan_units(["corpus", "more/*.jsonl.gz"], ReadOptions())
    report = ReadReport()
    for document in read_unit(units[0], options, report): ...

- `Document`: one text and where it came from.
- `read_unit`: the documents of a unit, streaming; what is malformed is counted in the report with
  its file and line, and never stops the reading.
- `embedded_corpus`: the folder of speeches that comes with the package.
- From `source_units`: `ReadOptions`, `Unit`, `UnitPart`, `plan_units`; from `read_report`:
  `ReadReport`.

What becomes of each malformed input:

    empty file, text of white space                                       dropped, "empty ..."
    blank line of a .jsonl or of a .txt that is read by lines             counted
    not UTF-8 (a whole .txt, one line, one row)                           dropped, "invalid UTF-8"
    JSON line that is none, lacks the field, has it twice or not as text  dropped
    line, row or JSON text above `max_document_bytes`                     dropped, never held
    .txt file above it                                                    cut into documents, noted
    broken gzip, zstd, xz, Parquet or Arrow                               dropped from the damage on
    any of them above 64 MiB and 200 times its size                       dropped from there on
    byte order mark at the start of a file                                removed, noted
    file that cannot be opened, or that changed since it was planned      an error: nothing is lost
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.byte_streams import (
    BOMB,
    DamagedInput,
    is_bomb,
    iter_lines,
    iter_pieces,
    open_bytes,
)
from data_prep.columnar import DamagedTable, UnusableColumn, iter_rows
from data_prep.errors import UserError
from data_prep.read_report import ReadReport
from data_prep.source_files import ACCEPTED
from data_prep.source_units import ReadOptions, Unit, UnitPart, plan_units, unreadable

__all__ = [
    "ACCEPTED",
    "Document",
    "ReadOptions",
    "ReadReport",
    "Unit",
    "UnitPart",
    "embedded_corpus",
    "plan_units",
    "read_unit",
]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DAMAGED = "damaged file"
_NOT_UTF8 = "invalid UTF-8"
_TOO_LONG = "too long"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    """As it stands in the file; it may hold control characters and lone surrogates."""
    source: str
    """The file, as the user would write it."""
    position: str
    """The place in the file: "line 17", "row 5", "byte 1024"; empty for a whole file."""


def embedded_corpus() -> Path:
    """Find the corpus that comes with the package.

    Returns:
        A folder of .txt files, one speech each (1.28 MB; see PROVENANCE.md beside it).
    """
    return Path(__file__).parent / "samples" / "speeches"


def read_unit(unit: Unit, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    """Read the documents of a unit.

    Args:
        unit: One of `plan_units`, with the same options.
        options: How sources are read.
        report: Where everything that is read, dropped or odd is counted.

    Yields:
        The documents in the order of the files and lines. Memory stays within a few times
        `options.max_document_bytes`, however large the files are.

    Raises:
        UserError: A file cannot be read, or is not the one that was planned.
    """
    for part in unit.parts:
        try:
            _check_unchanged(part)
            report.files += part.start == 0
            if part.file_bytes == 0:
                report.drop("empty file", part.path)
                continue
            for document in _READERS[part.kind](part, options, report):
                if not document.text or document.text.isspace():
                    report.drop("empty text", part.path, document.position)
                    continue
                report.documents += 1
                report.text_bytes += len(document.text.encode("utf-8", "surrogatepass"))
                yield document
        except OSError as error:
            raise unreadable(part.path, error) from error


def _check_unchanged(part: UnitPart) -> None:
    size = Path(part.path).stat().st_size
    if size != part.file_bytes:
        raise UserError(
            f"{part.path} changed while it was in use: {part.file_bytes} bytes when the work was "
            f"planned, {size} now; start again with an output folder of another name"
        )


def _read_txt(part: UnitPart, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    if options.txt_document == "line":
        for place, data in _read_lines(part, options, report):
            text = _decode(data, part.path, place, report)
            if text is not None:
                yield Document(text, part.path, place)
        return
    limit = options.max_document_bytes
    pieces_end = 0
    try:
        with open_bytes(Path(part.path)) as stream:
            for piece in iter_pieces(stream, limit, part.start, part.end):
                is_whole = piece.is_last and piece.offset == 0 and part.end is None
                pieces_end = piece.offset + len(piece.data)
                place = "" if is_whole else f"byte {piece.offset}"
                if not is_whole:
                    report.note("part of a long file", part.path, place)
                data = _without_mark(piece.data, piece.offset, part.path, report)
                text = _decode(data, part.path, place, report)
                if text is not None:
                    yield Document(text, part.path, place)
    except DamagedInput as damage:
        if pieces_end:
            report.drop(_DAMAGED, part.path, f"byte {pieces_end}", f"{damage}; the rest is lost")
        else:
            report.drop(_DAMAGED, part.path, "", f"{damage}; its document is lost")


def _read_lines(
    part: UnitPart, options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, bytes]]:
    """The lines that are neither blank nor too long, each with its place."""
    place = "line 0"
    try:
        with open_bytes(Path(part.path)) as stream:
            for line in iter_lines(stream, options.max_document_bytes, part.start, part.end):
                # Inside a large file only the offset is known; counting lines would read it twice.
                place = f"byte {line.offset}" if part.start else f"line {line.number}"
                if line.data is None:
                    detail = f"{line.size} bytes, the limit is {options.max_document_bytes}"
                    report.drop(_TOO_LONG, part.path, place, detail)
                    continue
                data = _without_mark(line.data, line.offset, part.path, report)
                if data and not data.isspace():
                    yield place, data
                else:
                    report.blank_lines += 1
    except DamagedInput as damage:
        report.drop(_DAMAGED, part.path, place, f"{damage}; what follows this line is lost")


def _read_jsonl(part: UnitPart, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    field = options.text_field
    for place, data in _read_lines(part, options, report):
        line = _decode(data, part.path, place, report)
        if line is None:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            report.drop("invalid JSON", part.path, place, str(error)[:120])
            continue
        if not isinstance(record, dict):
            report.drop("JSON line is not an object", part.path, place, type(record).__name__)
        elif field not in record:
            has = ", ".join(sorted(record)[:10])[:120]
            report.drop("missing field", part.path, place, f'no "{field}" (has: {has})')
        elif line.count(f'"{field}"') > 1 and _is_ambiguous(line, field):
            report.drop("field given twice", part.path, place, f'"{field}"')
        elif not isinstance(record[field], str):
            found = type(record[field]).__name__
            report.drop("text is not a string", part.path, place, f'"{field}" is {found}')
        else:
            yield Document(record[field], part.path, place)


def _is_ambiguous(line: str, field: str) -> bool:
    """Tell whether the outermost object has the field twice; `json.loads` takes the last one."""
    names: list[str] = []

    def remember(pairs: list[tuple[str, object]]) -> None:
        # Called for inner objects first.
        names[:] = [name for name, _ in pairs]

    json.loads(line, object_pairs_hook=remember)
    return names.count(field) > 1


def _read_table(part: UnitPart, options: ReadOptions, report: ReadReport) -> Iterator[Document]:
    limit = options.max_document_bytes
    place, plain_bytes = "", 0
    try:
        for row in iter_rows(
            Path(part.path), part.kind, options.text_field, limit, part.start, part.end
        ):
            place = f"row {row.number}"
            plain_bytes += row.size
            if is_bomb(part.file_bytes, plain_bytes):
                raise DamagedTable(BOMB)
            if row.data is None and row.size:
                detail = f"{row.size} bytes, the limit is {limit}"
                report.drop(_TOO_LONG, part.path, place, detail)
            elif row.data is None:
                report.drop("text is not a string", part.path, place, "null")
            else:
                text = _decode(row.data, part.path, place, report)
                if text is not None:
                    yield Document(text, part.path, place)
    except UnusableColumn as problem:
        report.drop(problem.reason, part.path, "", str(problem), count=problem.num_rows)
    except DamagedTable as damage:
        report.drop(_DAMAGED, part.path, place, f"{damage}; what follows is lost")


_READERS = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_table, "arrow": _read_table}


def _without_mark(data: bytes, offset: int, path: str, report: ReadReport) -> bytes:
    if offset or not data.startswith(_BYTE_ORDER_MARK):
        return data
    report.note("byte order mark removed", path)
    return data[len(_BYTE_ORDER_MARK) :]


def _decode(data: bytes, path: str, place: str, report: ReadReport) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        looks = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        detail = f"byte 0x{data[error.start]:02x} at offset {error.start}{looks}"
        report.drop(_NOT_UTF8, path, place, detail)
        return None
