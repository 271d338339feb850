"""The labelled tasks that are made of the embedded corpus."""

import subprocess
import sys

import pytest

from pipeline.compare.sample_tasks import paragraphs, tagged_words, write_sample_tasks
from pipeline.evaluate.labelled import Columns
from pipeline.evaluate.tasks import read_task


def test_marks_behind_words():
    assert tagged_words('Thank you, "Mr. Speaker"--and fellow-citizens: don\'t we? [Laughter]') == [
        ("thank", "O"),
        ("you", "COMMA"),
        ("mr", "STOP"),
        ('speaker"--and', "O"),
        ("fellow-citizens", "COMMA"),
        ("don't", "O"),
        ("we", "STOP"),
        ("laughter", "O"),
    ]
    assert tagged_words("one -- two , 3.5%! and") == [
        ("one", "O"),
        ("two", "COMMA"),
        ("3.5", "STOP"),
        ("and", "O"),
    ]
    assert tagged_words('so he said, "Go."') == [
        ("so", "O"),
        ("he", "O"),
        ("said", "COMMA"),
        ("go", "STOP"),
    ]


def test_paragraphs_are_divided(tmp_path):
    write_sample_tasks(tmp_path)
    everything = list(paragraphs())
    test_share = sum(is_test for _, _, is_test in everything) / len(everything)
    assert 0.18 < test_share < 0.21
    assert {speaker for speaker, _, _ in everything} == {
        "Reagan",
        "Bush (father)",
        "Clinton",
        "Bush (son)",
        "Obama",
        "Trump",
        "Biden",
    }
    speaker = read_task(
        "classification",
        *(tmp_path / "speaker" / f"{name}.jsonl" for name in ("train", "test")),
        Columns(),
        None,
    )
    assert [example.text for example in speaker.test] == [t for _, t, test in everything if test]
    assert len(speaker.train) + len(speaker.test) == len(everything)
    punctuation = read_task(
        "tagging",
        *(tmp_path / "punctuation" / f"{name}.conll" for name in ("train", "test")),
        Columns(),
        None,
    )
    assert list(punctuation.labels) == ["COMMA", "O", "STOP"]
    assert len(punctuation.test) == len(speaker.test)
    words = [word for sentence in punctuation.test for word in sentence.words]
    assert words == [word.lower() for word in words]
    assert not any(word.endswith((",", ".", "?")) for word in words)


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_usage(arguments, tmp_path):
    command = [sys.executable, "-m", "pipeline.compare.sample_tasks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: python -m pipeline.compare.sample_tasks OUTPUT\n"
