"""What is in a dataset, as figures for people: the content of `deberta-prep report`.

    values = collect(folder)      read ends, samples of tokens, drops, manifest

- `collect`: everything that the page shows, as plain values.
- `DatasetReport`, `PieceCounts`, `Histogram`, `DroppedSample`: those values.

Lengths are exact. Pieces and fertility are counted over blocks of neighbouring documents that are
spread evenly over the splits, all of them where the dataset is small; the page says over how many.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import SPLITS
from data_prep.shards import Dataset, ShardReader
from data_prep.stats import GroupStats, dataset_stats
from data_prep.tokenizer import SPACE_MARK, Tokenizer
from data_prep.unit_work import DROPPED_NAME

SAMPLE_TOKENS = 50_000_000
"""Tokens over which pieces are counted, unless another number is given."""
_BLOCK_TOKENS = 1 << 20
_SAMPLES_PER_REASON = 5
_SHOWN_PIECES = 40


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges."""

    edges: list[float]
    """One more than counts, increasing."""
    counts: list[int]


@dataclass(frozen=True)
class PieceCounts:
    """How often the pieces of the vocabulary occur."""

    tokens: int
    """Tokens that were counted."""
    top: list[tuple[str, int]]
    """The commonest pieces and their counts, the commonest first."""
    rare: list[tuple[str, int]]
    """Some of the rarest that occur, the rarest first."""
    unused: int
    """Pieces of text that do not occur."""
    seen_below_ten: int
    """Those that occur, but fewer than ten times."""
    unknown: int
    """Tokens that are [UNK]."""
    bytes: int
    """Tokens that spell a single byte."""


@dataclass(frozen=True)
class DroppedSample:
    """An input that gave no document."""

    reason: str
    file: str
    place: str
    detail: str


@dataclass(frozen=True)
class DatasetReport:
    """Everything that the page shows."""

    folder: str
    fingerprint: str
    manifest: dict[str, Any]
    """The manifest without shards, as in its file."""
    shards: list[dict[str, Any]]
    """Name, source, split, tokens, documents and hash of each shard."""
    groups: list[GroupStats]
    """Sizes of every source and split."""
    lengths: dict[str, Histogram]
    """Split -> documents by length in tokens, in powers of two."""
    fertility: dict[str, Histogram]
    """Source -> sampled documents by tokens a word."""
    mean_fertility: dict[str, float]
    """Source -> tokens a word over its sampled documents."""
    pieces: PieceCounts
    dropped: list[DroppedSample]
    """The first few of each reason."""


def collect(folder: Path, sample_tokens: int = SAMPLE_TOKENS) -> DatasetReport:
    """Read what a report says.

    Args:
        folder: the dataset.
        sample_tokens: tokens over which pieces and fertility are counted, at most about.

    Returns:
        The values; the same for the same dataset and sample.

    Raises:
        UserError: there is no such dataset.
        CorruptError: what is read is not what was written.
    """
    dataset = Dataset.open(folder)
    tokenizer = Tokenizer.load(dataset.tokenizer_folder)
    values = asdict(dataset.manifest)
    shards = values.pop("shards")
    counts = np.zeros(dataset.manifest.vocab_size, np.int64)
    ratios: dict[str, list[NDArray[np.float64]]] = {}
    words: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    starts_word = _space_marked(tokenizer)
    for source, ids, ends in _sampled_blocks(dataset, sample_tokens):
        counts += np.bincount(ids, minlength=len(counts))
        lengths = np.diff(ends, prepend=0)
        in_words = np.add.reduceat(starts_word[ids].astype(np.int64), ends - lengths)
        ratios.setdefault(source, []).append(lengths / np.maximum(in_words, 1))
        words[source] += int(in_words.sum())
        tokens[source] += int(lengths.sum())
    return DatasetReport(
        folder=str(folder),
        fingerprint=dataset.fingerprint,
        manifest=values,
        shards=[_shard_values(shard) for shard in shards],
        groups=dataset_stats(dataset),
        lengths={split: _length_histogram(dataset.readers(split)) for split in SPLITS},
        fertility={source: _ratio_histogram(parts) for source, parts in ratios.items()},
        mean_fertility={source: tokens[source] / max(1, words[source]) for source in tokens},
        pieces=_piece_counts(counts, tokenizer),
        dropped=_dropped_samples(folder / DROPPED_NAME),
    )


