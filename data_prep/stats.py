"""How large a dataset is and how long its documents are, per source and split."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np

from data_prep.manifest import SPLITS, Split
from data_prep.shards import Dataset


@dataclass(frozen=True)
class GroupStats:
    """One source and split; lengths are in tokens, percentiles by the nearest-rank method.

    Args:
        source: the source, or `all`.
        split: `train` or `heldout`.
        shards: shards of the group.
        documents: documents.
        tokens: tokens.
        text_bytes: UTF-8 bytes of cleaned text.
        bytes_per_token: text_bytes / tokens.
        mean: tokens / documents.
        p50: median length.
        p90: 90th percentile of the lengths.
        p99: 99th percentile of the lengths.
        longest: length of the longest document.
    """

    source: str
    split: Split
    shards: int
    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    mean: float
    p50: int
    p90: int
    p99: int
    longest: int


def dataset_stats(dataset: Dataset) -> list[GroupStats]:
    """Measure a dataset; reads all document ends and no tokens.

    Args:
        dataset: the dataset.

    Returns:
        One entry per split and source, sources in the order of the manifest; a split with several
        sources has a last entry `all`.

    Raises:
        CorruptError: a file of document ends is not what was written.
    """
    return [entry for split in SPLITS for entry in _split_stats(dataset, split)]


def _split_stats(dataset: Dataset, split: Split) -> list[GroupStats]:
    # Lengths are counted by value: memory depends on how many lengths there are, not documents.
    lengths: dict[str, Counter[int]] = {}
    for reader in dataset.readers(split):
        values, counts = np.unique(np.diff(reader.doc_ends(), prepend=0), return_counts=True)
        counter = lengths.setdefault(reader.info.source, Counter())
        counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    groups = [_group(dataset, split, [source], counter) for source, counter in lengths.items()]
    if len(groups) > 1:
        groups.append(_group(dataset, split, lengths, sum(lengths.values(), Counter())))
    return groups


def _group(
    dataset: Dataset, split: Split, sources: Iterable[str], lengths: Counter[int]
) -> GroupStats:
    names = set(sources)
    shards = [reader.info for reader in dataset.readers(split) if reader.info.source in names]
    documents = sum(info.num_documents for info in shards)
    tokens = sum(info.num_tokens for info in shards)
    text_bytes = sum(info.text_bytes for info in shards)
    p50, p90, p99, longest = (nearest_rank(lengths, share) for share in (0.5, 0.9, 0.99, 1.0))
    return GroupStats(
        source=names.pop() if len(names) == 1 else "all",
        split=split,
        shards=len(shards),
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        bytes_per_token=text_bytes / tokens,
        mean=tokens / documents,
        p50=p50,
        p90=p90,
        p99=p99,
        longest=longest,
    )


def nearest_rank(counts: Counter[int], share: float) -> int:
    """Percentile of values given by their counts.

    Args:
        counts: value -> how often it occurs; not empty.
        share: in (0, 1].

    Returns:
        The smallest value that at least this share of the values do not exceed.
    """
    rank = ceil(share * counts.total())
    for value in sorted(counts):
        rank -= counts[value]
        if rank <= 0:
            return value
    raise ValueError("no values, or a share above 1")
