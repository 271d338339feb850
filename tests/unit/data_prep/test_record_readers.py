import gzip
import json
import lzma
import random
from collections import Counter

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.documents import Document, ReadOptions, ReadReport, plan_units, read_unit

PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
}


def read(folder, options=ReadOptions()) -> tuple[list[Document], ReadReport]:  # noqa: B008
    report = ReadReport()
    units = plan_units([str(folder)], options, report=report)
    return [d for unit in units for d in read_unit(unit, options, report)], report


def texts_and_places(documents) -> list[tuple[str, str]]:
    return [(document.text, document.position) for document in documents]


JSON_FORMS = {
    "an array over many lines": json.dumps([{"text": "one"}, {"text": "two"}], indent=2).encode(),
    "one object": b'\xef\xbb\xbf {"id": 1, "text": "one"}\n{"text": "two"}',
    "json lines": b'{"text": "one"}\n{"text": "two"}\n',
}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_json_file_is_its_objects(tmp_path, form, suffix):
    (tmp_path / f"a.json{suffix}").write_bytes(PACKERS[suffix](JSON_FORMS[form]))
    documents, report = read(tmp_path)
    assert texts_and_places(documents) == [("one", "value 1"), ("two", "value 2")]
    assert report.dropped == {}


def test_what_is_wrong_in_a_json_file_is_told_and_the_rest_read(tmp_path):
    values = [b'{"text": "one"}', b"7", b'{"text": 1}', b'{"text" "x"}', b'"' + 2000 * b"x" + b'"']
    tail = b', {"text": "\xff"}, {"text": "two"}, {"text": '
    (tmp_path / "a.json").write_bytes(b"[" + b", ".join(values) + tail)
    documents, report = read(tmp_path, ReadOptions(max_document_bytes=1024))
    assert texts_and_places(documents) == [("one", "value 1"), ("two", "value 7")]
    assert report.dropped == {
        "JSON value is not an object": 1,
        "text is not a string": 1,
        "invalid JSON": 1,
        "too long": 1,
        "invalid UTF-8": 1,
        "damaged file": 1,
    }
    assert f"{tmp_path}/a.json: value 7: damaged file (the file ends inside a JSON value; " in (
        "\n".join(report.lines())
    )


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_text_column_of_csv_and_tsv_is_read(tmp_path, suffix):
    csv_bytes = b'\xef\xbb\xbfid,text\r\n1,"one,\r\n""1"""\r\n2,two\r\n'
    (tmp_path / f"a.csv{suffix}").write_bytes(PACKERS[suffix](csv_bytes))
    (tmp_path / f"b.tsv{suffix}").write_bytes(PACKERS[suffix](b'text\tid\n"one"\t1\n'))
    documents, report = read(tmp_path)
    assert texts_and_places(documents) == [
        ('one,\n"1"', "line 2"),
        ("two", "line 4"),
        ('"one"', "line 2"),
    ]
    assert report.dropped == {}
    assert report.notes == {"byte order mark removed": 1}


def test_what_is_wrong_in_a_csv_file_is_told_and_the_rest_read(tmp_path):
    rows = b'text,id\none,1\ntwo\n"x"y,3\n' + 2000 * b"x" + b",4\n\xff,5\n,6\nthree,7\n"
    (tmp_path / "a.csv").write_bytes(rows)
    (tmp_path / "b.csv").write_bytes(b"body,id\none,1\ntwo,2\n")
    (tmp_path / "c.csv").write_bytes(b"text,text\none,1\n")
    (tmp_path / "d.csv.gz").write_bytes(
        gzip.compress(b"text\n" + random.Random(0).randbytes(5000).hex().encode())[:-2000]
    )
    documents, report = read(tmp_path, ReadOptions(max_document_bytes=1024))
    ours = [document for document in documents if document.source.endswith("a.csv")]
    assert texts_and_places(ours) == [("one", "line 2"), ("three", "line 8")]
    assert report.dropped.pop("damaged file") == 1
    assert f'{tmp_path}/b.csv: line 2: missing field (no column "text" (has: body, id))' in (
        list(report.lines())
    )
    named = {path: cases for files in report.examples.values() for path, cases in files.items()}
    assert set(named) == {f"{tmp_path}/{name}" for name in ("a.csv", "b.csv", "c.csv", "d.csv.gz")}
    assert report.dropped["missing field"] == 2
    assert report.dropped["field given twice"] == 1
    assert report.dropped["empty text"] == 1
    assert report.dropped["too long"] == 1
    assert report.dropped["invalid CSV"] == 2


TSV_LINES = st.lists(
    st.sampled_from([b"", b"x\tone", b'"y\ttwo"', b"z", b"\xff\tthree", b"w\t" + 1100 * b"l"]),
    max_size=12,
)


