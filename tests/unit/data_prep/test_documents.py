import gzip
import json
import lzma
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.documents import (
    Document,
    ReadOptions,
    ReadReport,
    embedded_corpus,
    plan_units,
    read_unit,
)
from data_prep.errors import UserError

DEFAULT = ReadOptions()
LINES = ReadOptions(txt_document="line")
PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
}


def read(source, options=DEFAULT) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    units = plan_units([str(source)], options, report=report)
    return [d for unit in units for d in read_unit(unit, options, report)], report


def texts_and_places(documents) -> list[tuple[str, str]]:
    return [(document.text, document.position) for document in documents]


def test_a_txt_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    documents, report = read(tmp_path)
    assert documents == [Document("one\n\ntwo\n", f"{tmp_path}/a.txt", "")]
    assert report == ReadReport(files=1, documents=1, text_bytes=9)


def test_a_txt_is_one_document_a_line_by_option(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\n \ntw\u2028o\x85\rend".encode())
    documents, report = read(tmp_path, LINES)
    assert texts_and_places(documents) == [("one", "line 1"), ("tw\u2028o\x85\rend", "line 4")]
    assert report.blank_lines == 2
    assert report.dropped == {}


def test_jsonl_gives_the_text_field(tmp_path):
    lines = [{"text": "one", "body": "eins", "m": {"text": "x"}}, {"body": "zwei", "text": "tw\no"}]
    (tmp_path / "a.jsonl").write_text("\r\n".join(json.dumps(line) for line in lines))
    documents, report = read(tmp_path)
    assert texts_and_places(documents) == [("one", "line 1"), ("tw\no", "line 2")]
    assert report.dropped == {}
    documents, _ = read(tmp_path, ReadOptions(text_field="body"))
    assert [document.text for document in documents] == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"{bad", "invalid JSON", "Expecting property name"),
        (b'{"text": "cut', "invalid JSON", "Unterminated string"),
        (b"[" * 100_000, "invalid JSON", "recursion"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "invalid JSON", "4300"),
        (b"[1]", "JSON value is not an object", "list"),
        (b'"text"', "JSON value is not an object", "str"),
        (b'{"z": 1, "body": 2}', "missing field", 'no "text" (has: body, z)'),
        (b'{"text": null}', "text is not a string", '"text" is NoneType'),
        (b'{"text": ["a"]}', "text is not a string", '"text" is list'),
        (b'{"text": "a", "text": "b"}', "field given twice", '"text"'),
        (b'{"text": 1, "text": "b", "m": {"text": 1}}', "field given twice", '"text"'),
        (b'{"text": "a\xff"}', "invalid UTF-8", "byte 0xff at offset 11"),
        (b'{"text": ""}', "empty text", ""),
        (b'{"text": " \\n\\u3000"}', "empty text", ""),
        (b'{"text": "' + b"a" * 2000 + b'"}', "too long", "2013 bytes, the limit is 1500"),
    ],
    ids=lambda value: value[:15] if isinstance(value, bytes) else None,
)
def test_a_malformed_json_line_is_counted_with_its_place(tmp_path, line, reason, detail):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    options = ReadOptions() if len(line) > 3000 else ReadOptions(max_document_bytes=1500)
    documents, report = read(tmp_path, options)
    assert texts_and_places(documents) == [("before", "line 1"), ("after", "line 3")]
    assert report.dropped == {reason: 1}
    [told] = report.lines()
    assert told.startswith(f"{tmp_path}/a.jsonl: line 2: {reason}")
    assert detail in told


def test_only_the_outermost_field_must_be_unique(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"m": {"text": 1, "text": 2}, "text": "the \\"text\\""}')
    [document], report = read(tmp_path)
    assert document.text == 'the "text"'
    assert report.dropped == {}


def test_lone_surrogates_come_through_for_the_cleaning(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud800x \ud83d\ude00"}')
    [document], _ = read(tmp_path)
    assert document.text == "\ud800x \U0001f600"


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_every_compression_gives_the_same(tmp_path, name, suffix):
    lines = [json.dumps({"text": f"document {n}"}) for n in range(1000)]
    # Under a name that says another compression than it has.
    (tmp_path / f"{name}.gz").write_bytes(PACKERS[suffix]("\n".join(lines).encode()))
    documents, report = read(tmp_path, LINES)
    expected = lines if name == "a.txt" else [f"document {n}" for n in range(1000)]
    assert [document.text for document in documents] == expected
    assert documents[-1].position == "line 1000"
    assert (report.files, report.documents, report.dropped) == (1, 1000, {})


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_documents_before_the_damage_are_kept(tmp_path, suffix):
    lines = "".join(json.dumps({"text": f"{n * n * 7919:x}"}) + "\n" for n in range(30_000))
    packed = PACKERS[suffix](lines.encode())
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) * 9 // 10])
    documents, report = read(tmp_path)
    assert len(documents) > 10_000
    assert [document.text for document in documents] == [
        f"{n * n * 7919:x}" for n in range(len(documents))
    ]
    assert report.dropped == {"damaged file": 1}
    [told] = report.lines()
    assert told.startswith(f"{tmp_path}/a.jsonl{suffix}: line {len(documents)}: damaged file (")
    assert "ends before its end mark; what follows this line is lost" in told


