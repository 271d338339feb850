"""Sketches of all units -> which documents are copies, and which pairs are near-duplicates.

    match_copies   one range of digests: (copy, first document with that digest)
    match_bands    one range of band hashes: pairs that share one, copies left out
    verify_part    one part: those pairs whose Jaccard index, counted exactly, reaches the threshold

Each is what a worker runs, and leaves a folder (`dedup_files`). A range of hashes is read out of
the sorted files of all parts, so that no worker needs more than its share: an external sort without
a merge. Ranges depend on how many hashes there are, never on the workers.

Documents with the same band hash form a bucket. In one of up to 16, all pairs are candidates; in a
larger one, where most are near-copies of each other, each document is paired with the first one
and with the seven before it, so that the work grows with the documents and not with their square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup_files import COPIES_FILE, Pairs, Parts, load_array, save_array, step_folder
from data_prep.errors import UserError

PAIRS_NAME = "pairs.npy"
RANGE_RECORDS = 2**21
"""Hashes that a range has on average; a worker holds some tens of bytes for each."""
MAX_DOCUMENTS = 3_000_000_000
"""A pair of documents has to fit into 63 bits."""
_SMALL_BUCKET = 16
_NEIGHBOURS = 7
_BATCH_SHINGLES = 2**21


@dataclass(frozen=True)
class MatchJob:
    """What the steps of matching have in common.

    Args:
        parts: the parts of all units.
        digest_ranges: ranges that the digests are divided into.
        band_ranges: ranges that the band hashes are divided into.
        threshold: Jaccard index of near-duplicates.
    """

    parts: Parts
    digest_ranges: int
    band_ranges: int
    threshold: float

    def __post_init__(self) -> None:
        if self.parts.num_documents > MAX_DOCUMENTS:
            raise UserError(
                f"the sources hold {self.parts.num_documents:,} documents, and {MAX_DOCUMENTS:,} "
                f"can be compared at once; deduplicate the sources in groups"
            )


def num_ranges(num_records: int) -> int:
    """Ranges for so many hashes."""
    return max(1, -(-num_records // RANGE_RECORDS))


def copies_name(number: int) -> str:
    """Name of the folder of `match_copies`."""
    return f"copies-{number:05d}"


def pairs_name(number: int) -> str:
    """Name of the folder of `match_bands`."""
    return f"pairs-{number:05d}"


def edges_name(part: int) -> str:
    """Name of the folder of `verify_part`."""
    return f"edges-{part:05d}"


def load_pairs(job: MatchJob, name: str) -> Pairs:
    """Open what a step has found."""
    return load_array(job.parts.work / name / PAIRS_NAME)


def _save(job: MatchJob, name: str, pairs: Pairs) -> None:
    with step_folder(job.parts.work, name) as folder:
        save_array(folder / PAIRS_NAME, pairs)


def _is_done(job: MatchJob, name: str) -> bool:
    return (job.parts.work / name).is_dir()


def _in_range(hashes: NDArray[np.uint64], number: int, count: int) -> slice:
    """Where the hashes of one of `count` equal ranges lie among increasing hashes."""
    edges = [(number * 2**64) // count, ((number + 1) * 2**64) // count]
    first = np.searchsorted(hashes, np.uint64(edges[0]))
    end = hashes.size if edges[1] == 2**64 else np.searchsorted(hashes, np.uint64(edges[1]))
    return slice(int(first), int(end))


def match_copies(job: MatchJob, number: int) -> None:
    """Find the documents whose digest an earlier document has.

    Args:
        job: what the steps have in common.
        number: the range of digests.
    """
    name = copies_name(number)
    if _is_done(job, name):
        return
    digests, documents = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
    for part in range(len(job.parts)):
        found = job.parts.load(part, "digests")
        here = _in_range(np.ascontiguousarray(found[:, 0]), number, job.digest_ranges)
        digests.append(found[here])
        local = job.parts.load(part, "digest_documents")[here]
        documents.append(local + np.int64(job.parts.documents(part).start))
    digests_D2, documents_D = np.concatenate(digests), np.concatenate(documents)
    # Stable, so that documents of one digest stay in the order of the corpus.
    order = np.lexsort((digests_D2[:, 1], digests_D2[:, 0]))
    digests_D2, documents_D = digests_D2[order], documents_D[order]
    is_copy = np.zeros(documents_D.size, bool)
    is_copy[1:] = (digests_D2[1:] == digests_D2[:-1]).all(axis=1)
    firsts = documents_D[~is_copy][np.cumsum(~is_copy) - 1]
    pairs = documents_D[is_copy] * job.parts.num_documents + firsts[is_copy]
    _save(job, name, np.sort(pairs))


def match_bands(job: MatchJob, number: int) -> None:
    """Find pairs of documents that share a band hash.

    Args:
        job: what the steps have in common.
        number: the range of band hashes.
    """
    name = pairs_name(number)
    if _is_done(job, name):
        return
    is_copy = load_array(job.parts.work / COPIES_FILE)
    hashes, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for part in range(len(job.parts)):
        found = job.parts.load(part, "bands")
        here = _in_range(found, number, job.band_ranges)
        local = job.parts.load(part, "band_documents")[here]
        first, end = job.parts.documents(part).start, job.parts.documents(part).stop
        kept = ~is_copy[first:end][local]
        hashes.append(found[here][kept])
        documents.append(local[kept] + np.int64(first))
    all_hashes, all_documents = np.concatenate(hashes), np.concatenate(documents)
    order = np.argsort(all_hashes, kind="stable")
    pairs = bucket_pairs(all_hashes[order], all_documents[order], job.parts.num_documents)
    _save(job, name, pairs)


def bucket_pairs(hashes: NDArray[np.uint64], documents: NDArray[np.int64], total: int) -> Pairs:
    """The pairs of documents that are worth a comparison.

    Args:
        hashes: increasing band hashes.
        documents: the document of each, increasing where the hash is the same.
        total: documents of the corpus.

    Returns:
        Each pair once, increasing.
    """
    if not hashes.size:
        return np.zeros(0, np.int64)
    is_first = np.append(True, hashes[1:] != hashes[:-1])
    starts = np.flatnonzero(is_first)
    sizes = np.diff(starts, append=hashes.size)
    bucket = np.cumsum(is_first) - 1
    rank = np.arange(hashes.size) - starts[bucket]
    reach = np.where(sizes <= _SMALL_BUCKET, _SMALL_BUCKET, _NEIGHBOURS)[bucket]
    found = []
    for distance in range(1, min(_SMALL_BUCKET, int(sizes.max()))):
        later = np.flatnonzero((rank >= distance) & (reach >= distance))
        found.append(documents[later - distance] * total + documents[later])
    far = np.flatnonzero(rank > reach)
    found.append(documents[starts[bucket[far]]] * total + documents[far])
    return distinct(np.concatenate(found))


Numbers = TypeVar("Numbers", bound=np.integer)


def distinct(values: NDArray[Numbers]) -> NDArray[Numbers]:
    """Sort numbers and drop repetitions; hashing them, as `np.unique` does, takes far longer.

    Args:
        values: any integers.

    Returns:
        Each once, increasing.
    """
    values = np.sort(values)
    is_first = np.ones(values.size, bool)
    is_first[1:] = values[1:] != values[:-1]
    return values[is_first]


def verify_part(job: MatchJob, part: int) -> None:
    """Keep the pairs of one part's documents that are near-duplicates.

    Args:
        job: what the steps have in common.
        part: the part; pairs count by their first document.
    """
    name = edges_name(part)
    if _is_done(job, name):
        return
    total, documents = job.parts.num_documents, job.parts.documents(part)
    found = [np.zeros(0, np.int64)]
    for number in range(job.band_ranges):
        pairs = load_pairs(job, pairs_name(number))
        edges = np.searchsorted(pairs, [documents.start * total, documents.stop * total])
        found.append(pairs[slice(*edges)])
    pairs = distinct(np.concatenate(found))
    others = job.parts.part_of(pairs % total)
    kept = [np.zeros(0, np.int64)]
    for other in np.unique(others).tolist():
        here = pairs[others == other]
        kept += (batch[jaccard >= job.threshold] for batch, jaccard in _compare(job, here))
    _save(job, name, np.sort(np.concatenate(kept)))


class _ShingleSets:
    """The shingles of the documents of one part."""

    def __init__(self, parts: Parts, part: int) -> None:
        self._first = parts.documents(part).start
        self._shingles = parts.load(part, "shingles")
        self._ends = parts.load(part, "shingle_ends")

    def _starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        local = documents - self._first
        return np.where(local > 0, self._ends[local - 1], 0)

    def counts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shingles of each document, repetitions included."""
        return self._ends[documents - self._first] - self._starts(documents)

    def keys(self, documents: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The distinct shingles of each document, below its place in the list; increasing."""
        counts = self.counts(documents)
        shifts = self._starts(documents) - (np.cumsum(counts) - counts)
        places = np.arange(counts.sum()) + np.repeat(shifts, counts)
        ranks = np.repeat(np.arange(documents.size, dtype=np.uint64), counts)
        return distinct((ranks << np.uint64(32)) | self._shingles[places])


def _compare(job: MatchJob, pairs: Pairs) -> Iterator[tuple[Pairs, NDArray[np.float64]]]:
    """Jaccard indices of pairs between two parts, in batches of bounded size."""
    if not pairs.size:
        return
    ones, others = np.divmod(pairs, job.parts.num_documents)
    left, right = (
        _ShingleSets(job.parts, int(job.parts.part_of(side[:1])[0])) for side in (ones, others)
    )
    sizes = np.cumsum(left.counts(ones) + right.counts(others))
    start = 0
    while start < pairs.size:
        before = sizes[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(sizes, before + _BATCH_SHINGLES)))
        yield (
            pairs[start:end],
            exact_jaccard(left.keys(ones[start:end]), right.keys(others[start:end]), end - start),
        )
        start = end


def exact_jaccard(
    ones: NDArray[np.uint64], others: NDArray[np.uint64], count: int
) -> NDArray[np.float64]:
    """|A and B| / |A or B| of pairs of sets.

    Args:
        ones: the elements of the first sets: (number of the pair, 32 bits), each once.
        others: those of the second sets.
        count: pairs.

    Returns:
        float64 [count].
    """

    def sizes(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        return np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=count)

    shared = sizes(np.intersect1d(ones, others, assume_unique=True))
    return shared / (sizes(ones) + sizes(others) - shared)