@given(TSV_LINES, st.booleans(), st.sampled_from([b"\n", b"\r\n"]), st.integers(1, 300))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_ranges_of_a_tsv_are_the_whole_file(tmp_path, lines, is_marked, line_end, target_bytes):
    mark = b"\xef\xbb\xbf" if is_marked else b""
    data = mark + b"".join(line + line_end for line in [*lines[:2], b"id\ttext", *lines[2:]])
    (tmp_path / "a.tsv").write_bytes(data)
    options = ReadOptions(max_document_bytes=1024)
    found = []
    for size in (1 << 20, target_bytes):
        report = ReadReport()
        units = plan_units([str(tmp_path / "a.tsv")], options, size)
        documents = [d.text for unit in units for d in read_unit(unit, options, report)]
        found.append((documents, report.dropped, report.notes, report.documents))
        assert len(units) == 1 or size == target_bytes
    assert found[0] == found[1]


def test_a_large_tsv_is_many_units_and_a_large_csv_is_one(tmp_path):
    rows = [f"{n}\ttext {n}\n" for n in range(500)]
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(rows))
    (tmp_path / "a.csv").write_text(("id\ttext\n" + "".join(rows)).replace("\t", ","))
    numbers = []
    for name in ("a.tsv", "a.csv"):
        units = plan_units([str(tmp_path / name)], ReadOptions(), 1000)
        numbers.append(len(units))
        report = ReadReport()
        documents = [d for unit in units for d in read_unit(unit, ReadOptions(), report)]
        assert [document.text for document in documents] == [f"text {n}" for n in range(500)]
    assert numbers == [7, 1]
    (tmp_path / "b.tsv").write_text("id\ttext\n" + "x\ty\n" * 20 + "z\n")
    units = plan_units([str(tmp_path / "b.tsv")], ReadOptions(), 40)
    report = ReadReport()
    assert sum(1 for unit in units for _ in read_unit(unit, ReadOptions(), report)) == 20
    assert "b.tsv: byte 88: invalid CSV (1 fields under 2 columns)" in "\n".join(report.lines())


def judged_by_json(data: bytes):
    """The text, or the class of the problem, as the standard library sees them."""
    try:
        source = data.decode()
    except UnicodeDecodeError:
        return "invalid UTF-8"
    try:
        pairs = json.loads(source, object_pairs_hook=lambda pairs: pairs)
        value = json.loads(source)
    except (ValueError, RecursionError):
        return "invalid JSON"
    if not isinstance(value, dict):
        return "JSON value is not an object"
    if "text" not in value:
        return "missing field"
    if [name for name, _ in pairs].count("text") > 1:
        return "field given twice"
    text = value["text"]
    return ("text", text) if isinstance(text, str) else "text is not a string"


STRANGE_LINES = [
    b'{"text": "\\ud800"}',
    b'{"text": "\\ud83d\\ude00"}',
    b'{"text": "a", "n": NaN}',
    b'{"text": "a", "n": -Infinity}',
    b'{"text": "a", "n": 1e400}',
    b'{"text": "a", "n": 18446744073709551616}',
    b'{"text": "a", "n": ' + 4000 * b"9" + b"}",
    b'{"text": "a", "n": ' + 5000 * b"9" + b"}",
    b'{"text": 18446744073709551616}',
    b'{"text": 1.5}',
    b'{"text": null}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "inner": {"text": "b"}}',
    b'{"inner": {"text": "b"}}',
    b'{"text": "a", "text": 1}',
    b'{"text": "a \\"text\\" b"}',
    b'{"te\\u0078t": "a", "text": "b"}',
    b'{"\\u0074\\u0065\\u0078\\u0074": "a", "te\\u0078t": "b"}',
    b'{"te\\u0078t": "a", "inner": {"text": "b"}}',
    b'{"text": "te\\u0078t", "te\\u0058t": "b"}',
    b'{"text": "a\x00"}',
    b'{"text": "a\\u0000"}',
    b'{"text": "\xff"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "a",}',
    b'{"text": "a"} {}',
    b'{"text": 01}',
    b"{'text': 'a'}",
    b"\xef\xbb\xbf\xef\xbb\xbf{}",
    b'[{"text": "a"}]',
    b'{"a": ' + 3000 * b"[" + 3000 * b"]" + b', "text": "a"}',
]


def check_against_json(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    documents, report = read(path)
    judged = [judged_by_json(line) for line in lines]
    assert [("text", d.text) for d in documents] == [j for j in judged if isinstance(j, tuple)]
    assert report.dropped == Counter(j for j in judged if isinstance(j, str))


def test_json_decides_what_a_line_means(tmp_path):
    check_against_json(tmp_path / "a.jsonl", STRANGE_LINES)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "a", "b"]), inner),
    max_leaves=6,
)


@given(
    st.lists(JSON_VALUES, min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 200),
    st.binary(max_size=3),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_decides_what_damaged_lines_mean(tmp_path, values, is_ascii, place, damage):
    lines = [json.dumps(value, ensure_ascii=is_ascii) for value in values]
    lines = [line.encode("utf-8", "surrogatepass") for line in lines]
    damage = damage.replace(b"\n", b"").replace(b"\r", b"")
    lines[0] = lines[0][:place] + damage + lines[0][place:]
    kept = [line for line in lines if line.strip() and not line.isspace()]
    judged = [judged_by_json(line) for line in kept]
    # A document without text is dropped for another reason, and a mark in front taken away.
    if any(isinstance(j, tuple) and not j[1].strip() for j in judged) or lines[0][:1] == b"\xef":
        return
    if kept:
        check_against_json(tmp_path / "a.jsonl", kept)