def test_a_damaged_txt_loses_its_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-200])
    documents, report = read(tmp_path)
    assert documents == []
    [told] = report.lines()
    assert told.startswith(f"{tmp_path}/a.txt.gz: damaged file (gzip data ends before")


def test_a_damaged_long_txt_keeps_the_parts_before(tmp_path):
    packed = gzip.compress(b"".join(b"%x " % (n * n * 7919) for n in range(5000)))
    (tmp_path / "a.txt.gz").write_bytes(packed[:-200])
    documents, report = read(tmp_path, ReadOptions(max_document_bytes=2048))
    assert len(documents) > 10
    assert report.dropped == {"damaged file": 1}
    assert f"a.txt.gz: byte {report.text_bytes}: damaged file" in next(iter(report.lines()))


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_long_txt_is_cut_and_noted(tmp_path, suffix):
    content = "word " * 1000
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](content.encode()))
    documents, report = read(tmp_path, ReadOptions(max_document_bytes=2048))
    assert "".join(document.text for document in documents) == content
    assert [document.position for document in documents] == ["byte 0", "byte 2045", "byte 4090"]
    assert report.notes == {"part of a long file": 3}
    assert report.dropped == {}


@pytest.mark.parametrize(
    ("content", "dropped", "line"),
    [
        (b"", {"empty file": 1}, "a.txt: empty file"),
        (b" \n\t\n", {"empty text": 1}, "a.txt: empty text"),
        (b"abc\xff", {"invalid UTF-8": 1}, "a.txt: invalid UTF-8 (byte 0xff at offset 3)"),
        ("hi".encode("utf-16"), {"invalid UTF-8": 1}, "(it looks like UTF-16)"),
        (b"\xed\xa0\x80", {"invalid UTF-8": 1}, "byte 0xed at offset 0"),
        (gzip.compress(b"", mtime=0), {}, None),
    ],
)
def test_a_malformed_txt_is_counted(tmp_path, content, dropped, line):
    (tmp_path / "a.txt").write_bytes(content)
    documents, report = read(tmp_path)
    assert documents == []
    assert report.dropped == dropped
    assert line is None or line in next(iter(report.lines()))


@pytest.mark.parametrize(
    ("options", "texts"),
    [(DEFAULT, ["one\n\ufefftwo"]), (LINES, ["one", "\ufefftwo"])],
    ids=["file", "line"],
)
def test_a_byte_order_mark_is_removed_at_the_start_only(tmp_path, options, texts):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ufefftwo", encoding="utf-8")
    documents, report = read(tmp_path, options)
    assert [document.text for document in documents] == texts
    assert report.notes == {"byte order mark removed": 1}


def test_bad_lines_of_a_txt_leave_the_others(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\nt\xffo\nthree\n" + b"x" * 3000 + b"\nfive")
    options = ReadOptions(txt_document="line", max_document_bytes=2000)
    documents, report = read(tmp_path, options)
    assert texts_and_places(documents) == [
        ("one", "line 1"),
        ("three", "line 3"),
        ("five", "line 5"),
    ]
    assert list(report.lines()) == [
        f"{tmp_path}/a.txt: line 2: invalid UTF-8 (byte 0xff at offset 1)",
        f"{tmp_path}/a.txt: line 4: too long (3001 bytes, the limit is 2000)",
    ]


def test_inside_a_large_file_the_place_is_a_byte_offset(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "sound"}\n' * 10 + b"{bad\n")
    report = ReadReport()
    units = plan_units([str(tmp_path)], ReadOptions(), target_bytes=100)
    places = [d.position for u in units for d in read_unit(u, ReadOptions(), report)]
    assert places == [f"line {n}" for n in range(1, 7)] + [f"byte {n * 18}" for n in range(6, 10)]
    assert next(iter(report.lines())).startswith(f"{tmp_path}/a.jsonl: byte 180: invalid JSON")
    assert report.files == 1


def test_saved_datasets_are_read(tmp_path):
    columns = {"text": ["one", "two \u20ac"], "label": [0, 1]}
    dataset = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(columns), test=datasets.Dataset.from_dict({"text": ["3"]})
    )
    dataset.save_to_disk(tmp_path / "d")
    documents, report = read(tmp_path / "d")
    assert [(d.text, d.position, Path(d.source).parent.name) for d in documents] == [
        ("3", "row 1", "test"),
        ("one", "row 1", "train"),
        ("two \u20ac", "row 2", "train"),
    ]
    assert (report.dropped, report.notes) == ({}, {})


