"""Word hashes against words found one character at a time, in plain Python."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import word_hashes
from data_prep.word_hashes import hash_texts, ngram_hashes

ODD_TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(codec=None), max_size=30),  # lone surrogates, too
    st.text("ab\u0301\u200d \n\x00\ud800,é中한ก", max_size=40),
)


def fold(character: str) -> str:
    parts = unicodedata.normalize("NFKD", character)
    base = "".join(part for part in parts if not unicodedata.combining(part)).casefold()
    return base if len(base) == 1 else character


def is_joiner(character: str) -> bool:
    code = ord(character)
    ranges = ((0x300, 0x36F), (0x200B, 0x200D), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF))
    ranges += ((0xE0100, 0xE01EF),)
    return code in (0xAD, 0x2060) or any(low <= code <= high for low, high in ranges)


def stands_alone(character: str) -> bool:
    blocks = "0e00-0eff 1000-109f 1780-17ff 3040-30ff 31f0-31ff 3400-4dbf 4e00-9fff f900-faff"
    ranges = [block.split("-") for block in [*blocks.split(), "20000-323ff"]]
    return any(int(low, 16) <= ord(character) <= int(high, 16) for low, high in ranges)


def plain_words(text: str) -> list[str]:
    words, word = [], ""
    for character in (c for c in text if not is_joiner(c)):
        is_letter = character.isalnum() or unicodedata.category(character)[0] == "M"
        if is_letter and not stands_alone(character):
            word += fold(character)
            continue
        words += [word] if word else []
        words += [fold(character)] if is_letter else []
        word = ""
    return words + ([word] if word else [])


def words_of(texts: list[str]) -> list[list[int]]:
    hashed = hash_texts(texts)
    parts = np.split(hashed.words_W, hashed.ends_D[:-1])
    return [part.tolist() for part in parts[: len(texts)]]


def same_pattern(hashed: list[list[int]], plain: list[list[str]]) -> bool:
    """Whether equal words have equal hashes, and others others."""
    assert [len(words) for words in hashed] == [len(words) for words in plain]
    pairs = {pair for lists in zip(hashed, plain, strict=True) for pair in zip(*lists, strict=True)}
    return len(pairs) == len({h for h, _ in pairs}) == len({w for _, w in pairs})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Fellow citizens", "fellow, CITIZENS!"),
        ("caf\u00e9", "cafe\u0301"),
        ("don\u2019t", "don't"),
        ("co\u00adoperate", "cooperate"),
        ("\uff21\uff22", "ab"),
        ("a\u2028b", "a\tb"),
    ],
)
def test_what_counts_as_the_same_words(one, other):
    first, second = words_of([one, other])
    assert first == second


@pytest.mark.parametrize(
    ("one", "other"), [("ab", "ba"), ("a b", "ab"), ("aa", "a"), ("1 2", "12"), ("a", "b")]
)
def test_what_does_not(one, other):
    first, second = words_of([one, other])
    assert first != second


def test_scripts_without_spaces_have_a_word_a_character():
    assert len(words_of(["\u4e2d\u6587\u5b57 and\u4e2dmore"])[0]) == 6
    assert len(words_of(["\ud55c\uad6d\uc5b4 \ub9d0"])[0]) == 2  # Korean has spaces
    assert len(words_of(["\U00020000\U00020001"])[0]) == 2


@given(st.lists(ODD_TEXTS, max_size=6))
@settings(max_examples=150, deadline=None)
def test_words_are_those_found_one_character_at_a_time(texts):
    assert same_pattern(words_of(texts), [plain_words(text) for text in texts])


@given(st.lists(ODD_TEXTS, max_size=5))
@settings(max_examples=50, deadline=None)
def test_neighbours_do_not_matter(texts):
    together = hash_texts(texts)
    for number, text in enumerate(texts):
        alone = hash_texts([text])
        assert alone.words_W.tolist() == words_of(texts)[number]
        assert (alone.digests_D2[0] == together.digests_D2[number]).all()


def test_long_texts_are_read_in_chunks(monkeypatch):
    text = " ".join(f"word{n}" for n in range(60_000))
    assert len(text) > 2 * 262_144
    hashed = hash_texts(["before", text, "behind", text + "."])
    assert np.diff(hashed.ends_D, prepend=0).tolist() == [1, 60_000, 1, 60_000]
    assert same_pattern(words_of([text]), [plain_words(text)])
    monkeypatch.setattr(word_hashes, "_BLOCK_CHARACTERS", 100)
    again = hash_texts(["before", text, "behind", text + "."])
    assert (again.words_W == hashed.words_W).all()
    assert (again.digests_D2 == hashed.digests_D2).all()
    assert len({tuple(digest) for digest in hashed.digests_D2.tolist()}) == 4


def test_digests_ignore_white_space_and_case_but_not_symbols():
    texts = ["A b", "a\n\nB ", "a+b", "a-b", "a + b", "ab", "", " ", "+", "a +"]
    digests = [tuple(digest) for digest in hash_texts(texts).digests_D2.tolist()]
    classes = [0, 0, 1, 2, 1, 3, 4, 4, 5, 6]
    pairs = set(zip(digests, classes, strict=True))
    assert len(pairs) == len({digest for digest, _ in pairs}) == 7


def test_values_never_change():
    hashed = hash_texts(["Fellow citizens", "\u00e9t\u00e9"])
    assert hashed.words_W.tolist() == [
        13091092281462136181,
        12992216600362968101,
        6428540392459312855,
    ]
    assert hashed.digests_D2[:, 0].tolist() == [8544715598058361166, 7921653176546928205]


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 6))
def test_ngrams_stay_within_documents(lengths, length):
    words = np.arange(sum(lengths), dtype=np.uint64) % np.uint64(7)
    ends = np.cumsum(lengths, dtype=np.int64)
    hashes, ngram_ends = ngram_hashes(words, ends, length)
    found = [part.tolist() for part in np.split(hashes, ngram_ends[:-1])] if lengths else []
    plain = []
    for part in np.split(words, ends[:-1]) if lengths else []:
        runs = range(max(0, len(part) - length + 1))
        plain.append([tuple(part[n : n + length].tolist()) for n in runs])
    assert same_pattern(found, plain)
