"""One unit of a corpus -> what deduplication needs to know about its documents.

`sketch_unit` is what a worker runs. Documents are read and cleaned as `build` does it; for each it
keeps a digest, band hashes, its shingles, where it stands, and whether it holds evaluation text.
Memory is bounded: documents are hashed in batches of some megabytes, and a part is written when it
has so many documents or shingles. A document that holds evaluation text is removed, whatever it
resembles, and so is no candidate for anything else.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_prep.batches import in_batches
from data_prep.decontamination import Evaluation, Overlap
from data_prep.dedup_files import (
    OVERLAPS_NAME,
    UnitSketch,
    part_file,
    save_array,
    sketch_name,
    step_folder,
)
from data_prep.documents import Document, Unit
from data_prep.handling import Handling, kept_documents
from data_prep.minhash import MinHashOptions, band_hashes, shingles_of, signatures
from data_prep.read_report import ReadReport
from data_prep.splits import split_digest
from data_prep.word_hashes import HashedTexts, hash_texts, ngram_hashes, spell_words

EVALUATION_FOLDER = "evaluation"
PART_DOCUMENTS = 2**17
PART_SHINGLES = 2**24
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class SketchJob:
    """What every unit of a deduplication has in common.

    Args:
        work: the work folder.
        handling: how sources are read and cleaned.
        minhash: how near-duplicates are found; None if only exact ones are.
        has_evaluation: whether the work folder holds an evaluation.
    """

    work: Path
    handling: Handling
    minhash: MinHashOptions | None
    has_evaluation: bool


def sketch_unit(job: SketchJob, unit: Unit) -> int:
    """Sketch one unit, unless that was done.

    Args:
        job: what all units have in common.
        unit: what to read.

    Returns:
        Bytes of input that the unit stands for.

    Raises:
        UserError: an input cannot be read or has changed, or the disk is full.
    """
    name = sketch_name(unit.index)
    if not (job.work / name).is_dir():
        with step_folder(job.work, name) as folder:
            _sketch(job, unit, folder)
    return unit.num_bytes


def _sketch(job: SketchJob, unit: Unit, folder: Path) -> None:
    report = ReadReport()
    evaluation = Evaluation.load(job.work / EVALUATION_FOLDER) if job.has_evaluation else None
    parts = _PartWriter(folder, job.minhash)
    content = hashlib.blake2b(digest_size=16)
    num_documents = num_overlaps = 0
    with (folder / OVERLAPS_NAME).open("w", encoding="ascii") as overlaps:
        documents = kept_documents(unit, job.handling, report)
        for batch in in_batches(documents, lambda each: each.cost_characters, _BATCH_CHARACTERS):
            hashed = hash_texts([document.text for document in batch])
            is_removed = np.zeros(len(batch), bool)
            if evaluation is not None:
                for found in evaluation.find(hashed):
                    is_removed[found.document] = True
                    text = batch[found.document].text
                    ngram = spell_words(text, found.first_word, evaluation.ngram_words)
                    _write_overlap(overlaps, ngram, found)
            splits = [split_digest(document.utf8) for document in batch]
            content.update(np.array(splits, ">u8").tobytes())
            parts.add(batch, splits, hashed, is_removed)
            num_documents += len(batch)
            num_overlaps += int(is_removed.sum())
    parts.close()
    UnitSketch(
        index=unit.index,
        documents=num_documents,
        parts=tuple(parts.sizes),
        files=tuple(parts.files),
        content=content.hexdigest(),
        overlaps=num_overlaps,
        report=report,
    ).save(folder)


def _write_overlap(overlaps: TextIO, ngram: str, found: Overlap) -> None:
    entry = {"ngram": ngram, "evaluation_file": found.file, "evaluation_place": found.place}
    overlaps.write(json.dumps(entry) + "\n")


class _PartWriter:
    """Collects what is known about documents, and writes it in parts.

    Args:
        folder: where the files go.
        minhash: how near-duplicates are found; None for not at all.
    """

    def __init__(self, folder: Path, minhash: MinHashOptions | None) -> None:
        self._folder, self._minhash = folder, minhash
        self.sizes: list[tuple[int, int]] = []
        self.files: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        self._records: list[tuple[int, int, bytes, bool]] = []
        self._digests: list[Any] = [np.zeros((0, 2), np.uint64)]
        self._bands: list[Any] = [np.zeros(0, np.uint64)]
        self._band_documents: list[Any] = [np.zeros(0, np.uint32)]
        self._shingles: list[Any] = [np.zeros(0, np.uint32)]
        self._shingle_counts: list[Any] = [np.zeros(0, np.int64)]
        self._num_shingles = 0

    def add(
        self,
        documents: Sequence[Document],
        splits: Sequence[int],
        hashed: HashedTexts,
        is_removed: np.ndarray,
    ) -> None:
        """Add documents, in order.

        Args:
            documents: the documents.
            splits: split digest of each.
            hashed: their words.
            is_removed: which of them hold evaluation text.
        """
        first = len(self._records)
        for document, split, removed in zip(documents, splits, is_removed.tolist(), strict=True):
            file = self.files.setdefault(document.source, len(self.files))
            place = document.position.encode("utf-8", "backslashreplace")
            self._records.append((split, file, place, removed))
        self._digests.append(hashed.digests_D2)
        if self._minhash is not None:
            self._sign(hashed, is_removed, first)
        if len(self._records) >= PART_DOCUMENTS or self._num_shingles >= PART_SHINGLES:
            self.close()

    def _sign(self, hashed: HashedTexts, is_removed: np.ndarray, first: int) -> None:
        assert self._minhash is not None
        length, functions = self._minhash.shingle_words, self._minhash.bands * self._minhash.rows
        ngrams, ends = ngram_hashes(hashed.words_W, hashed.ends_D, length)
        shingles, counts = shingles_of(ngrams), np.diff(ends, prepend=0)
        self._shingles.append(shingles)
        self._shingle_counts.append(counts)
        self._num_shingles += shingles.size
        signed = np.flatnonzero(counts)
        if signed.size:
            bands = band_hashes(signatures(shingles, ends[signed], functions), self._minhash)
            kept = ~is_removed[signed]
            documents = (signed[kept] + first).astype(np.uint32)
            self._bands.append(bands[:, kept].ravel())
            self._band_documents.append(np.tile(documents, self._minhash.bands))

    def close(self) -> None:
        """Write the documents since the last part, if there are any."""
        if not self._records:
            return
        width = max(1, *(len(place) for _, _, place, _ in self._records))
        kind = [("split", "<u8"), ("file", "<u4"), ("place", f"S{width}"), ("removed", "?")]
        records = np.array(self._records, kind)
        kept = np.flatnonzero(~records["removed"])
        digests = np.concatenate(self._digests)[kept]
        by_digest = np.lexsort((digests[:, 1], digests[:, 0]))
        bands = np.concatenate(self._bands)
        by_band = np.argsort(bands, kind="stable")
        arrays = {
            "documents": records,
            "digests": digests[by_digest],
            "digest_documents": kept[by_digest].astype(np.uint32),
            "bands": bands[by_band],
            "band_documents": np.concatenate(self._band_documents)[by_band],
            "shingles": np.concatenate(self._shingles),
            "shingle_ends": np.cumsum(np.concatenate(self._shingle_counts)),
        }
        for name, array in arrays.items():
            save_array(self._folder / part_file(len(self.sizes), name), array)
        self.sizes.append((records.size, bands.size))
        self._begin()
