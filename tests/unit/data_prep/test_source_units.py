import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import source_units
from data_prep.documents import ReadOptions, ReadReport, Unit, plan_units, read_unit
from data_prep.errors import UserError

LINES = ReadOptions(txt_document="line")


def texts_of(units, options) -> list[str]:
    return [d.text for unit in units for d in read_unit(unit, options, ReadReport())]


def test_small_files_share_units_and_sources_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in [("a/1", 40), ("a/2", 40), ("a/3", 40), ("b/1", 10)]:
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("x" * size)
    units = plan_units(["a", "b"], ReadOptions(), target_bytes=100)
    assert [(unit.index, unit.source) for unit in units] == [(0, "a"), (1, "a"), (2, "b")]
    assert [[part.path for part in unit.parts] for unit in units] == [
        ["a/1.txt", "a/2.txt"],
        ["a/3.txt"],
        ["b/1.txt"],
    ]
    assert [unit.num_bytes for unit in units] == [80, 40, 10]


def test_a_unit_of_tiny_files_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(source_units, "_MAX_PARTS", 3)
    for n in range(7):
        (tmp_path / f"{n}.txt").touch()
    units = plan_units([str(tmp_path)], ReadOptions())
    assert [len(unit.parts) for unit in units] == [3, 3, 1]


def test_the_plan_does_not_depend_on_the_order_of_creation(tmp_path):
    plans = []
    for folder, names in [("one", "abc"), ("two", "cab")]:
        (tmp_path / folder / "data").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / "data" / f"{name}.txt").write_text(name * 50)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / folder)
            plans.append(plan_units(["data"], ReadOptions(), target_bytes=100))
    assert plans[0] == plans[1]
    assert len(plans[0]) == 2


def test_units_travel_as_json_and_pickle(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 20)
    units = plan_units([str(tmp_path)], ReadOptions(), target_bytes=64)
    assert len(units) > 2
    for unit in units:
        assert Unit.from_dict(json.loads(json.dumps(unit.to_dict()))) == unit
        assert pickle.loads(pickle.dumps(unit)) == unit


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r")), max_size=20),
    target=st.integers(1, 60),
    ended=st.booleans(),
)
def test_every_line_belongs_to_one_unit(tmp_path_factory, lines, target, ended):
    folder = tmp_path_factory.mktemp("lines")
    content = "\n".join(lines) + "\n" * ended
    (folder / "a.txt").write_bytes(content.encode())
    units = plan_units([str(folder)], LINES, target)
    [whole] = plan_units([str(folder)], LINES, 1 << 30)
    assert texts_of(units, LINES) == texts_of([whole], LINES)
    ranges = [(part.start, part.end) for unit in units for part in unit.parts]
    if len(ranges) > 1:
        assert [start for start, _ in ranges[1:]] == [end for _, end in ranges[:-1]]
        assert ranges[-1][1] == len(content.encode())
        assert all(content.encode()[start - 1] == 10 for start, _ in ranges[1:])


def test_a_long_txt_is_shared_by_units_without_loss(tmp_path):
    content = "".join(f"line {n}\n" for n in range(2000))
    (tmp_path / "a.txt").write_text(content)
    options = ReadOptions(max_document_bytes=1024)
    units = plan_units([str(tmp_path)], options, target_bytes=5000)
    assert len(units) == 4
    assert "".join(texts_of(units, options)) == content


def test_a_line_longer_than_the_target_is_one_unit(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"short\n" + b"x" * 1000 + b"\nshort\n")
    units = plan_units([str(tmp_path)], LINES, target_bytes=100)
    assert [(p.start, p.end) for unit in units for p in unit.parts] == [(0, 1007), (1007, 1013)]


def test_ranges_end_at_the_first_line_end_from_the_target_on(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"123456789\n" * 10 + b"1234\n" * 2 + b"end\n")
    units = plan_units([str(tmp_path)], LINES, target_bytes=40)
    ranges = [(p.start, p.end) for unit in units for p in unit.parts]
    assert ranges == [(0, 40), (40, 80), (80, 114)]
    units = plan_units([str(tmp_path)], LINES, target_bytes=37)
    ranges = [(p.start, p.end) for unit in units for p in unit.parts]
    assert ranges == [(0, 40), (40, 80), (80, 114)]


def test_a_compressed_file_is_one_unit_whatever_its_name(tmp_path):
    packed = gzip.compress(bytes(range(256)) * 40, compresslevel=0)
    (tmp_path / "a.txt").write_bytes(packed)
    [unit] = plan_units([str(tmp_path)], LINES, target_bytes=1000)
    [part] = unit.parts
    assert (part.start, part.end, part.num_bytes) == (0, None, len(packed))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_large_table_is_divided_into_row_groups(tmp_path, suffix):
    texts = [f"{n:03d}" * 20 for n in range(100)]
    table = pa.table({"text": texts})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    units = plan_units([str(path)], ReadOptions(), target_bytes=2000)
    ranges = [(part.start, part.end) for unit in units for part in unit.parts]
    assert [start for start, _ in ranges] == [0] + [end for _, end in ranges[:-1]]
    assert ranges[-1][1] == 10
    assert 3 <= len(units) <= 5
    assert texts_of(units, ReadOptions()) == texts
    positions = [d.position for d in read_unit(units[1], ReadOptions(), ReadReport())]
    assert positions[0] == f"row {units[1].parts[0].start * 10 + 1}"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_large_broken_table_is_planned_whole(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"not a table" * 100)
    [unit] = plan_units([str(tmp_path)], ReadOptions(), target_bytes=100)
    report = ReadReport()
    assert list(read_unit(unit, ReadOptions(), report)) == []
    assert report.dropped == {"damaged file": 1}


def test_a_file_that_two_sources_reach_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("x")
    (tmp_path / "link").symlink_to("d")
    for second in ("d/a.txt", "d/*.txt", "link", str(tmp_path / "d")):
        with pytest.raises(UserError, match=r"reached by two sources, d and .*name it once"):
            plan_units(["d", second], ReadOptions())
    with pytest.raises(UserError, match="source d is named twice"):
        plan_units(["d", "d"], ReadOptions())


def test_no_source_is_refused():
    with pytest.raises(UserError, match="no source was named"):
        plan_units([], ReadOptions())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_field": ""}, "the text field has no name; give one"),
        ({"txt_document": "paragraph"}, 'one document a "file" or a "line", not "paragraph"'),
        ({"max_document_bytes": 10}, "the document limit is 10 bytes; it must lie between 1024"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ReadOptions(**values)
