"""Pairs of equal or similar documents -> clusters, and what becomes of each document.

    join_pairs       documents -> the first document of their cluster
    decide_unit      one unit: a decision for each document that is not simply kept
    cluster_report   how many clusters there are, how large, and some of them

A cluster is a connected component: a resembles b and b resembles c puts all three into one, even
where a and c are less alike. The first in the order of the corpus is kept. The array of all
documents lies in a file, so that no process holds it.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup_decisions import COLUMNS, COPY, NEAR_COPY, OVERLAP, REASONS, column_file
from data_prep.dedup_files import (
    COPIES_FILE,
    OVERLAPS_NAME,
    Pairs,
    Parts,
    UnitSketch,
    decisions_name,
    load_array,
    save_array,
    sketch_name,
    step_folder,
)

REMOVED_NAME = "removed.jsonl"
CLUSTERS_FOLDER = "clusters"
FIRSTS_NAME = "firsts.npy"
NUM_SAMPLES = 20
_SAMPLE_MEMBERS = 5
_CHUNK = 2**20

Place = tuple[str, str]


def join_pairs(firsts: NDArray[np.int64], total: int, lists: Callable[[], Iterable[Pairs]]) -> None:
    """Find connected components.

    Args:
        firsts: int64 [total], each document its own number; afterwards the smallest number of its
            component. It may lie in a file.
        total: documents.
        lists: gives all pairs, in lists, as often as it is called.
    """
    changed = True
    while changed:
        changed = False
        for pairs in lists():
            for start in range(0, pairs.size, _CHUNK):
                ones, others = np.divmod(pairs[start : start + _CHUNK], total)
                roots, other_roots = _roots(firsts, ones), _roots(firsts, others)
                apart = roots != other_roots
                if apart.any():
                    changed = True
                    low = np.minimum(roots, other_roots)[apart]
                    # Of several lower ones a root gets the least; the others come next time.
                    np.minimum.at(firsts, np.maximum(roots, other_roots)[apart], low)
    for start in range(0, total, _CHUNK):
        chunk = firsts[start : start + _CHUNK]
        firsts[start : start + _CHUNK] = _roots(firsts, chunk)


def _roots(firsts: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    roots = np.asarray(firsts[documents])
    while True:
        above = np.asarray(firsts[roots])
        if (above == roots).all():
            return roots
        roots = above


class Places:
    """Where documents stand, looked up in the sketches."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def find(self, documents: NDArray[np.int64]) -> list[tuple[Place, int]]:
        """File, place and split digest of some documents.

        Args:
            documents: their numbers.

        Returns:
            One entry for each, in order.
        """
        found: dict[int, tuple[Place, int]] = {}
        owners = self._parts.part_of(documents)
        for part in np.unique(owners).tolist():
            unit = int(self._parts.rows[part, 0])
            files = UnitSketch.load(self._parts.work, unit).files
            records = self._parts.load(part, "documents")
            first = self._parts.documents(part).start
            for document in documents[owners == part].tolist():
                record = records[document - first]
                place = (files[int(record["file"])], bytes(record["place"]).decode())
                found[document] = (place, int(record["split"]))
        return [found[document] for document in documents.tolist()]


def decide_unit(all_parts: Parts, unit_index: int) -> None:
    """Decide about the documents of one unit, unless that was done.

    Args:
        all_parts: the parts of all units.
        unit_index: the unit.
    """
    name = decisions_name(unit_index)
    if (all_parts.work / name).is_dir():
        return
    columns: dict[str, list[Any]] = {
        column: [np.zeros(0, kind)] for column, kind in COLUMNS.items()
    }
    with step_folder(all_parts.work, name) as folder:
        overlaps_file = all_parts.work / sketch_name(unit_index) / OVERLAPS_NAME
        with (
            overlaps_file.open(encoding="ascii") as overlaps,
            (folder / REMOVED_NAME).open("w", encoding="ascii") as removed,
        ):
            parts = all_parts.of_unit(unit_index)
            for part in parts:
                found = _decide_part(all_parts, part)
                found["document"] += all_parts.documents(part).start
                _describe(all_parts, found, overlaps, removed)
                found["document"] -= all_parts.documents(parts.start).start
                for column, values in found.items():
                    columns[column].append(values)
        for column, values in columns.items():
            save_array(folder / column_file(column), np.concatenate(values))