def test_a_file_that_changed_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    [unit] = plan_units([str(path)], ReadOptions())
    path.write_text("three")
    with pytest.raises(UserError, match=r"changed while it was in use: 3 bytes .* 5 now"):
        list(read_unit(unit, ReadOptions(), ReadReport()))
    path.unlink()
    with pytest.raises(UserError, match=r"a.txt cannot be read: No such file .* run the command"):
        list(read_unit(unit, ReadOptions(), ReadReport()))


@given(
    st.binary(max_size=200), st.sampled_from(["txt", "jsonl", "parquet", "arrow"]), st.booleans()
)
def test_no_bytes_stop_the_reading(tmp_path_factory, data, suffix, by_line):
    path = tmp_path_factory.mktemp("soup") / f"a.{suffix}"
    path.write_bytes(data)
    documents, report = read(path, LINES if by_line else ReadOptions())
    assert report.documents == len(documents)
    assert documents or report.total_dropped or report.blank_lines or not data


@given(st.lists(st.text(), max_size=5))
def test_any_json_text_comes_through(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents, _ = read(path)
    assert [document.text for document in documents] == [
        text for text in texts if text and not text.isspace()
    ]


def test_no_flipped_bit_of_a_table_stops_the_reading(tmp_path):
    sound, path = tmp_path / "sound", tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two", "three"] * 20}), sound)
    data = bytearray(sound.read_bytes())
    for position in range(0, len(data), 5):
        data[position] ^= 4
        path.write_bytes(data)
        data[position] ^= 4
        documents, report = read(path)
        assert documents or report.total_dropped


MEMORY_PROBE = """
import re, sys
from data_prep.cleaning import CleaningOptions, clean_document, split_long
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
options, report, size = ReadOptions(txt_document=sys.argv[2]), ReadReport(), 0
for unit in plan_units([sys.argv[1]], options):
    for document in read_unit(unit, options, report):
        kept = clean_document(document, CleaningOptions(), report)
        size += sum(map(len, split_long(kept.text)))
# Not ru_maxrss, which a child takes over from its parent.
peak_kib = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(size, report.total_dropped, peak_kib)
"""


def probe_memory(source, mode) -> tuple[int, int]:
    """Read a source in a process of its own; its peak stays below 250 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(source), mode],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    size, dropped, peak_kib = map(int, result.stdout.split())
    assert peak_kib < 250 << 10
    return size, dropped


@pytest.mark.parametrize(
    ("name", "head", "word", "tail", "mode", "expected"),
    [
        ("a.txt", b"", b"word ", b"", "file", (50_000_000, 0)),
        ("a.txt", b"", b"wordx", b"", "file", (50_000_000, 0)),
        ("a.txt", b"", b"word ", b"\nend", "line", (3, 1)),
        ("a.txt.gz", b"", b"word ", b"", "file", (50_000_000, 0)),
        ("a.jsonl", b'{"text": "', b"word ", b'"}\n{"text": "end"}', "file", (3, 1)),
    ],
)
def test_memory_stays_bounded_on_a_50_mb_line(tmp_path, name, head, word, tail, mode, expected):
    data = head + word * 10_000_000 + tail
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    assert probe_memory(tmp_path / name, mode) == expected


def test_a_packed_bomb_is_unpacked_in_bounded_memory(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    parts = [packer.compress(b"a" * (1 << 20)) for _ in range(512)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(parts) + packer.flush())
    assert (tmp_path / "a.jsonl").stat().st_size < 100_000
    assert probe_memory(tmp_path / "a.jsonl", "file") == (0, 1)


def test_the_embedded_corpus_is_whole_and_is_text():
    documents, report = read(embedded_corpus())
    assert (len(documents), report.text_bytes) == (35, 1_280_828)
    assert (report.dropped, report.notes) == ({}, {})
    assert {Path(d.source).name[:4] for d in documents} <= {str(y) for y in range(1985, 2027)}
    categories = {unicodedata.category(c) for d in documents for c in d.text if c != "\n"}
    assert categories.isdisjoint({"Cc", "Cs", "Co", "Cn"})
