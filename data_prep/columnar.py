"""The text column of Parquet and Arrow files, a few rows at a time.

- `file_row_ranges`: how a large file is divided into row groups or record batches.
- `iter_rows`: the values of the text column, as bytes.
- `DamagedTable`, `UnusableColumn`: what can be wrong with such a file.

Arrow is imported where it is needed: it costs a quarter of a second and 40 MB.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.locations import is_remote, open_file

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
# What may be read without knowing how long its longest row is; a row costs Arrow 3 times its size.
_UNSEEN_BYTES = 256 << 20


class DamagedTable(Exception):
    """The file is broken from here on; the message says how."""


class UnusableColumn(Exception):
    """The file has no text column of that name; `reason` is its class, the message the detail."""

    def __init__(self, reason: str, detail: str, num_rows: int):
        super().__init__(detail)
        self.reason = reason
        self.num_rows = num_rows


class Row(NamedTuple):
    """One value of the text column."""

    number: int
    """Counted from 1 at the start of the range."""
    size: int
    """Bytes as UTF-8."""
    data: bytes | None
    """The value as bytes that should be UTF-8; None if it is missing or above the limit."""


def file_row_ranges(
    path: str, kind: str, text_field: str, target_bytes: int
) -> list[tuple[int, int, int]]:
    """Divide a file into ranges of row groups (parquet) or record batches (arrow).

    Args:
        path: The file.
        kind: "parquet" or "arrow".
        text_field: The text column; the size of the others does not count in Parquet.
        target_bytes: Size that a range aims at.

    Returns:
        (first, behind the last, bytes) of each range; nothing for a file that cannot be divided
        because it is broken (reading it will say so).

    Raises:
        OSError: The system cannot read the file.
    """
    try:
        sizes = _group_sizes(path) if kind == "parquet" else _batch_sizes(path)
    except DamagedTable:
        return []
    ranges: list[tuple[int, int, int]] = []
    first, size = 0, 0
    for index, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= target_bytes or index == len(sizes) - 1:
            ranges.append((first, index + 1, size))
            first, size = index + 1, 0
    return ranges


def iter_rows(
    path: str, kind: str, text_field: str, limit: int, start: int, end: int | None
) -> Iterator[Row]:
    """Read the text column, a few rows at a time.

    A row group of more than 256 MiB of text whose average row is above the limit is passed over
    whole: Arrow would hold its rows to tell their sizes.

    Args:
        path: The file.
        kind: "parquet" or "arrow".
        text_field: The column.
        limit: Longest value that is handed on, in bytes.
        start: First row group or record batch.
        end: Behind the last one; None for all.

    Yields:
        Every row of the range, numbered from the start of the file.

    Raises:
        UnusableColumn: There is no such column, or it does not hold text.
        DamagedTable: The file is broken; the rows before were yielded.
        OSError: The system cannot read the file.
    """
    rows = _parquet_rows if kind == "parquet" else _arrow_rows
    return rows(path, text_field, limit, start, end)


def _checked(column: "pa.Array") -> "pa.Array":
    """The values as binary, perhaps in a dictionary or as views, all of them where they say.

    As binary, since Arrow does not check that a string is UTF-8, and Python would raise in
    mid-batch. And checked, since an Arrow file is used as it lies on the disk: broken offsets in
    it would be taken for places in memory.

    Raises:
        ArrowInvalid: They are not.
    """
    import pyarrow as pa

    column.validate()
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))
    is_view = pa.types.is_string_view(column.type)
    # Only offsets are copied, and none of views.
    column = column.cast(pa.binary_view() if is_view else pa.large_binary())
    column.validate(full=True)
    return column


def _rows_of(column: "pa.Array", first_row: int, limit: int) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary.take(column.indices)
    column = column.cast(pa.large_binary())
    sizes = pc.binary_length(column).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    for index, size in enumerate(sizes):
        number = first_row + index + 1
        if size is None:
            yield Row(number, 0, None)
        else:
            yield Row(number, size, column[index].as_py() if size <= limit else None)


def _check_column(schema: "pa.Schema", text_field: str, num_rows: int) -> None:
    import pyarrow as pa

    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise DamagedTable("the name of a column is not UTF-8") from error
    if names.count(text_field) != 1:
        has = ", ".join(names[:10])
        raise UnusableColumn("missing field", f'no column "{text_field}" (has: {has})', num_rows)
    found = schema.field(text_field).type
    values = found.value_type if pa.types.is_dictionary(found) else found
    if not (
        pa.types.is_string(values)
        or pa.types.is_large_string(values)
        or pa.types.is_string_view(values)
    ):
        raise UnusableColumn("text is not a string", f'column "{text_field}" is {found}', num_rows)


def _table_errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError, EOFError)


def _as_damage(error: Exception) -> Exception:
    """Arrow raises OSError for broken bytes; only the system's own carry an error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DamagedTable(first_line[:200])


