"""Each rule with a text just inside and one just outside of it."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.documents import embedded_corpus
from data_prep.quality import (
    _repeated_ngram_characters,
    c4_lines,
    gopher_failure,
    repetition_failure,
)

SPEECHES = [path.read_text() for path in sorted(Path(embedded_corpus()).glob("*.txt"))]
MEAN = "words of %.1f characters on average, 3 to 10 are kept"
GOOD = "the house of words that people have built with stones and wood near here " * 4


def lines(count, other, text="the word of a line that is good enough to be kept"):
    return "\n".join([text] * (10 - count) + [other] * count)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (GOOD, None),
        (" ".join(["the", "of"] + ["word"] * 48), None),
        (" ".join(["the", "of"] + ["word"] * 47), "49 words, 50 to 100000 are kept"),
        ("", "0 words, 50 to 100000 are kept"),
        ("the of word " * 33_334, "100002 words, 50 to 100000 are kept"),
        ("the of " + "be to " * 30, MEAN % 2.0),
        (
            "the of " + "extraordinary " * 60,
            MEAN % 12.7,
        ),
        (GOOD + "#" * 5, None),
        (GOOD + "#" * 7, "12% hash signs a word, 10% at most"),
        (GOOD + "... " * 3 + "\u2026 " * 4, r"11% ellipses a word, 10% at most"),
        (lines(9, "- the point of some list with exactly twelve words in it"), None),
        (
            lines(10, "\u2022 the point of some list with exactly twelve words in it"),
            "100% of the lines begin with a bullet, 90% at most",
        ),
        (lines(3, "the end of a line that is left open and long..."), None),
        (
            lines(4, "the end of a line that is left open and long\u2026"),
            "40% of the lines end in an ellipsis, 30% at most",
        ),
        (GOOD + "1234 " * 14, None),
        (GOOD + "1234 " * 15, "79% of the words have a letter, 80% at least"),
        ("The word " + "stone " * 60 + "OF", None),
        ("The word " + "stone " * 60, "1 of 8 stop words, 2 at least"),
    ],
)
def test_gopher_rules(text, failure):
    assert gopher_failure(text) == failure


NUMBERS = [f"number{n}" for n in range(1000)]


def distinct(count, start=0):
    return " ".join(NUMBERS[start : start + count])


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (distinct(100), None),
        ("", None),
        ("\n".join(distinct(9, 9 * n) for n in range(7)) + "\nx" * 4, None),
        (
            "\n".join(distinct(9, 9 * n) for n in range(6)) + "\nx" * 5,
            "36% of the lines are repeated, 30% at most",
        ),
        (
            "\n".join([distinct(12, n * 12) for n in range(6)] + [distinct(12)] * 2),
            "23% of the characters are in repeated lines, 20% at most",
        ),
        (
            # Few of the lines, but a third of the paragraphs.
            "\n\n".join(["\n".join(NUMBERS[9 * n : 9 * n + 9]) for n in range(10)] + ["a"] * 6),
            "31% of the paragraphs are repeated, 30% at most",
        ),
        (
            "\n\n".join([distinct(30, 30 * n) + "\n" + distinct(3) for n in range(5)]),
            "40% of the lines are repeated, 30% at most",
        ),
    ],
)
def test_repetition_rules(text, failure):
    assert repetition_failure(text) == failure


@pytest.mark.parametrize("size", range(2, 11))
def test_repeated_ngrams_are_found_at_their_limit(size):
    phrase = distinct(size, 900)
    limits = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    length = sum(map(len, phrase.split()))
    for repetitions in range(2, 12):
        parts = [f"{distinct(20, 20 * n)} {phrase}" for n in range(repetitions)]
        text = " ".join(parts)
        share = repetitions * length / len(text)
        found = repetition_failure(text)
        # A long phrase holds repeated shorter ones, whose limits are higher: its own fails first.
        top = repetitions * sum(map(len, phrase.split()[:4])) / len(text)
        expected = share > limits[size] or (size > 4 and top > limits[4])
        assert (found is not None) == expected, (repetitions, share, found)


def test_a_word_in_two_ngrams_counts_once():
    words = ["abcde"] * 40
    assert _repeated_ngram_characters(words, 5) == 200
    assert _repeated_ngram_characters([*"abcdeXabcdefYabcdef"], 5) == 17
    assert _repeated_ngram_characters([*"abcdefg"], 5) == 0


def test_c4_keeps_lines_that_read_like_sentences():
    text = "\n".join(
        [
            "First line of three words.[1][citation needed]",
            "A heading",
            "Too short.",
            "He said that it was good. And then it was better!",
            "Please enable JavaScript to see this page.",
            "By going on you accept the Terms of Use of this page.",
            "and so it goes on...",
            "",
            'She asked: "is this the fifth one?"',
            f"Here is {'x' * 1001} to break it.",
            "That is the fifth sentence of all.",
        ]
    )
    kept = c4_lines(text)
    assert kept.text == "\n".join(
        [
            "First line of three words.",
            "He said that it was good. And then it was better!",
            'She asked: "is this the fifth one?"',
            "That is the fifth sentence of all.",
        ]
    )
    assert kept.removed == {
        "line without an end mark removed": 2,
        "line of few words removed": 1,
        "line about JavaScript removed": 1,
        "line about terms of use removed": 1,
        "line with an endless word removed": 1,
    }
    assert kept.failure == ""


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("One is here. " * 4, "4 sentences in lines that are kept, 5 at least"),
        ("One is here. " * 5 + "{", "holds a curly bracket"),
        ("One is Lorem Ipsum. " * 5, 'holds "lorem ipsum"'),
        ("", "0 sentences in lines that are kept, 5 at least"),
    ],
)
def test_c4_drops_pages(text, failure):
    kept = c4_lines(text)
    assert (kept.text, kept.failure) == (None, failure)


def test_speeches_are_good_text():
    found = Counter(gopher_failure(text) or repetition_failure(text) for text in SPEECHES)
    assert found == {None: len(SPEECHES)}


@given(st.text(max_size=300))
def test_any_text_gets_an_answer(text):
    for rule in (gopher_failure, repetition_failure):
        assert rule(text) is None or "%" in rule(text) or "words" in rule(text)
    kept = c4_lines(text)
    assert (kept.text is None) == bool(kept.failure)
