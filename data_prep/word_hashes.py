"""Texts as arrays of word hashes: what deduplication and decontamination compare.

    hashed = hash_texts(["Fellow citizens, ...", ...])
    shingles_S, ends_D = ngram_hashes(hashed.words_W, hashed.ends_D, 5)

- `hash_texts`: the words of many texts at once, each as 64 bits, and a digest of each whole text.
- `ngram_hashes`: every run of n words, as 64 bits.

What counts as equal. Characters are folded one by one: case, accents and compatibility forms go
("É" and "e" are one, "ﬁ" and other characters that fold to several stay themselves). A word is a
run of letters, digits and marks; everything else separates. A character of a script that is written
without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) is a word by itself. Joiners, soft hyphens and
combining accents are passed over. The digest is of the words, and of all other characters but white
space: a document of symbols has few words, but is no copy of every other.

All hashes are functions of the text and of the version of Unicode that Python knows
(`unicodedata.unidata_version`), nothing else. A word is the polynomial of its characters modulo
2^64, for all words at once: products with the powers of an odd base, sums between word starts,
products with the inverse powers.

Letters in names: W words, D documents, C characters, N n-grams.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cleaning import CHUNK_BYTES, split_long

Hashes = NDArray[np.uint64]
Ends = NDArray[np.int64]

_NUM_CHARACTERS = 0x110000
_BASE = 0x9E3779B97F4A7C15
_BLOCK_CHARACTERS = 1 << 16
_NUM_POWERS = _BLOCK_CHARACTERS + CHUNK_BYTES + 2
_SYMBOL, _SPACE, _PASSED_OVER, _LETTER, _WHOLE_WORD = range(5)
_WITHOUT_SPACES = (
    *((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x31F0, 0x3200)),
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32400)),
)
_UNCHANGED = (
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7B0), (0x17000, 0x18D80)),
    (0x20000, 0x32400),
)
"""Ideographs and Hangul are not folded, which saves time."""
_LETTERS_END = 0x32400
_JOINERS = (
    *((0x00AD, 0x00AE), (0x0300, 0x0370), (0x200B, 0x200E), (0x2060, 0x2061)),
    *((0xFE00, 0xFE10), (0xFEFF, 0xFF00), (0xE0100, 0xE01F0)),
)


class HashedTexts(NamedTuple):
    """The words of some texts."""

    words_W: Hashes
    """One hash a word, text after text."""
    ends_D: Ends
    """Where the words of each text end."""
    digests_D2: Hashes
    """128 bits of each text: equal for texts of the same words and the same symbols."""


class _Characters(NamedTuple):
    kinds: NDArray[np.uint8]
    letters: Hashes
    """What a character folds to, as a number; 0 for one that is in no word."""


@lru_cache(maxsize=1)
def _characters() -> _Characters:
    letters = np.arange(_NUM_CHARACTERS, dtype=np.uint64)
    kinds = np.full(_NUM_CHARACTERS, _SYMBOL, np.uint8)
    for code in range(_LETTERS_END):
        character = chr(code)
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            kinds[code] = _LETTER
        elif character.isspace():
            kinds[code] = _SPACE
    is_changed = np.ones(_LETTERS_END, bool)
    for first, end in _UNCHANGED:
        is_changed[first:end] = False
    for code in np.flatnonzero(is_changed).tolist():
        letters[code] = _fold(chr(code))
    for first, end in _WITHOUT_SPACES:
        kinds_here = kinds[first:end]
        kinds_here[kinds_here == _LETTER] = _WHOLE_WORD
    for first, end in _JOINERS:
        kinds[first:end] = _PASSED_OVER
    letters[kinds < _LETTER] = 0
    return _Characters(kinds, letters)


def _fold(character: str) -> int:
    parts = unicodedata.normalize("NFKD", character)
    base = "".join(part for part in parts if not unicodedata.combining(part)).casefold()
    return ord(base) if len(base) == 1 else ord(character)


@lru_cache(maxsize=2)
def _powers(base: int) -> Hashes:
    powers = np.full(_NUM_POWERS, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def hash_texts(texts: Sequence[str]) -> HashedTexts:
    """Hash the words of some texts.

    Args:
        texts: any strings; those above 256 KiB are read in the chunks of `cleaning.split_long`.

    Returns:
        Words, ends and digests; memory is about two bytes a byte of text, and 20 MB.
    """
    words: list[Hashes] = [np.zeros(0, np.uint64)]
    symbols: list[NDArray[np.uint32]] = [np.zeros(0, np.uint32)]
    counts_D2 = np.zeros((len(texts), 2), np.int64)
    for numbers, chunks in _blocks(texts):
        block = _read_block(chunks)
        words.append(_word_hashes(block))
        places = np.flatnonzero(block.kinds_C == _SYMBOL)
        symbols.append(block.codes_C[places])
        for column, found in enumerate((block.starts_W, places)):
            counts = np.diff(np.searchsorted(found, block.ends), prepend=0)
            np.add.at(counts_D2[:, column], numbers, counts)
    words_W, symbols_S = np.concatenate(words), np.concatenate(symbols)
    ends_D, symbol_ends_D = np.cumsum(counts_D2, axis=0).T
    digests_D2 = np.zeros((len(texts), 2), np.uint64)
    start = symbol_start = 0
    for row, end, symbol_end in zip(
        digests_D2, ends_D.tolist(), symbol_ends_D.tolist(), strict=True
    ):
        hasher = hashlib.blake2b(words_W[start:end].tobytes(), digest_size=16)
        hasher.update((end - start).to_bytes(8, "little"))
        hasher.update(symbols_S[symbol_start:symbol_end].tobytes())
        row[:] = np.frombuffer(hasher.digest(), ">u8")
        start, symbol_start = end, symbol_end
    return HashedTexts(words_W, np.ascontiguousarray(ends_D), digests_D2)


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Chunks of texts in groups of about 64 Ki characters, with the number of the text of each."""
    numbers: list[int] = []
    chunks: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        for chunk in split_long(text) or [""]:
            numbers.append(number)
            chunks.append(chunk)
            size += len(chunk) + 1
            if size >= _BLOCK_CHARACTERS:
                yield numbers, chunks
                numbers, chunks, size = [], [], 0
    if chunks:
        yield numbers, chunks


