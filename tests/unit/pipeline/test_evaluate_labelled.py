"""Labelled files: what is read from them, and what is said of bad ones."""

import json

import pytest

from data_prep.errors import UserError
from pipeline.evaluate.labelled import (
    Columns,
    LabelledText,
    TaggedSentence,
    read_sentences,
    read_texts,
    task_kind,
)


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_jsonl(write):
    path = write("a.jsonl", '{"q": "x", "p": "y", "c": 1}\n\n{"q": "", "p": "z", "c": true}\n')
    assert read_texts(path, Columns("q", "c", "p")) == [
        LabelledText(1, "x", "y", "1"),
        LabelledText(3, "", "z", "true"),
    ]


def test_csv_has_quotes_and_lines_within_them(write):
    path = write("a.csv", '\ufefftext,label\r\n"one, ""two""\r\nthree",a\r\n\r\nfour,b\r\n')
    assert read_texts(path, Columns()) == [
        LabelledText(2, 'one, "two"\nthree', None, "a"),
        LabelledText(5, "four", None, "b"),
    ]


def test_tsv_has_no_quotes(write):
    path = write("a.tsv", 'label\ttext\na\t"unclosed, he said\nb\tx\n')
    assert [e.text for e in read_texts(path, Columns())] == ['"unclosed, he said', "x"]


def test_conll(write):
    text = "-DOCSTART- -X- O\n\nNew NNP B-LOC\nYork NNP I-LOC\n  \nyes UH O\n"
    assert read_sentences(write("a.conll", text)) == [
        TaggedSentence(3, ("New", "York"), ("B-LOC", "I-LOC"), 1),
        TaggedSentence(6, ("yes",), ("O",), 1),
    ]


def test_conll_with_tabs_keeps_spaces_in_tokens(write):
    path = write("a.bio", "New York\tLOC\r\n\u00a0\tO\r\n")
    with pytest.raises(UserError, match="line 2"):
        read_sentences(path)
    path = write("a.bio", "New York\tLOC\r\nis\tO\r\n")
    assert read_sentences(path)[0].words == ("New York", "is")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: holds no examples"),
        ("a.csv", "text,label\n", r"a\.csv: holds no examples"),
        ("a.txt", "x", r"not a classification format '.txt'; accepted: .jsonl .csv .tsv"),
        ("a.jsonl", '{"text": "x"}', r"line 1: no column 'label'; there are text \(--text-column"),
        ("a.csv", "txt,label\nx,1\n", r"line 2: no column 'text'; there are txt, label"),
        ("a.csv", "text,text,label\nx,y,1\n", r"line 1: a column is named twice"),
        ("a.csv", "text,label\nx,1\nx\n", r"line 3: 1 fields, but the header has 2: text, label"),
        ("a.csv", 'text,label\nx,"1\n', r"line 3: unexpected end of data|line 2: unexpected end"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"', r"line 2: not JSON"),
        ("a.jsonl", "[1]", r"line 1: '\[1\]' is not a JSON object"),
        ("a.jsonl", '{"text": 5, "label": 1}', r"line 1: text is 5, which is no text"),
        ("a.jsonl", r'{"text": "\ud800", "label": 1}', r"text is '\\ud800', which is no text"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', r"label is 0.5; a label is a text or an int"),
        ("a.jsonl", '{"text": "x", "label": null}', r"label is None; a label is"),
        ("a.tsv", "text\tlabel\nx\t\n", r"line 2: label is ''; a label is"),
        ("a.csv", b"text,label\n\xff,1\n", r"line 2: not UTF-8 text \(byte 0 of the line\)"),
    ],
)
def test_bad_classification_files(write, name, content, message):
    with pytest.raises(UserError, match=message):
        read_texts(write(name, content), Columns())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.conll: holds no tagged tokens"),
        ("-DOCSTART- O\n\n", r"holds no tagged tokens"),
        ("one\n", r"line 1: 'one' is no token and tag in 2 columns"),
        ("a X\nb Y Z\n", r"line 2: 'b Y Z' is no token and tag in 2 columns"),
        ("a\t\n", r"line 1: 'a\\t' is no token and tag"),
        (b"a X\n\xe9 Y\n", r"line 2: not UTF-8"),
    ],
)
def test_bad_tagging_files(write, content, message):
    with pytest.raises(UserError, match=message):
        read_sentences(write("a.conll", content))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: cannot be read: No such file"):
        read_texts(tmp_path / "none.jsonl", Columns())


def test_task_by_suffix(tmp_path):
    assert task_kind(tmp_path / "a.JSONL", None) == "classification"
    assert task_kind(tmp_path / "a.iob2", None) == "tagging"
    assert task_kind(tmp_path / "a.tsv", "tagging") == "tagging"
    with pytest.raises(UserError, match=r"a.txt: cannot tell the task .* give --kind tagging"):
        task_kind(tmp_path / "a.txt", None)


def test_labels_of_every_kind_are_text(write):
    rows = [{"text": "x", "label": label} for label in (" a ", 3, False)]
    path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert [e.label for e in read_texts(path, Columns())] == ["a", "3", "false"]