def _shard_values(shard: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "source", "split", "num_tokens", "num_documents", "tokens_sha256")
    return {key: shard[key] for key in keys}


def _space_marked(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    names = tokenizer.pieces(range(tokenizer.vocab_size))
    return np.array([name.startswith(SPACE_MARK) for name in names])


def _sampled_blocks(
    dataset: Dataset, sample_tokens: int
) -> Iterator[tuple[str, NDArray[np.uint32], NDArray[np.int64]]]:
    """Blocks of whole documents: their source, ids, and where each document ends in the block."""
    step = max(1, -(-dataset.manifest.num_tokens() // max(1, sample_tokens)))
    for split in SPLITS:
        for reader in dataset.readers(split):
            ends = reader.doc_ends()
            first = 0
            for number, start in enumerate(range(0, reader.info.num_tokens, _BLOCK_TOKENS)):
                behind = int(np.searchsorted(ends, start + _BLOCK_TOKENS, side="right"))
                behind = max(behind, first + 1)
                if first < len(ends) and number % step == 0:
                    begin = int(ends[first - 1]) if first else 0
                    ids = reader.tokens(begin, int(ends[behind - 1]))
                    yield reader.info.source, ids, ends[first:behind] - begin
                first = max(first, behind)


def _length_histogram(readers: tuple[ShardReader, ...]) -> Histogram:
    powers = np.zeros(40, np.int64)
    for reader in readers:
        lengths = np.diff(reader.doc_ends(), prepend=0)
        powers += np.bincount(np.log2(lengths).astype(np.int64), minlength=len(powers))
    last = int(np.flatnonzero(powers)[-1]) if powers.any() else 0
    return Histogram([2.0**n for n in range(last + 2)], powers[: last + 1].tolist())


def _ratio_histogram(parts: list[NDArray[np.float64]]) -> Histogram:
    edges = np.linspace(1.0, 4.0, 31)
    # What lies outside belongs to the outermost bars.
    counts, _ = np.histogram(np.clip(np.concatenate(parts), 1.0, 4.0), edges)
    return Histogram(edges.round(2).tolist(), counts.tolist())


def _piece_counts(counts: NDArray[np.int64], tokenizer: Tokenizer) -> PieceCounts:
    text = np.zeros(len(counts), np.bool_)
    text[tokenizer.unk_id + 1 : tokenizer.num_pieces] = True
    is_byte = np.zeros(len(counts), np.bool_)
    is_byte[sorted(tokenizer.byte_ids)] = True
    text &= ~is_byte
    order = np.argsort(-counts, kind="stable")
    seen = [int(n) for n in order if text[n] and counts[n]]

    def named(ids: list[int]) -> list[tuple[str, int]]:
        return [(name, int(counts[n])) for n, name in zip(ids, tokenizer.pieces(ids), strict=True)]

    return PieceCounts(
        tokens=int(counts.sum()),
        top=named(seen[:_SHOWN_PIECES]),
        rare=named(seen[: -_SHOWN_PIECES - 1 : -1]),
        unused=int((text & (counts == 0)).sum()),
        seen_below_ten=int((text & (counts > 0) & (counts < 10)).sum()),
        unknown=int(counts[tokenizer.unk_id]),
        bytes=int(counts[is_byte].sum()),
    )


def _dropped_samples(log: Path) -> list[DroppedSample]:
    kept: dict[str, list[DroppedSample]] = {}
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            samples = kept.setdefault(entry["reason"], [])
            if len(samples) < _SAMPLES_PER_REASON:
                values = (entry[key] for key in ("reason", "file", "place", "detail"))
                samples.append(DroppedSample(*values))
    return [sample for reason in sorted(kept) for sample in kept[reason]]
