import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import word_encoding
from data_prep.cleaning import CHUNK_BYTES
from data_prep.documents import embedded_corpus
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer
from data_prep.word_encoding import BulkEncoder, splits_at_spaces

SPEECHES = [path.read_text() for path in sorted(Path(embedded_corpus()).glob("*.txt"))]
# What normalization turns into spaces, removes, joins or spells anew.
ODD = (
    "a\u00a0b \u0301c \u00b4 \u200b \u3000x\u2028y \ufb01n \u00bd \uff21\uff22 e\u0301 \u1100\u1161"
    " \u2581z x\x0by \x85"
)
CHARACTERS = st.sampled_from(" \t\nabcxyz.,[]MASK" + ODD) | st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    lines = [line for text in SPEECHES[:8] for line in text.splitlines()]
    train_tokenizer([*lines, ODD], folder, TrainingOptions(vocab_size=2000))
    return Tokenizer.load(folder)


def by_words(tokenizer: Tokenizer, text: str) -> list[int]:
    """The definition: SentencePiece itself, a word at a time."""
    words = text.replace("\t", " ").replace("\n", " ").split(" ")
    return [value for word in words for value in tokenizer.encode(word)]


def lists(encoded) -> list[list[int]]:
    ends = encoded.text_ends.tolist()
    return [encoded.ids[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]


def test_a_text_is_encoded_word_by_word(tokenizer):
    encoder = BulkEncoder(tokenizer)
    assert encoder.encodes_words
    for _ in range(2):  # with an empty cache and with a full one
        encoded = encoder.encode(SPEECHES)
        assert encoded.ids.dtype == np.uint32
        assert lists(encoded) == [by_words(tokenizer, text) for text in SPEECHES]


def test_words_have_the_pieces_that_they_have_in_a_text_but_for_ties(tokenizer):
    paragraphs = [line for text in SPEECHES for line in text.splitlines() if line]
    ours = lists(BulkEncoder(tokenizer).encode(paragraphs))
    whole = tokenizer.encode_batch(paragraphs)
    differ = [(a, b) for a, b in zip(ours, whole, strict=True) if a != b]
    assert len(differ) < 0.01 * len(paragraphs)
    for word_ids, text_ids in differ:
        scores = [sum(tokenizer.scores(ids)) for ids in (word_ids, text_ids)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
        assert tokenizer.decode(word_ids) == tokenizer.decode(text_ids)


@given(st.lists(TEXTS, max_size=5))
def test_any_texts_are_encoded_word_by_word(tokenizer, texts):
    assert lists(BulkEncoder(tokenizer).encode(texts)) == [by_words(tokenizer, t) for t in texts]


def test_the_ids_depend_on_no_batch_and_no_cache(tokenizer, monkeypatch):
    expected = lists(BulkEncoder(tokenizer).encode(SPEECHES))
    forgetful = BulkEncoder(tokenizer, cache_words=50)
    assert [lists(forgetful.encode([text]))[0] for text in SPEECHES[:4]] == expected[:4]
    monkeypatch.setattr(word_encoding, "BATCH_CHARACTERS", 1000)
    assert lists(BulkEncoder(tokenizer).encode(SPEECHES)) == expected


def test_a_full_cache_starts_afresh(tokenizer, monkeypatch):
    encoded = []
    encode_batch = Tokenizer.encode_batch

    def watch(self, words):
        encoded.append(list(words))
        return encode_batch(self, words)

    monkeypatch.setattr(Tokenizer, "encode_batch", watch)
    encoder = BulkEncoder(tokenizer, cache_words=4)
    for text in ("one two", "two one", "three four", "one", "one five"):
        encoder.encode([text])
    # Four words fill it, so that the next look-up begins with none and "one" is new again.
    assert encoded == [["one", "two"], ["three", "four"], ["one"], ["five"]]


def test_a_word_longer_than_a_chunk_is_cut(tokenizer):
    word = "abc" * CHUNK_BYTES
    parts = [word[i : i + CHUNK_BYTES] for i in range(0, len(word), CHUNK_BYTES)]
    expected = tokenizer.encode("x") + [i for part in parts for i in tokenizer.encode(part)]
    assert lists(BulkEncoder(tokenizer).encode([f"x {word}", ""])) == [expected, []]


def test_nothing_gives_nothing(tokenizer):
    encoded = BulkEncoder(tokenizer).encode([])
    assert (encoded.ids.size, encoded.text_ends.size) == (0, 0)
    assert lists(BulkEncoder(tokenizer).encode(["", " \n\t ", "\u200b"])) == [[], [], []]


def test_a_lone_surrogate_is_refused_by_name(tokenizer):
    with pytest.raises(UnicodeEncodeError, match="udc80"):
        BulkEncoder(tokenizer).encode(["fine", "a \udc80 b"])


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False},
        {"normalization_rule_name": "identity"},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["of the"]},
    ],
)
def test_a_model_whose_pieces_are_not_those_of_words_encodes_chunks(train_model, options):
    lines = ["a b ab a b of the a b"] * 50 + ["tab\tnew"]
    model = train_model(lines, vocab_size=40, hard_vocab_limit=False, **options)
    tokenizer = Tokenizer(model)
    assert not splits_at_spaces(tokenizer)
    texts = ["a b  of the\nab", "", " x\ty "]
    assert lists(BulkEncoder(tokenizer).encode(texts)) == tokenizer.encode_batch(texts)


def test_a_failure_leaves_no_word_without_ids(tokenizer, monkeypatch):
    encoder = BulkEncoder(tokenizer)
    encoder.encode(["known words"])

    def fail(texts):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode_batch", fail)
        with pytest.raises(MemoryError):
            encoder.encode(["unknown words"])
    assert gc.isenabled()
    assert lists(encoder.encode(["unknown known"])) == [by_words(tokenizer, "unknown known")]


def test_the_collector_is_left_as_it_was(tokenizer):
    gc.disable()
    try:
        BulkEncoder(tokenizer).encode(["some words"])
        assert not gc.isenabled()
    finally:
        gc.enable()
