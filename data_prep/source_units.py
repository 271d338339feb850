"""Sources as users name them -> units of work: which files, and which parts of large ones.

- `ReadOptions`: how sources are read.
- `Unit`, `UnitPart`: what one worker reads at a time; plain values that JSON and pickle can hold.
- `plan_units`: the list of units, a function of the input alone and never of the workers.

A plain .jsonl, .txt or .tsv file above the target size is cut into byte ranges at line ends, so
that a line belongs to exactly one unit; a Parquet or Arrow file into row groups or record batches.
A compressed file cannot be entered in the middle and is one unit. So are .json and .csv, whose
records do not begin at line ends: whether a line end of a .csv lies between quotes is known only to
somebody who has read all that stands before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from data_prep.byte_streams import compression_of_file
from data_prep.columnar import file_row_ranges
from data_prep.errors import UserError
from data_prep.locations import open_file
from data_prep.read_report import ReadReport
from data_prep.source_files import Kind, SourceFile, find_source_files

TARGET_BYTES = 64 << 20
_SCAN_BYTES = 64 << 10
# Bounds the parts of a unit of empty or tiny files.
_MAX_PARTS = 4096


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read."""

    text_field: str = "text"
    """Field of a JSON line, column of a Parquet or Arrow file."""
    txt_document: Literal["file", "line"] = "file"
    """Whether a .txt file is one document or one document a line."""
    max_document_bytes: int = 16 << 20
    """Longer JSON lines, text lines and column values are dropped and counted; longer .txt files
    are cut into several documents. In bytes as UTF-8. It bounds the memory of a worker: parsed, a
    hostile JSON line takes 40 times its size."""

    def __post_init__(self) -> None:
        if not self.text_field:
            raise UserError("the text field has no name; give one, for example --text-field text")
        if self.txt_document not in ("file", "line"):
            raise UserError(
                f'a .txt file is read as one document a "file" or a "line", '
                f'not "{self.txt_document}"'
            )
        if not 1024 <= self.max_document_bytes <= 64 << 20:
            raise UserError(
                f"the document limit is {self.max_document_bytes} bytes; it must lie between "
                f"1024 and {64 << 20}, since the memory of a worker grows with it"
            )