def _open_parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    try:
        # A small read buffer makes Arrow stream pages; without it a column chunk is read whole.
        source = open_file(path) if is_remote(path) else path
        return pq.ParquetFile(
            source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except _table_errors() as error:
        raise _as_damage(error) from error


def _group_sizes(path: str) -> list[int]:
    with _open_parquet(path) as file:
        groups = (file.metadata.row_group(n) for n in range(file.metadata.num_row_groups))
        return [
            sum(group.column(n).total_compressed_size for n in range(group.num_columns))
            for group in groups
        ]


def _parquet_rows(
    path: str, text_field: str, limit: int, start: int, end: int | None
) -> Iterator[Row]:
    with _open_parquet(path) as file:
        metadata = file.metadata
        groups = range(start, metadata.num_row_groups if end is None else end)
        num_rows = sum(metadata.row_group(group).num_rows for group in groups)
        _check_column(file.schema_arrow, text_field, num_rows)
        row = sum(metadata.row_group(group).num_rows for group in range(start))
        for group in groups:
            rows_end = row + metadata.row_group(group).num_rows
            average = _average_bytes(metadata.row_group(group), text_field)
            if average > limit and average * (rows_end - row) > _UNSEEN_BYTES:
                yield from (Row(number + 1, average, None) for number in range(row, rows_end))
                row = rows_end
                continue
            batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // average))
            try:
                for batch in file.iter_batches(
                    batch_rows, row_groups=[group], columns=[text_field], use_threads=False
                ):
                    yield from _rows_of(_checked(batch.column(0)), row, limit)
                    row += batch.num_rows
            except _table_errors() as error:
                raise _as_damage(error) from error
            if row != rows_end:
                raise DamagedTable(f"row group {group} ends {rows_end - row} rows early")


def _average_bytes(group: Any, text_field: str) -> int:
    columns = (group.column(n) for n in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
    return max(1, size // max(1, group.num_rows))


def _record_batches(path: str) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    # Mapped where that is possible, so that batches that are skipped are never read.
    with pa.PythonFile(open_file(path)) if is_remote(path) else pa.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            yield from pa.ipc.open_stream(source)


def _batch_sizes(path: str) -> list[int]:
    try:
        return [batch.nbytes for batch in _record_batches(path)]
    except _table_errors() as error:
        raise _as_damage(error) from error


def _arrow_rows(
    path: str, text_field: str, limit: int, start: int, end: int | None
) -> Iterator[Row]:
    row = 0
    batches = _record_batches(path)
    index = 0
    while end is None or index < end:
        try:
            batch = next(batches, None)
        except _table_errors() as error:
            raise _as_damage(error) from error
        if batch is None:
            return
        if index >= start:
            _check_column(batch.schema, text_field, batch.num_rows)
            try:
                column = _checked(batch.column(batch.schema.get_field_index(text_field)))
                for first in range(0, batch.num_rows, _MAX_BATCH_ROWS):
                    yield from _rows_of(column.slice(first, _MAX_BATCH_ROWS), row + first, limit)
            except _table_errors() as error:
                raise _as_damage(error) from error
        row += batch.num_rows
        index += 1
