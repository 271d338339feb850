"""Texts -> ids in bulk: the unit of encoding, and a cache that makes it fast.

    encoder = BulkEncoder(tokenizer)
    batch = encoder.encode(texts)
    batch.ids[batch.text_ends[0] : batch.text_ends[1]]      the ids of texts[1]

- `BulkEncoder`: many texts at a time, the same ids for any division into batches.
- `EncodedTexts`: what it returns.
- `splits_at_spaces`: whether a model allows the unit to be a word.

**The unit of encoding** is a word: a run without space, tab and line feed of a chunk
(`cleaning.split_long`). SentencePiece encodes a whole text by adding up float32 scores from its
beginning, so that of two segmentations that are all but equal one is chosen by what stands before;
a word alone always gives the same ids, in any text. And words repeat: each is encoded once and
looked up from then on. Where a model's pieces cross spaces, or its normalization keeps tabs and
line ends, a word is no unit: then the chunk is, without a cache.

Shapes: N ids of a batch.
"""

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import numpy.typing as npt

from data_prep.batches import in_batches
from data_prep.cleaning import split_long
from data_prep.tokenizer import SPACE_MARK, Tokenizer

CACHE_WORDS = 2_000_000
"""Words that a cache holds before it starts afresh: some 400 MB. Zipf's law makes more useless."""
BATCH_CHARACTERS = 4 << 20
"""Text that is looked up at once. Its common words are looked up once for a batch, so that a larger
one is faster; this one takes some 120 MB."""

Ids = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedTexts:
    """The ids of some texts, end to end."""

    ids: Ids
    """uint32 [N]."""
    text_ends: Counts
    """Where the ids of each text end, int64 [number of texts]."""


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Tell whether a text's pieces are the pieces of its words.

    Args:
        tokenizer: The model.

    Returns:
        Whether the model puts a space mark in front of each word and nowhere else, and takes tabs,
        line ends and runs of spaces for one space.
    """
    pieces = tokenizer.pieces(range(tokenizer.num_pieces))
    if any(SPACE_MARK in piece[1:] or " " in piece for piece in pieces):
        return False
    one, two = tokenizer.encode("a"), tokenizer.encode("b")
    # Every model has these behaviours or lacks them as a whole; scores play no part in two letters.
    spaced = (f"a{space}b" for space in (" ", "\t", "\n", "  ", " \n\t"))
    return all(tokenizer.encode(text) == one + two for text in (*spaced, " a b "))


class BulkEncoder:
    """Encodes texts in bulk; holds a cache of words, so use one for each process.

    Args:
        tokenizer: The model.
        cache_words: Words that the cache holds at most.
    """

    def __init__(self, tokenizer: Tokenizer, cache_words: int = CACHE_WORDS) -> None:
        self._tokenizer = tokenizer
        self._cache_words = cache_words
        self.encodes_words = splits_at_spaces(tokenizer)
        self._forget()

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts; no special tokens are added, none can be spelled.

        Args:
            texts: Texts without lone surrogates; best a megabyte or more at a time.

        Returns:
            Their ids, in their order.

        Raises:
            UnicodeEncodeError: A text holds a lone surrogate.
        """
        chunks = [split_long(text) for text in texts]
        chunk_ends = np.cumsum([len(parts) for parts in chunks], dtype=np.int64)
        encode = self._words if self.encodes_words else self._chunks
        in_order = in_batches(chain.from_iterable(chunks), len, BATCH_CHARACTERS)
        batches = [encode(batch) for batch in in_order]
        ids = np.concatenate([np.empty(0, np.uint32), *(ids for ids, _ in batches)])
        counts = np.concatenate([np.empty(0, np.int64), *(counts for _, counts in batches)])
        return EncodedTexts(ids, _ends(counts)[chunk_ends])

    def _chunks(self, chunks: list[str]) -> tuple[Ids, Counts]:
        return _end_to_end(self._tokenizer.encode_batch(chunks))

    def _words(self, chunks: list[str]) -> tuple[Ids, Counts]:
        import pyarrow as pa
        import pyarrow.compute as pc

        spaced = [chunk.replace("\t", " ").replace("\n", " ") for chunk in chunks]
        # Other white space is the model's business; empty words, between two spaces, have no ids.
        texts = pa.array(spaced, pa.large_string())
        lists = pc.split_pattern(texts, " ")  # pyright: ignore[reportAttributeAccessIssue]
        words = lists.flatten().dictionary_encode()
        rows = self._rows(words.dictionary.to_pylist())[words.indices.to_numpy()]
        counts = self._counts[rows]
        ends = _ends(counts)
        # The place in the table of each id: where its word begins there, and how far into the word.
        shifts = self._starts[rows] - ends[:-1]
        ids = self._table[np.repeat(shifts, counts) + np.arange(ends[-1])]
        return ids, np.diff(ends[lists.offsets.to_numpy()])

    def _rows(self, words: list[str]) -> Counts:
        """Rows of the cache, one for each word, all different; new words are encoded first."""
        if len(self._row_of) + len(words) > self._cache_words:
            self._forget()
        known = len(self._row_of)
        rows = np.fromiter(map(self._row_of.__getitem__, words), np.int64, len(words))
        # New words took the next rows, in their order.
        new = [words[place] for place in np.flatnonzero(rows >= known).tolist()]
        if new:
            try:
                with _collector_at_rest():
                    ids, counts = _end_to_end(self._tokenizer.encode_batch(new))
            except BaseException:
                self._forget()  # for it has rows without ids
                raise
            self._starts = np.concatenate([self._starts, self._table.size + _ends(counts)[:-1]])
            self._counts = np.concatenate([self._counts, counts])
            self._table = np.concatenate([self._table, ids])
        return rows

    def _forget(self) -> None:
        # A word that is looked up for the first time takes the next row: one pass, none in Python.
        self._row_of: dict[str, int] = defaultdict(count().__next__)
        self._starts = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._table = np.empty(0, np.uint32)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Keep the collector of cycles from going through all objects while many lists are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _end_to_end(lists: Sequence[Sequence[int]]) -> tuple[Ids, Counts]:
    counts = np.array([len(ids) for ids in lists], np.int64)
    return np.fromiter(chain.from_iterable(lists), np.uint32, int(counts.sum())), counts


def _ends(counts: Counts) -> Counts:
    """Where each of several lists begins when they stand end to end, and behind the last."""
    return np.concatenate([[0], np.cumsum(counts)])