@dataclass(frozen=True)
class UnitPart:
    """One file, or a range of one."""

    path: str
    """The file, as the user would write it."""
    kind: Kind
    """Its format, apart from compression."""
    start: int
    """First byte (txt, jsonl, tsv), row group (parquet) or record batch (arrow)."""
    end: int | None
    """Behind the last one; None for the whole of a file that was not looked into."""
    file_bytes: int
    """Size of the file when it was planned; reading refuses another size."""
    num_bytes: int
    """Bytes of the file that this part stands for, for progress and balance."""


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time."""

    index: int
    """Place in the plan."""
    source: str
    """The source as the user named it; a unit never mixes two."""
    parts: tuple[UnitPart, ...]
    """What to read, in order."""

    @property
    def num_bytes(self) -> int:
        """Bytes of input that the unit stands for."""
        return sum(part.num_bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the unit as values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Unit":
        """Read back what `to_dict` gave.

        Args:
            values: The result of `to_dict`, perhaps after a trip through JSON.

        Returns:
            An equal unit.
        """
        parts = tuple(UnitPart(**part) for part in values["parts"])
        return cls(index=values["index"], source=values["source"], parts=parts)


def plan_units(
    sources: Sequence[str],
    options: ReadOptions,
    target_bytes: int = TARGET_BYTES,
    report: ReadReport | None = None,
    options_of: Callable[[str], ReadOptions] | None = None,
) -> list[Unit]:
    """Divide the sources into units of work.

    Args:
        sources: Files, folders (read recursively) and globs, in the user's order.
        options: How they are read.
        target_bytes: Size that a unit aims at, in bytes on disk.
        report: Where ignored files are noted; None to forget them.
        options_of: Source -> how it is read, where sources are read in different ways.

    Returns:
        The units, numbered from 0; the same list for the same input, wherever it is made.

    Raises:
        UserError: A source is missing, holds nothing readable, or is named twice.
    """
    report = ReadReport() if report is None else report
    seen: dict[str, str] = {}
    units: list[Unit] = []
    if not sources:
        raise UserError("no source was named; give files, folders or globs of text")
    for index, source in enumerate(sources):
        if source in sources[:index]:
            raise UserError(f"source {source} is named twice; name it once")
        files = find_source_files(source, report)
        _refuse_twice(source, files, seen)
        own = options if options_of is None else options_of(source)
        for parts in _group_parts(_file_parts(files, own, target_bytes), target_bytes):
            units.append(Unit(index=len(units), source=source, parts=parts))
    return units


def _refuse_twice(source: str, files: Iterable[SourceFile], seen: dict[str, str]) -> None:
    for file in files:
        first = seen.setdefault(file.real_path, source)
        if first != source:
            raise UserError(
                f"{file.path} is reached by two sources, {first} and {source}; its text would be "
                "in the dataset twice: name it once"
            )


class _Part(NamedTuple):
    part: UnitPart
    is_whole: bool
    """Whole files share units; the ranges of a large one do not."""


def _file_parts(
    files: Iterable[SourceFile], options: ReadOptions, target_bytes: int
) -> Iterator[_Part]:
    for file in files:
        whole = UnitPart(file.path, file.kind, 0, None, file.num_bytes, file.num_bytes)
        if file.num_bytes <= target_bytes:
            yield _Part(whole, is_whole=True)
            continue
        try:
            ranges = _split_large(file, options, target_bytes)
        except OSError as error:
            raise unreadable(file.path, error) from error
        if len(ranges) <= 1:
            yield _Part(whole, is_whole=True)
            continue
        for start, end, num_bytes in ranges:
            part = UnitPart(file.path, file.kind, start, end, file.num_bytes, num_bytes)
            yield _Part(part, is_whole=False)


def _group_parts(parts: Iterable[_Part], target_bytes: int) -> Iterator[tuple[UnitPart, ...]]:
    group: list[UnitPart] = []
    size = 0
    for part, is_whole in parts:
        if group and (not is_whole or size + part.num_bytes > target_bytes):
            yield tuple(group)
            group, size = [], 0
        if is_whole and len(group) < _MAX_PARTS:
            group.append(part)
            size += part.num_bytes
        elif is_whole:
            yield tuple(group)
            group, size = [part], part.num_bytes
        else:
            yield (part,)
    if group:
        yield tuple(group)


def _split_large(
    file: SourceFile, options: ReadOptions, target_bytes: int
) -> list[tuple[int, int, int]]:
    if file.kind in ("parquet", "arrow"):
        return file_row_ranges(file.path, file.kind, options.text_field, target_bytes)
    if file.kind in ("json", "csv") or compression_of_file(file.path) is not None:
        return []
    cuts = _line_starts(file.path, range(target_bytes, file.num_bytes, target_bytes))
    edges = [0, *cuts, file.num_bytes]
    return [(start, end, end - start) for start, end in pairwise(edges) if end > start]


def _line_starts(path: str, wanted: Iterable[int]) -> list[int]:
    """Find the first line start at or after each offset; none twice, perhaps the file's end."""
    starts: list[int] = []
    position = 0
    with open_file(path) as file:
        for offset in wanted:
            # A line longer than the distance of two offsets is scanned once, not once for each.
            if offset <= position:
                continue
            file.seek(offset - 1)
            position = offset - 1
            while block := file.read(_SCAN_BYTES):
                found = block.find(b"\n")
                if found >= 0:
                    position += found + 1
                    starts.append(position)
                    break
                position += len(block)
    return starts


def unreadable(path: str, error: OSError) -> UserError:
    """Say that a file cannot be read.

    Args:
        path: The file, as the user would write it.
        error: What the system said.

    Returns:
        The error to raise.
    """
    return UserError(
        f"{path} cannot be read: {error.strerror or error}; make it readable or leave it out of "
        "the sources, then run the command again"
    )
