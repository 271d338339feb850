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
    JSON value that is none, lacks the field, has it twice or not as text dropped
    CSV row that breaks the quoting or has more or fewer fields           dropped
    line, row or JSON value above `max_document_bytes`                    dropped, never held
    a JSON file that ends inside a value or an array                      dropped from there on
    .txt file above it                                                    cut into documents, noted
    broken gzip, zstd, xz, Parquet or Arrow                               dropped from the damage on
    any of them above 64 MiB and 200 times its size                       dropped from there on
    byte order mark at the start of a file                                removed, noted
    file that cannot be opened, or that changed since it was planned      an error: nothing is lost
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.errors import UserError
from data_prep.locations import file_size
from data_prep.read_report import ReadReport
from data_prep.record_readers import read_delimited, read_json, read_jsonl, read_table
from data_prep.source_files import ACCEPTED, Kind
from data_prep.source_units import ReadOptions, Unit, UnitPart, plan_units, unreadable
from data_prep.text_readers import read_txt

_DOCUMENT_CHARACTERS = 64
"""Objects and entries of a document, in memory, are worth so many characters of text."""

Reader = Callable[[UnitPart, ReadOptions, ReadReport], Iterator[tuple[str, str]]]

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


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    """As it stands in the file; it may hold control characters and lone surrogates."""
    source: str
    """The file, as the user would write it."""
    position: str
    """The place in the file: "line 17", "row 5", "byte 1024"; empty for a whole file."""

    @cached_property
    def utf8(self) -> bytes:
        """The text as UTF-8, made once.

        Raises:
            UnicodeEncodeError: It holds a lone surrogate.
        """
        return self.text.encode()

    @property
    def cost_characters(self) -> int:
        """What the document counts for in a batch: tiny ones take memory too."""
        return len(self.text) + _DOCUMENT_CHARACTERS


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
            for place, text in _READERS[part.kind](part, options, report):
                if not text or text.isspace():
                    report.drop("empty text", part.path, place)
                    continue
                report.documents += 1
                document = Document(text, part.path, place)
                report.text_bytes += _utf8_bytes(document)
                yield document
        except OSError as error:
            raise unreadable(part.path, error) from error


def _utf8_bytes(document: Document) -> int:
    try:
        return len(document.utf8)
    except UnicodeEncodeError:
        return len(document.text.encode("utf-8", "surrogatepass"))


def _check_unchanged(part: UnitPart) -> None:
    size = file_size(part.path)
    if size != part.file_bytes:
        raise UserError(
            f"{part.path} changed while it was in use: {part.file_bytes} bytes when the work was "
            f"planned, {size} now; start again with an output folder of another name"
        )


_READERS: dict[Kind, Reader] = {
    "txt": read_txt,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_delimited,
    "tsv": read_delimited,
    "parquet": read_table,
    "arrow": read_table,
}
