"""Plain text -> documents: whole files, lines, and the decoding that all formats share.

- `read_txt`: the documents of a .txt file, or of a range of one.
- `read_lines`: the lines of a file as bytes, for every format that is made of lines.
- `decode`, `without_mark`: bytes as text; what is not UTF-8 is counted, never guessed.

A reader yields the place and the text of each document, and counts in the report what it drops.
"""

from collections.abc import Iterator

from data_prep.byte_streams import DamagedInput, iter_lines, iter_pieces, open_bytes
from data_prep.read_report import ReadReport
from data_prep.source_units import ReadOptions, UnitPart

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGED = "damaged file"
NOT_UTF8 = "invalid UTF-8"
TOO_LONG = "too long"


def read_txt(part: UnitPart, options: ReadOptions, report: ReadReport) -> Iterator[tuple[str, str]]:
    """Read a .txt file, or a range of one.

    Args:
        part: The file.
        options: Whether a document is a file or a line, and how long it may be.
        report: Where everything that is dropped or odd is counted.

    Yields:
        Place and text of each document.

    Raises:
        OSError: The system cannot read the file.
    """
    if options.txt_document == "line":
        for place, data in read_lines(part, options, report):
            text = decode(data, part.path, place, report)
            if text is not None:
                yield place, text
        return
    limit = options.max_document_bytes
    pieces_end = 0
    try:
        with open_bytes(part.path) as stream:
            for piece in iter_pieces(stream, limit, part.start, part.end):
                is_whole = piece.is_last and piece.offset == 0 and part.end is None
                pieces_end = piece.offset + len(piece.data)
                place = "" if is_whole else f"byte {piece.offset}"
                if not is_whole:
                    report.note("part of a long file", part.path, place)
                data = without_mark(piece.data, piece.offset, part.path, report)
                text = decode(data, part.path, place, report)
                if text is not None:
                    yield place, text
    except DamagedInput as damage:
        if pieces_end:
            report.drop(DAMAGED, part.path, f"byte {pieces_end}", f"{damage}; the rest is lost")
        else:
            report.drop(DAMAGED, part.path, "", f"{damage}; its document is lost")


def read_lines(
    part: UnitPart, options: ReadOptions, report: ReadReport
) -> Iterator[tuple[str, bytes]]:
    """Read the lines that are neither blank nor too long.

    Args:
        part: The file, or a range of it.
        options: How long a line may be.
        report: Where blank, long and lost lines are counted.

    Yields:
        Place and bytes of each line, without its end.

    Raises:
        OSError: The system cannot read the file.
    """
    place = "line 0"
    try:
        with open_bytes(part.path) as stream:
            for line in iter_lines(stream, options.max_document_bytes, part.start, part.end):
                # Inside a large file only the offset is known; counting lines would read it twice.
                place = f"byte {line.offset}" if part.start else f"line {line.number}"
                if line.data is None:
                    detail = f"{line.size} bytes, the limit is {options.max_document_bytes}"
                    report.drop(TOO_LONG, part.path, place, detail)
                    continue
                data = without_mark(line.data, line.offset, part.path, report)
                if data and not data.isspace():
                    yield place, data
                else:
                    report.blank_lines += 1
    except DamagedInput as damage:
        report.drop(DAMAGED, part.path, place, f"{damage}; what follows this line is lost")


def without_mark(data: bytes, offset: int, path: str, report: ReadReport) -> bytes:
    """Take the byte order mark away from the first bytes of a file.

    Args:
        data: Some bytes of the file.
        offset: Where in the file they stand.
        path: The file, for the report.
        report: Where a mark is noted.

    Returns:
        The bytes behind the mark, or all of them where there is none.
    """
    if offset or not data.startswith(BYTE_ORDER_MARK):
        return data
    report.note("byte order mark removed", path)
    return data[len(BYTE_ORDER_MARK) :]


def decode(data: bytes, path: str, place: str, report: ReadReport) -> str | None:
    """Read bytes as UTF-8.

    Args:
        data: The bytes.
        path: The file, for the report.
        place: The place in it.
        report: Where bytes that are not UTF-8 are counted.

    Returns:
        The text, or None if it is dropped.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        looks = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        detail = f"byte 0x{data[error.start]:02x} at offset {error.start}{looks}"
        report.drop(NOT_UTF8, path, place, detail)
        return None
