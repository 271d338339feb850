import json
import os

import pytest

from data_prep.errors import UserError
from data_prep.read_report import ReadReport
from data_prep.source_files import find_source_files, kind_of


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def found(source, report=None) -> list[str]:
    return [file.path for file in find_source_files(str(source), report or ReadReport())]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "txt"),
        ("A.TXT", "txt"),
        ("a.b.jsonl.gz", "jsonl"),
        ("a.jsonl.zst", "jsonl"),
        ("a.txt.xz", "txt"),
        ("a.parquet", "parquet"),
        ("data-00000-of-00001.arrow", "arrow"),
        ("a.gz", None),
        ("a.ndjson", "jsonl"),
        ("a.json.gz", "json"),
        ("a.csv", "csv"),
        ("a.tsv.xz", "tsv"),
        ("a.xls", None),
        ("txt", None),
    ],
)
def test_the_name_tells_the_format(tmp_path, name, kind):
    assert kind_of(tmp_path / name) == kind


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "c/b.txt", "c/a/z.jsonl", "c/a.txt", "c/B.parquet")
    assert found("c") == ["c/B.parquet", "c/a/z.jsonl", "c/a.txt", "c/b.txt"]
    assert found("./c/") == found("c")


def test_what_is_passed_over_is_told(tmp_path):
    write(tmp_path, "a.txt", "README.md", ".hidden.txt", ".git/b.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    report = ReadReport()
    assert found(tmp_path, report) == [str(tmp_path / "a.txt")]
    assert report.notes == {"ignored file": 5}
    assert list(report.lines()) == [
        f"{tmp_path}/.git: ignored file (hidden folder)",
        f"{tmp_path}/.hidden.txt: ignored file (hidden)",
        f"{tmp_path}/README.md: ignored file (format)",
        f"{tmp_path}/dangling.txt: ignored file (No such file or directory)",
        f"{tmp_path}/pipe.txt: ignored file (not a regular file)",
    ]


def test_links_are_followed_once(tmp_path):
    write(tmp_path, "data/a.txt", "elsewhere/b.txt")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "data") == [f"{tmp_path}/data/a.txt", f"{tmp_path}/data/more/b.txt"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("**", ["a.txt", "sub/b.txt", "sub/c.jsonl"]),
        ("**/*", ["a.txt", "sub/b.txt", "sub/c.jsonl"]),
        ("s*", ["sub/b.txt", "sub/c.jsonl"]),
        ("sub/[bc].*", ["sub/b.txt", "sub/c.jsonl"]),
    ],
)
def test_a_glob_lists_each_match_once(tmp_path, pattern, names):
    write(tmp_path, "a.txt", "sub/b.txt", "sub/c.jsonl", "sub/d.xls")
    assert found(tmp_path / pattern) == [f"{tmp_path}/{name}" for name in names]


def test_a_name_with_glob_characters_is_taken_literally_if_it_exists(tmp_path):
    write(tmp_path, "a[1].txt", "a1.txt")
    assert found(tmp_path / "a[1].txt") == [f"{tmp_path}/a[1].txt"]


def test_a_saved_dataset_is_the_files_of_its_state(tmp_path):
    write(tmp_path, "d/train/data-1.arrow", "d/train/data-0.arrow", "d/train/cache-9.arrow")
    write(tmp_path, "d/dataset_dict.json", "d/train/dataset_info.json")
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
    (tmp_path / "d/train/state.json").write_text(json.dumps(state))
    report = ReadReport()
    assert found(tmp_path / "d", report) == [
        f"{tmp_path}/d/train/data-0.arrow",
        f"{tmp_path}/d/train/data-1.arrow",
    ]
    assert report == ReadReport()


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (lambda f: None, "none.txt", "source .*none.txt does not exist; accepted are .*jsonl"),
        (lambda f: write(f, "a.xls"), "a.xls", r"source .*a.xls is of no known format"),
        (lambda f: (f / "d").mkdir(), "d", "source .*/d holds no text to read; accepted are"),
        (
            lambda f: write(f, "d/a.xls", "d/b.md"),
            "d",
            r"holds no text to read \(2 other files were passed over\); accepted are",
        ),
        (lambda f: None, "*.txt", r"source .*\*.txt holds no text to read; accepted are"),
        (lambda f: (f / "l.txt").symlink_to("x"), "l.txt", "l.txt is a broken link"),
        (lambda f: os.mkfifo(f / "p.txt"), "p.txt", "p.txt is not a regular file; write its text"),
        (lambda f: write(f, "d/state.json"), "d", "state.json is not the state of a folder"),
        (
            lambda f: (
                write(f, "d/state.json"),
                (f / "d/state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}'),
            ),
            "d",
            "names the file ../../x.arrow, which is not in the folder",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(tmp_path, make, source, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        found(tmp_path / source)
