"""Ids -> text -> ids: what a dataset's tokenizer changes on the way back; a rate, not an error.

Encoding normalizes, so that this is not exactly the identity: a rare string may settle on another
segmentation. The rate tells whether the tokenizer in the folder is the one that made the ids: then
it is small; with another tokenizer it is near 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import SPLITS, Split
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from data_prep.word_encoding import BulkEncoder

_TEXT_CHARACTERS = 4096


@dataclass(frozen=True)
class RoundtripReport:
    """Documents that were decoded and encoded again.

    Args:
        documents: documents tried.
        documents_changed: those whose ids came out differently.
        tokens: tokens of the documents tried.
        tokens_changed: tokens that the changed documents hold beyond their common prefix and
            suffix with the new ids.
    """

    documents: int
    documents_changed: int
    tokens: int
    tokens_changed: int

    @property
    def document_rate(self) -> float:
        """Share of the documents that changed."""
        return self.documents_changed / max(1, self.documents)

    @property
    def token_rate(self) -> float:
        """Share of the tokens that changed."""
        return self.tokens_changed / max(1, self.tokens)


def measure_roundtrip(
    dataset: Dataset, tokenizer: Tokenizer, sample_documents: int | None
) -> RoundtripReport:
    """Decode documents, encode the result and count what changed.

    Args:
        dataset: the dataset.
        tokenizer: the tokenizer that made it.
        sample_documents: documents of each split, evenly spaced; None for all.

    Returns:
        The counts.
    """
    encoder = BulkEncoder(tokenizer)
    documents = changed = tokens = tokens_changed = 0
    for ids in sample_ids(dataset, sample_documents):
        text = tokenizer.decode(ids)
        difference = _changed_tokens(ids, encoder.encode([text]).ids)
        documents += 1
        tokens += ids.size
        changed += difference > 0
        tokens_changed += difference
    return RoundtripReport(documents, changed, tokens, tokens_changed)


def sample_texts(dataset: Dataset, tokenizer: Tokenizer, sample_documents: int) -> Iterator[str]:
    """The beginnings of evenly spaced documents as text.

    Args:
        dataset: the dataset.
        tokenizer: the tokenizer that made it.
        sample_documents: documents of each split, at most.

    Yields:
        At most 4096 characters of each document.
    """
    for ids in sample_ids(dataset, sample_documents):
        yield tokenizer.decode(ids[:_TEXT_CHARACTERS])[:_TEXT_CHARACTERS]


def sample_ids(dataset: Dataset, sample_documents: int | None) -> Iterator[NDArray[np.uint32]]:
    """Evenly spaced documents of both splits.

    Args:
        dataset: the dataset.
        sample_documents: documents of each split, at most; None for all.

    Yields:
        Token ids, uint32 [length].
    """
    for split in SPLITS:
        count = dataset.manifest.num_documents(split)
        step = 1 if sample_documents is None else max(1, -(-count // sample_documents))
        yield from _every(dataset, split, step)


def _every(dataset: Dataset, split: Split, step: int) -> Iterator[NDArray[np.uint32]]:
    """Every step-th document of a split, reading the ends of each shard once."""
    skip = 0
    for reader in dataset.readers(split):
        starts_and_ends = np.concatenate(([0], reader.doc_ends()))
        chosen = range(skip, reader.info.num_documents, step)
        for index in chosen:
            yield reader.tokens(int(starts_and_ends[index]), int(starts_and_ends[index + 1]))
        skip = (skip - reader.info.num_documents) % step


def _changed_tokens(old: NDArray[np.uint32], new: NDArray[np.uint32]) -> int:
    """Tokens of `old` (or of `new`, if more) between the common prefix and the common suffix."""
    shorter = min(old.size, new.size)
    prefix = _run(old[:shorter] == new[:shorter])
    rest = shorter - prefix
    suffix = _run(old[::-1][:rest] == new[::-1][:rest])
    return max(old.size, new.size) - prefix - suffix


def _run(equal: NDArray[np.bool_]) -> int:
    """Length of the run of True at the beginning."""
    return equal.size if equal.all() else int(equal.argmin())
