"""Documents that hold runs of words from evaluation files, found by n-gram hashes.

    evaluation = read_evaluation(["squad/*.jsonl"], ["question", "context"], 13)
    evaluation.save(folder); Evaluation.load(folder)
    for overlap in evaluation.find(hashed): ...

One shared run of 13 words (Brown et al. 2020, appendix C) is an overlap; what a word is, is said in
`word_hashes`. Examples of fewer words are not looked for: five common words in a row are no proof.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cleaning import repair_text
from data_prep.dedup_files import load_array, save_array
from data_prep.documents import Document, ReadOptions, plan_units, read_unit
from data_prep.errors import UserError
from data_prep.read_report import ReadReport
from data_prep.word_hashes import HashedTexts, Hashes, hash_texts, ngram_hashes

NGRAM_WORDS = 13
MAX_NGRAMS = 2**25
"""Each worker holds 12 bytes for each; 400 MB at most."""
_DOCUMENT_BYTES = 64 << 20
_FILTER_BITS = 24
_BATCH_TEXTS = 1000


class Overlap(NamedTuple):
    """A document that shares a run of words with an evaluation example."""

    document: int
    """Its number among the hashed texts."""
    first_word: int
    """Where the first shared run starts in it, in words."""
    file: str
    """File of the example."""
    place: str
    """Place of the example in the file."""


@dataclass(frozen=True)
class Evaluation:
    """The runs of words of all evaluation examples.

    Args:
        ngrams_N: hashes, increasing.
        examples_N: number of the first example that has each.
        places: file and place of each example that has any.
        ngram_words: words of a run.
        short_examples: examples of fewer words, which cannot be looked for.
    """

    ngrams_N: Hashes
    examples_N: NDArray[np.uint32]
    places: tuple[tuple[str, str], ...]
    ngram_words: int
    short_examples: int

    def save(self, folder: Path) -> None:
        """Write the evaluation into an empty folder."""
        save_array(folder / "ngrams.npy", self.ngrams_N)
        save_array(folder / "examples.npy", self.examples_N)
        values = {"places": self.places, "words": self.ngram_words, "short": self.short_examples}
        (folder / "examples.json").write_text(json.dumps(values), encoding="ascii")

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """Read back what `save` wrote."""
        values = json.loads((folder / "examples.json").read_bytes())
        return cls(
            np.asarray(load_array(folder / "ngrams.npy")),
            load_array(folder / "examples.npy"),
            tuple((file, place) for file, place in values["places"]),
            values["words"],
            values["short"],
        )

    @property
    def sha256(self) -> str:
        """A digest of all runs."""
        return hashlib.sha256(self.ngrams_N.tobytes()).hexdigest()

    @cached_property
    def _filter(self) -> NDArray[np.bool_]:
        """Which upper bits occur at all: most words of a corpus need no further look."""
        table = np.zeros(2**_FILTER_BITS, bool)
        table[self.ngrams_N >> np.uint64(64 - _FILTER_BITS)] = True
        return table

    def find(self, hashed: HashedTexts) -> Iterator[Overlap]:
        """Find the documents that share a run of words with an example.

        Args:
            hashed: of `hash_texts`.

        Yields:
            One overlap for each such document, in order: the first in its text.
        """
        ngrams, ends_D = ngram_hashes(hashed.words_W, hashed.ends_D, self.ngram_words)
        likely = np.flatnonzero(self._filter[ngrams >> np.uint64(64 - _FILTER_BITS)])
        places = np.searchsorted(self.ngrams_N, ngrams[likely])
        places[places == self.ngrams_N.size] = 0
        is_hit = self.ngrams_N[places] == ngrams[likely]
        hits, examples = likely[is_hit], self.examples_N[places[is_hit]]
        documents, firsts = np.unique(
            np.searchsorted(ends_D, hits, side="right"), return_index=True
        )
        starts_D = np.append(0, ends_D[:-1])
        for document, first in zip(documents.tolist(), firsts.tolist(), strict=True):
            file, place = self.places[int(examples[first])]
            yield Overlap(document, int(hits[first] - starts_D[document]), file, place)


def read_evaluation(
    files: Sequence[str], fields: Sequence[str], ngram_words: int = NGRAM_WORDS
) -> Evaluation:
    """Read the examples that a corpus must not hold.

    Args:
        files: files, folders or globs, of the formats that sources have; a .txt is one example.
        fields: the fields of a JSON line or columns of a table that hold text.
        ngram_words: words of a run.

    Returns:
        The evaluation.

    Raises:
        UserError: a file cannot be read, is malformed or holds no example of so many words, or they
            are too large.
    """
    if not 1 <= ngram_words <= 100:
        raise UserError(f"--ngram-words {ngram_words}: must lie between 1 and 100")
    ngrams, examples = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
    places: list[tuple[str, str]] = []
    short = num_ngrams = 0
    for file in files:
        found_before = num_ngrams
        for batch in _batches(_examples(file, fields)):
            hashed = hash_texts([document.text for document in batch])
            found, ends = ngram_hashes(hashed.words_W, hashed.ends_D, ngram_words)
            counts = np.diff(ends, prepend=0)
            short += int((counts == 0).sum())
            numbers = np.arange(len(places), len(places) + counts.size, dtype=np.uint32)
            examples.append(np.repeat(numbers, counts))
            ngrams.append(found)
            places += [(document.source, document.position) for document in batch]
            num_ngrams += found.size
            if num_ngrams > MAX_NGRAMS:
                raise UserError(
                    f"--decontaminate {file}: there are more than {MAX_NGRAMS:,} runs of "
                    f"{ngram_words} words so far; evaluation files are small, so check that no "
                    f"training text is among them"
                )
        if num_ngrams == found_before:
            raise UserError(
                f"--decontaminate {file}: holds no text of {ngram_words} words or more in the "
                f"fields {', '.join(fields)}, so nothing could be found; name its fields with "
                f"--decontaminate-field, or lower --ngram-words"
            )
    unique, firsts = np.unique(np.concatenate(ngrams), return_index=True)
    return Evaluation(unique, np.concatenate(examples)[firsts], tuple(places), ngram_words, short)


def _examples(file: str, fields: Sequence[str]) -> Iterator[Document]:
    for field in fields:
        report = ReadReport()
        options = ReadOptions(text_field=field, max_document_bytes=_DOCUMENT_BYTES)
        units = plan_units([file], options)
        for unit in units:
            for document in read_unit(unit, options, report):
                # Texts without fields would be read once for each.
                if field == fields[0] or not document.source.endswith(".txt"):
                    yield replace(document, text=repair_text(document.text).text)
        broken = {reason: n for reason, n in report.malformed.items() if reason != "missing field"}
        if broken:
            reason = next(iter(broken))
            path, cases = next(iter(report.examples[reason].items()))
            raise UserError(
                f"--decontaminate {file}: {path}: {cases[0]}; an example that cannot be read "
                f"could not be looked for, so repair the file first"
            )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _BATCH_TEXTS)):
        yield batch
