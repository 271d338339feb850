import hashlib
import json
import random
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_prep.documents import ReadOptions, ReadReport, embedded_corpus
from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_training import (
    TrainingOptions,
    _draw_sample,
    train_tokenizer,
    train_tokenizer_from_sources,
)

SMALL = TrainingOptions(vocab_size=600)


def speeches(count: int) -> list[str]:
    paths = sorted(embedded_corpus().iterdir())[:count]
    return [path.read_text(encoding="utf-8") for path in paths]


def hashes(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_the_folder_and_the_report(tmp_path):
    output = tmp_path / "new" / "tokenizer"
    report = train_tokenizer(speeches(6), output, TrainingOptions(vocab_size=2000))
    assert {path.name for path in output.iterdir()} == {
        "spm.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer"]
    tokenizer = Tokenizer.load(output)
    assert (report.num_pieces, report.vocab_size) == (2000, 2100)
    assert report.fingerprint == tokenizer.fingerprint
    assert report.text_bytes == sum(len(text.encode()) for text in speeches(6))
    assert report.trained_bytes + report.held_back_bytes == report.text_bytes
    assert report.held_back_bytes > 0
    assert 1 < report.tokens_per_word < 2.5
    assert 2 < report.bytes_per_token < 6
    assert report.unknown_rate == 0
    assert 0 <= report.byte_rate < 0.01
    assert json.loads(json.dumps(report.to_dict()))["num_pieces"] == 2000


def test_the_rates_of_the_report(tmp_path):
    # One unit of text: it is trained on and measured too.
    text = "".join(f"{n:x} " for n in range(3000)) + "\u4e2d"
    options = TrainingOptions(vocab_size=300, character_coverage=0.98)
    report = train_tokenizer([text], tmp_path / "t", options)
    ids = Tokenizer.load(tmp_path / "t").encode(text)
    assert report.held_back_bytes == report.trained_bytes == len(text.encode())
    assert report.tokens_per_word == len(ids) / 3001
    assert report.bytes_per_token == len(text.encode()) / len(ids)
    assert report.byte_rate == sum(4 <= value < 260 for value in ids) / len(ids)
    assert report.byte_rate > 0


def test_the_model_is_unigram_with_nmt_nfkc_and_byte_fallback(tmp_path):
    train_tokenizer(speeches(2), tmp_path / "t", SMALL)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "spm.model"))
    assert processor.get_piece_size() == 600
    assert [processor.is_control(n) for n in range(4)] == [True, True, True, False]
    assert processor.is_unknown(3)
    assert [processor.id_to_piece(n) for n in range(4, 260)] == [f"<0x{n:02X}>" for n in range(256)]
    assert processor.normalize("\ufb01 \uff21\u00a0\u200bx\n") == "\u2581fi\u2581A\u2581x"


def test_the_same_text_in_any_order_gives_the_same_bytes(tmp_path):
    texts = speeches(4)
    train_tokenizer(texts, tmp_path / "one", SMALL)
    train_tokenizer(iter(reversed(texts)), tmp_path / "two", SMALL)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    train_tokenizer(texts[:3], tmp_path / "three", SMALL)
    assert hashes(tmp_path / "one") != hashes(tmp_path / "three")


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(100, 500), st.randoms())
def test_the_sample_is_the_longest_run_of_hashes_that_fits(sizes, budget, rng: random.Random):
    texts = [f"{n}-".ljust(size, "x") for n, size in enumerate(sizes)]
    ordered = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
    expected, total = [], 0
    for text in ordered:
        total += len(text)
        if total > budget:
            break
        expected.append(text)
    rng.shuffle(texts)
    sample = _draw_sample(texts, budget)
    assert sample.units == expected
    assert sample.text_bytes == sum(map(len, texts))


def test_the_sample_is_bounded(tmp_path):
    report = train_tokenizer(
        speeches(6), tmp_path / "t", TrainingOptions(vocab_size=600, sample_bytes=60_000)
    )
    assert 40_000 < report.trained_bytes + report.held_back_bytes <= 60_000
    assert report.text_bytes > 100_000


def test_long_lines_are_trained_on(tmp_path):
    # SentencePiece skips what is above its limit, and then finds nothing to train on.
    train_tokenizer([speeches(1)[0].replace("\n", " ")], tmp_path / "t", SMALL)
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert len(tokenizer.encode("America and the world")) < 8


def test_sources_are_read_cleaned_and_accounted_for(tmp_path):
    lines = [json.dumps({"text": text}) for text in speeches(2)] + [
        '{"text": "\\ud800\\u0000"}',
        "{",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    read_report = ReadReport()
    train_tokenizer_from_sources(
        [str(tmp_path / "a.jsonl")], tmp_path / "t", SMALL, ReadOptions(), read_report
    )
    train_tokenizer(speeches(2), tmp_path / "direct", SMALL)
    assert hashes(tmp_path / "t") == hashes(tmp_path / "direct")
    assert read_report.dropped == {"invalid JSON": 1, "too short": 1}


def test_too_little_text_names_the_largest_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"too small for a vocabulary of 128000 pieces") as caught:
        train_tokenizer(speeches(1), tmp_path / "t", TrainingOptions())
    largest = int(re.search(r"--vocab-size (\d+)", str(caught.value))[1])
    train_tokenizer(speeches(1), tmp_path / "t", TrainingOptions(vocab_size=largest))
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(speeches(1), tmp_path / "u", TrainingOptions(vocab_size=largest + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_too_many_characters_name_the_smallest_vocabulary(tmp_path):
    with pytest.raises(UserError, match="cannot hold the characters of the text") as caught:
        train_tokenizer(speeches(3), tmp_path / "t", TrainingOptions(vocab_size=300))
    smallest = int(re.search(r"--vocab-size (\d+) or more", str(caught.value))[1])
    train_tokenizer(speeches(3), tmp_path / "t", TrainingOptions(vocab_size=smallest))


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no text to train a tokenizer on"):
        train_tokenizer([], tmp_path / "t", SMALL)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").touch()
    for train in (
        lambda: train_tokenizer(speeches(1), tmp_path / "t", SMALL),
        lambda: train_tokenizer_from_sources(
            [str(embedded_corpus())], tmp_path / "t", SMALL, ReadOptions(), ReadReport()
        ),
    ):
        with pytest.raises(UserError, match="t exists already; name a new folder"):
            train()
    assert hashes(tmp_path / "t").keys() == {"mine"}


def test_an_empty_folder_and_the_rest_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "stale").touch()
    train_tokenizer(speeches(1), tmp_path / "t", SMALL)
    assert "stale" not in hashes(tmp_path / "t")
    assert not (tmp_path / "t.partial").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 100}, "vocabulary size 100 is out of range; choose 300 to"),
        ({"vocab_size": 10**7}, "vocabulary size 10000000 is out of range"),
        ({"character_coverage": 0.5}, "character coverage 0.5 is out of range; choose 0.98 to 1"),
        ({"sample_bytes": 5}, "a sample of 5 bytes is too small; allow 16384 or more"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        TrainingOptions(**values)
