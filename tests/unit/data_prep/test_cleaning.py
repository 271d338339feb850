import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning import (
    CHUNK_BYTES,
    CleaningOptions,
    clean_document,
    repair_text,
    split_long,
)
from data_prep.documents import Document
from data_prep.errors import UserError
from data_prep.read_report import ReadReport
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer

any_text = st.text(
    st.one_of(
        st.characters(), st.sampled_from("\x00\x07\t\n\r\x0b\x0c\x1f\x7f\x85\x9f\ud800\udfff")
    )
)
wide_text = st.text(st.sampled_from("ab \t\n\u00e9\u20ac\U0001f600\u2003\ud800"), max_size=200)


@given(any_text)
def test_a_repaired_text_is_text(text):
    repaired = repair_text(text)
    repaired.text.encode("utf-8")
    left = {c for c in repaired.text if unicodedata.category(c) in ("Cc", "Cs")}
    assert left <= {"\t", "\n"}
    assert repair_text(repaired.text) == type(repaired)(repaired.text, {})


@given(any_text)
def test_repair_loses_nothing_else(text):
    line_ends = str.maketrans(dict.fromkeys("\r\x0b\x0c\x85", "\n"))
    expected = text.replace("\r\n", "\n").translate(line_ends)
    kept = [c for c in expected if c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cs")]
    repaired = repair_text(text)
    assert repaired.text == "".join(kept)
    assert sum(repaired.removed.values()) == len(expected) - len(kept)


def test_repair_counts_by_class():
    repaired = repair_text("a\x00\x00b\x1bc\ud800d\ufeff\r\ne\rf\u2028g")
    assert repaired.text == "abcd\ufeff\ne\nf\u2028g"
    assert repaired.removed == {
        "NUL character removed": 2,
        "control character removed": 1,
        "lone surrogate removed": 1,
    }


def test_cleaning_is_accounted_for_in_the_report():
    report = ReadReport()
    document = Document("\x00 abc \x00", "a.txt", "line 3")
    kept = clean_document(document, CleaningOptions(min_characters=3), report)
    assert kept == Document(" abc ", "a.txt", "line 3")
    assert clean_document(document, CleaningOptions(min_characters=4), report) is None
    assert report.notes == {"NUL character removed": 4}
    assert report.dropped == {"too short": 1}
    assert "a.txt: line 3: too short (3 characters, 4 are asked for)" in report.lines()


@given(any_text)
def test_a_document_is_repaired_like_its_text(text):
    report = ReadReport()
    kept = clean_document(Document(f"ab {text} c", "a", ""), CleaningOptions(), report)
    repaired = repair_text(f"ab {text} c")
    assert kept is not None
    assert kept.text == repaired.text
    assert report.notes == repaired.removed
    assert kept.utf8 == repaired.text.encode()


@pytest.mark.parametrize("character", [chr(n) for n in (*range(32), *range(127, 160), 0xD800)])
def test_every_control_character_of_a_document_is_seen(character):
    kept = clean_document(Document(f"a{character}b", "a", ""), CleaningOptions(), ReadReport())
    assert kept is not None
    line_end = "\n" if character in "\r\x0b\x0c\x85" else ""
    assert kept.text == f"a{character if character in chr(9) + chr(10) else line_end}b"


def test_a_text_of_nothing_but_control_characters_is_dropped():
    report = ReadReport()
    assert clean_document(Document("\x00\x01 ", "a", ""), CleaningOptions(), report) is None
    assert report.dropped == {"too short": 1}


def test_a_wrong_option_is_refused():
    with pytest.raises(UserError, match="least number of characters is 0; it must be 1 or more"):
        CleaningOptions(min_characters=0)


@given(wide_text, st.integers(4, 30))
def test_chunks_joined_are_the_text(text, limit):
    chunks = split_long(text, limit)
    assert "".join(chunks) == text
    assert all(0 < len(chunk.encode("utf-8", "surrogatepass")) <= limit for chunk in chunks)


@given(wide_text, st.integers(4, 30))
def test_chunks_are_the_longest_that_end_behind_white_space(text, limit):
    def size(piece: str) -> int:
        return len(piece.encode("utf-8", "surrogatepass"))

    # The definition in characters, one step at a time.
    expected, rest = [], text
    while size(rest) > limit:
        fitting = [n for n in range(1, len(rest)) if size(rest[:n]) <= limit]
        behind_space = [n for n in fitting if rest[n - 1] in " \t\n"]
        cut = max(behind_space or fitting)
        expected.append(rest[:cut])
        rest = rest[cut:]
    assert split_long(text, limit) == expected + [rest] * bool(rest)


def test_the_chunk_limit_is_the_format():
    assert CHUNK_BYTES == 262_144
    words = "word " * 200_000
    assert [len(chunk) for chunk in split_long(words)] == [262_140, 262_140, 262_140, 213_580]
    assert [len(chunk) for chunk in split_long("\u20ac" * 100_000)] == [87_381, 12_619]
    assert [len(chunk) for chunk in split_long("x" * 50_000_000)] == [262_144] * 190 + [192_640]


def test_a_limit_below_a_character_is_a_mistake():
    with pytest.raises(ValueError, match="limit 3 is shorter than a character"):
        split_long("text", 3)


def test_encoding_in_chunks_is_encoding_the_whole(tmp_path):
    from data_prep.tokenizer import Tokenizer

    text = "".join(f"word{n * n} and, {n} -- \u00e9tude\n" for n in range(3000))
    train_tokenizer([text], tmp_path / "tokenizer", TrainingOptions(vocab_size=400))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    pieces = [piece for ids in tokenizer.encode_batch(split_long(text, 777)) for piece in ids]
    assert tokenizer.decode(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert len(pieces) == len(tokenizer.encode(text))
