import struct
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import columnar
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit

DEFAULT = ReadOptions()


def read(path, options=DEFAULT):
    report = ReadReport()
    units = plan_units([str(path)], options, report=report)
    return [(d.text, d.position) for u in units for d in read_unit(u, options, report)], report


def write(path, table, **options):
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=options.get("row_group_size"))


suffixes = pytest.mark.parametrize("suffix", ["parquet", "arrow"])


@suffixes
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_every_kind_of_string_column_is_read(tmp_path, suffix, kind):
    values = ["one", None, "tw\u20ac", ""]
    table = pa.table({"n": range(4), "text": pa.array(values).cast(kind)})
    path = tmp_path / f"a.{suffix}"
    write(path, table, row_group_size=2)
    documents, report = read(path)
    assert documents == [("one", "row 1"), ("tw\u20ac", "row 3")]
    assert report.dropped == {"text is not a string": 1, "empty text": 1}
    assert list(report.lines()) == [
        f"{path}: row 4: empty text",
        f"{path}: row 2: text is not a string (null)",
    ]


@suffixes
def test_values_that_are_not_utf8_and_too_long_ones_are_dropped(tmp_path, suffix):
    values = [b"sound", b"bad\xff", b"x" * 2000, b"sound"]
    invalid = pa.array(values, pa.binary()).view(pa.string())
    path = tmp_path / f"a.{suffix}"
    write(path, pa.table({"text": invalid}))
    documents, report = read(path, ReadOptions(max_document_bytes=1024))
    assert documents == [("sound", "row 1"), ("sound", "row 4")]
    assert list(report.lines()) == [
        f"{path}: row 2: invalid UTF-8 (byte 0xff at offset 3)",
        f"{path}: row 3: too long (2000 bytes, the limit is 1024)",
    ]


@suffixes
@pytest.mark.parametrize(
    ("table", "reason", "detail"),
    [
        ({"body": ["a", "b"], "id": [1, 2]}, "missing field", 'no column "text" (has: body, id)'),
        ({"text": [1, 2]}, "text is not a string", 'column "text" is int64'),
        ({"text": [["a"], ["b"]]}, "text is not a string", 'column "text" is list<'),
    ],
)
def test_a_table_without_text_is_dropped_with_all_its_rows(tmp_path, suffix, table, reason, detail):
    path = tmp_path / f"a.{suffix}"
    write(path, pa.table(table))
    documents, report = read(path)
    assert documents == []
    assert report.dropped == {reason: 2}
    [told] = report.lines()
    assert told.startswith(f"{path}: {reason} ({detail}")


def test_rows_before_the_damage_are_kept(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{n:05d}" for n in range(1000)]
    write(path, pa.table({"text": texts}), row_group_size=100, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(5).column(0).data_page_offset + 60
    data[middle] ^= 1
    path.write_bytes(data)
    documents, report = read(path)
    assert [text for text, _ in documents] == texts[:500]
    assert report.dropped == {"damaged file": 1}
    assert f"{path}: row 500: damaged file" in next(iter(report.lines()))


@suffixes
def test_a_truncated_table_is_counted(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, pa.table({"text": ["one"] * 1000}))
    path.write_bytes(path.read_bytes()[:-100])
    _, report = read(path)
    assert report.dropped == {"damaged file": 1}


def test_a_truncated_stream_keeps_the_batches_before(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": [f"{n}" for n in range(100)]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    path.write_bytes(path.read_bytes()[:-100])
    documents, report = read(path)
    assert len(documents) == 90
    assert report.dropped == {"damaged file": 1}


MEMORY_PROBE = """
import re, sys
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
report = ReadReport()
for unit in plan_units([sys.argv[1]], ReadOptions()):
    for document in read_unit(unit, ReadOptions(), report):
        pass
# Not ru_maxrss, which a child takes over from its parent.
peak_kib = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(report.documents, report.total_dropped, peak_kib)
"""


def test_a_large_row_group_is_streamed(tmp_path):
    page = "".join(f"{n:x} " for n in range(1_000))
    table = pa.table({"text": [page[n % 3000 :] + page for n in range(60_000)]})
    write(
        tmp_path / "a.parquet",
        table,
        row_group_size=60_000,
        use_dictionary=False,
        compression="none",
    )
    assert table.nbytes > 300 << 20
    output = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "a.parquet")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    documents, dropped, peak_kib = map(int, output.split())
    assert (documents, dropped) == (60_000, 0)
    assert peak_kib < 250 << 10


def test_a_row_group_of_huge_rows_is_dropped_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * 5000, "b" * 5000, "one", "two"]})
    write(path, table, row_group_size=2, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset + 40] ^= 1
    path.write_bytes(data)
    options = ReadOptions(max_document_bytes=4096)
    _, report = read(path, options)
    assert report.dropped == {"damaged file": 1}
    monkeypatch.setattr(columnar, "_UNSEEN_BYTES", 5000)
    documents, report = read(path, options)
    assert documents == [("one", "row 3"), ("two", "row 4")]
    assert report.dropped == {"too long": 2}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_arrow_values_that_lie_elsewhere_are_damage(tmp_path, kind):
    """What the file says of places is used as it stands, and would be read from memory."""
    column = pa.array(["first text", "second text of more than twelve bytes"] * 3)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("text", column.type)])) as writer:
        writer.write_table(pa.table({"text": column}))
    data = (tmp_path / "a.arrow").read_bytes()
    views = column.buffers()[1].to_pybytes() if kind == pa.string_view() else b""
    places = {
        pa.string(): (struct.pack("<3i", 0, 10, 47), struct.pack("<3i", 0, 2**31 - 1, 47)),
        pa.large_string(): (struct.pack("<3q", 0, 10, 47), struct.pack("<3q", 0, 2**62, 47)),
        pa.string_view(): (views[16:32], views[16:28] + struct.pack("<i", 2**30)),
        "dictionary": (struct.pack("<3i", 0, 1, 0), struct.pack("<3i", 0, 2**30, 0)),
    }
    old, new = places[kind]
    assert old in data
    (tmp_path / "a.arrow").write_bytes(data.replace(old, new, 1))
    documents, report = read(tmp_path / "a.arrow")
    assert (documents, report.dropped) == ([], {"damaged file": 1})


def test_the_name_of_an_arrow_column_that_is_not_utf8_is_damage(tmp_path):
    write(tmp_path / "a.arrow", pa.table({"text": ["one"], "number": [1]}))
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(b"number", b"\xffumber"))
    documents, report = read(tmp_path / "a.arrow")
    assert (documents, report.dropped) == ([], {"damaged file": 1})