def _decide_part(all_parts: Parts, part: int) -> dict[str, NDArray[Any]]:
    """The columns of the decisions of one part; documents are counted within it."""
    documents = all_parts.documents(part)
    here = slice(documents.start, documents.stop)
    firsts = np.asarray(load_array(all_parts.work / CLUSTERS_FOLDER / FIRSTS_NAME)[here])
    is_copy = np.asarray(load_array(all_parts.work / COPIES_FILE)[here])
    is_removed = all_parts.load(part, "documents")["removed"]
    found = np.flatnonzero((firsts != np.arange(here.start, here.stop)) | is_removed)
    actions = np.where(is_removed, OVERLAP, np.where(is_copy, COPY, NEAR_COPY))[found]
    clusters = firsts[found]
    splits = [split for _, split in Places(all_parts).find(clusters)]
    return {
        "document": found.astype(np.int64),
        "action": actions.astype(np.uint8),
        "cluster": clusters,
        "split": np.array(splits, np.uint64),
    }


def _describe(
    all_parts: Parts, found: dict[str, NDArray[Any]], overlaps: Iterable[str], removed: Any
) -> None:
    places = Places(all_parts)
    own, first = places.find(found["document"]), places.find(found["cluster"])
    lines = iter(overlaps)
    for (place, _), (first_place, _), action, cluster in zip(
        own, first, found["action"].tolist(), found["cluster"].tolist(), strict=True
    ):
        entry: dict[str, Any] = {"file": place[0], "place": place[1], "reason": REASONS[action]}
        if action == OVERLAP:
            entry |= json.loads(next(lines))
        else:
            entry |= {"cluster": cluster, "kept_file": first_place[0], "kept_place": first_place[1]}
        removed.write(json.dumps(entry) + "\n")


def cluster_report(
    parts: Parts, firsts: NDArray[np.int64], sizes: NDArray[np.uint32]
) -> dict[str, Any]:
    """Describe the clusters.

    Args:
        parts: the parts of all units.
        firsts: int64 [documents], the first document of each one's cluster.
        sizes: uint32 [documents], zeros; afterwards the members of the cluster that each begins.
            It may lie in a file.

    Returns:
        Counts, a histogram of sizes in powers of two, and the largest clusters with some members.
    """
    total = parts.num_documents
    for start in range(0, total, _CHUNK):
        np.add.at(sizes, np.asarray(firsts[start : start + _CHUNK]), 1)
    histogram, largest = np.zeros(64, np.int64), np.zeros((0, 2), np.int64)
    for start in range(0, total, _CHUNK):
        chunk = np.asarray(sizes[start : start + _CHUNK]).astype(np.int64)
        begins = np.flatnonzero(chunk > 1)
        histogram += np.bincount(np.log2(chunk[begins]).astype(int), minlength=64)
        found = np.stack([-chunk[begins], begins + start], axis=1)
        merged = np.concatenate([largest, found])
        largest = merged[np.lexsort((merged[:, 1], merged[:, 0]))][:NUM_SAMPLES]
    members = _members(firsts, total, largest[:, 1])
    places = Places(parts)
    samples = [
        {
            "documents": int(-size),
            "cluster": int(first),
            "members": [
                {"file": file, "place": place}
                for (file, place), _ in places.find(np.array(members[int(first)]))
            ],
        }
        for size, first in largest
    ]
    sizes_text = {
        f"{2**n} to {2 ** (n + 1) - 1}": int(count) for n, count in enumerate(histogram) if count
    }
    return {
        "count": int(histogram.sum()),
        "largest": int(-largest[0, 0]) if largest.size else 0,
        "sizes": sizes_text,
        "samples": samples,
    }


def _members(
    firsts: NDArray[np.int64], total: int, clusters: NDArray[np.int64]
) -> dict[int, list[int]]:
    """The first documents of some clusters."""
    members: dict[int, list[int]] = {cluster: [] for cluster in clusters.tolist()}
    for start in range(0, total if members else 0, _CHUNK):
        chunk = np.asarray(firsts[start : start + _CHUNK])
        for place in np.flatnonzero(np.isin(chunk, clusters)).tolist():
            known = members[int(chunk[place])]
            if len(known) < _SAMPLE_MEMBERS:
                known.append(start + place)
    return members
