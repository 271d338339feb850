"""Evaluation text in a corpus: all of it is found, nothing else, and the place is told."""

import json
import random
from pathlib import Path

import pytest

from data_prep import decontamination
from data_prep.decontamination import Evaluation, read_evaluation
from data_prep.dedup import DedupOptions, deduplicate
from data_prep.errors import UserError
from data_prep.word_hashes import hash_texts


def words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def write_examples(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text, "label": 1}) + "\n" for text in texts))


def removed_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]


def test_every_planted_run_is_found_and_no_other_document(tmp_path, inline_executor, jsonl):
    rng = random.Random(0)
    examples = [words(rng.randint(13, 60), seed) for seed in range(60)]
    write_examples(tmp_path / "eval.jsonl", [" ".join(example) for example in examples])
    texts, planted = [], {}
    for number in range(600):
        text = words(rng.randint(20, 120), 1000 + number)
        example = examples[number % 60]
        start = rng.randrange(len(example) - 12)
        if number % 3 == 0:
            run = [word.upper() + rng.choice(["", ",", "!"]) for word in example[start:][:13]]
            place = rng.randrange(len(text))
            text[place:place] = run
            planted[number + 1] = start
        elif number % 3 == 1:
            text[5:5] = example[start:][:12]
        texts.append(" ".join(text))
    jsonl(tmp_path / "corpus.jsonl", texts)
    options = DedupOptions(evaluation_files=(str(tmp_path / "eval.jsonl"),))
    report = deduplicate([str(tmp_path / "corpus.jsonl")], tmp_path / "d", options, inline_executor)
    removed = removed_of(tmp_path / "d")
    assert {int(entry["place"].split()[1]) for entry in removed} == set(planted)
    assert report.decisions.values["removed"]["evaluation overlap"] == 200
    for entry in removed:
        number = int(entry["place"].split()[1])
        example = examples[(number - 1) % 60]
        assert entry["reason"] == "evaluation overlap"
        assert entry["evaluation_file"] == str(tmp_path / "eval.jsonl")
        assert entry["evaluation_place"] == f"line {(number - 1) % 60 + 1}"
        assert entry["ngram"] == " ".join(example[planted[number] :][:13])


def test_a_contaminated_document_takes_no_duplicate_with_it(tmp_path, inline_executor, jsonl):
    run, rest = words(13, 1), words(200, 2)
    texts = [" ".join([*rest, *run]), " ".join(rest), " ".join([*rest, "end"])]
    jsonl(tmp_path / "corpus.jsonl", texts)
    write_examples(tmp_path / "eval.jsonl", [" ".join(run)])
    options = DedupOptions(evaluation_files=(str(tmp_path / "eval.jsonl"),))
    deduplicate([str(tmp_path / "corpus.jsonl")], tmp_path / "d", options, inline_executor)
    found = [
        (entry["place"], entry["reason"], entry.get("kept_place"))
        for entry in removed_of(tmp_path / "d")
    ]
    assert found == [("line 1", "evaluation overlap", None), ("line 3", "near duplicate", "line 2")]


def test_fields_formats_and_short_examples(tmp_path):
    write_examples(tmp_path / "a.jsonl", [" ".join(words(20, 1)), "too short"], "question")
    write_examples(tmp_path / "b.jsonl", [" ".join(words(15, 2))], "context")
    (tmp_path / "c.txt").write_text(" ".join(words(14, 3)))
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.txt")]
    evaluation = read_evaluation(names, ["question", "context"])
    assert evaluation.ngrams_N.size == 8 + 3 + 2
    assert evaluation.short_examples == 1
    evaluation.save(tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert loaded.sha256 == evaluation.sha256
    for seed, count, place in ((1, 20, "line 1"), (2, 15, "line 1"), (3, 14, "")):
        texts = ["nothing here", " ".join([*words(9, 9), *words(count, seed)])]
        (overlap,) = loaded.find(hash_texts(texts))
        assert (overlap.document, overlap.first_word, overlap.place) == (1, 9, place)


def test_an_example_without_words_in_common_finds_nothing(tmp_path):
    write_examples(tmp_path / "a.jsonl", [" ".join(words(20, 1))])
    evaluation = read_evaluation([str(tmp_path / "a.jsonl")], ["text"])
    texts = [" ".join(words(500, seed)) for seed in range(2, 20)] + ["", "short"]
    assert list(evaluation.find(hash_texts(texts))) == []
    assert list(evaluation.find(hash_texts([]))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "too short"}\n', "holds no text of 13 words or more in the fields text"),
        ('{"body": "a"}\n', "name its fields with --decontaminate-field"),
        ('{"text": "cut o\n', "line 1: invalid JSON"),
        ('{"text": 3}\n', "line 1: text is not a string"),
    ],
)
def test_an_evaluation_file_that_finds_nothing_is_refused(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        read_evaluation([str(tmp_path / "a.jsonl")], ["text"])
    assert f"--decontaminate {tmp_path / 'a.jsonl'}: " in str(caught.value)
    assert message in str(caught.value)


def test_a_corpus_in_the_place_of_an_evaluation_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decontamination, "MAX_NGRAMS", 10)
    write_examples(tmp_path / "a.jsonl", [" ".join(words(30, 1))])
    with pytest.raises(UserError) as caught:
        read_evaluation([str(tmp_path / "a.jsonl")], ["text"])
    assert "more than 10 runs of 13 words" in str(caught.value)


@pytest.mark.parametrize("length", [0, 101])
def test_an_impossible_length_is_refused(length, tmp_path):
    with pytest.raises(UserError) as caught:
        read_evaluation([str(tmp_path)], ["text"], length)
    assert f"--ngram-words {length}: must lie between 1 and 100" in str(caught.value)