class _Block(NamedTuple):
    codes_C: NDArray[np.uint32]
    kinds_C: NDArray[np.uint8]
    starts_W: NDArray[np.intp]
    ends: Ends
    """Where the characters of each chunk end."""


def _read_block(chunks: Sequence[str]) -> _Block:
    """Take some chunks apart into characters, and find where words start."""
    joined = "\n".join(chunks).encode("utf-32-le", "surrogatepass")
    codes_C = np.frombuffer(joined, "<u4")
    ends = np.cumsum([len(chunk) + 1 for chunk in chunks]) - 1
    kinds_C = _characters().kinds.take(codes_C)
    passed_over = kinds_C == _PASSED_OVER
    if passed_over.any():
        kept = ~passed_over
        ends = _counted_before(kept, ends)
        codes_C, kinds_C = codes_C[kept], kinds_C[kept]
    starts_C = kinds_C >= _LETTER
    follows_letter = kinds_C[:-1] == _LETTER
    if kinds_C.max(initial=0) == _WHOLE_WORD:
        follows_letter &= kinds_C[1:] != _WHOLE_WORD
    starts_C[1:] &= ~follows_letter
    return _Block(codes_C, kinds_C, np.flatnonzero(starts_C), ends)


def _counted_before(mask: NDArray[np.bool_], places: Ends) -> Ends:
    return np.append(0, np.cumsum(mask))[places]


def _word_hashes(block: _Block) -> Hashes:
    if not block.starts_W.size:
        return np.zeros(0, np.uint64)
    # What separates words counts 0, so that a sum may run on to the start of the next word.
    terms_C = _characters().letters.take(block.codes_C)
    terms_C *= _powers(_BASE)[: terms_C.size]
    inverse = _powers(pow(_BASE, -1, 2**64))
    return mix(np.add.reduceat(terms_C, block.starts_W) * inverse.take(block.starts_W))


def spell_words(text: str, first: int, count: int) -> str:
    """Some words of a text as they are compared, for people to read.

    Args:
        text: the text.
        first: number of the first word, from 0.
        count: how many words.

    Returns:
        The folded words with single spaces between them.
    """
    words: list[str] = []
    for chunk in split_long(text):
        block = _read_block([chunk])
        pieces = np.split(_characters().letters.take(block.codes_C), block.starts_W)
        words += ("".join(map(chr, piece[piece > 0].tolist())) for piece in pieces[1:])
        if len(words) >= first + count:
            break
    return " ".join(words[first : first + count])


def mix(values: Hashes) -> Hashes:
    """Stir 64 bits so that each depends on all; a bijection.

    Args:
        values: any numbers.

    Returns:
        As many, none equal that were not.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def ngram_hashes(words_W: Hashes, ends_D: Ends, length: int) -> tuple[Hashes, Ends]:
    """Hash every run of some words, within documents.

    Args:
        words_W: hashes of words, document after document.
        ends_D: where the words of each document end.
        length: words in a run, at least 1.

    Returns:
        The hashes in the order of the text, and where those of each document end. A document of
        fewer words has none.
    """
    starts_D = np.append(0, ends_D[:-1])
    counts_D = np.maximum(ends_D - starts_D - length + 1, 0)
    ngram_ends_D = np.cumsum(counts_D)
    if not ngram_ends_D.size or not ngram_ends_D[-1]:
        return np.zeros(0, np.uint64), ngram_ends_D
    last = words_W.size - length + 1
    hashes = words_W[:last].copy()
    for offset in range(1, length):
        hashes *= np.uint64(_BASE)
        hashes += words_W[offset : last + offset]
    # A run that crosses documents is hashed, too, and left out here.
    shift_D = starts_D - (ngram_ends_D - counts_D)
    places_N = np.arange(ngram_ends_D[-1]) + np.repeat(shift_D, counts_D)
    return mix(hashes.take(places_N)), ngram_ends_D
