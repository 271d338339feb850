"""One unit of a build: its documents in, its shards out, and a mark that says it is done.

    WORK/unit-000012/shard-00000.tokens.npy ...    as in a dataset; numbered within the unit
    WORK/unit-000012/dropped.jsonl                 every input that gave no document, and why
    WORK/unit-000012/done.json                     `UnitMark`: all hashes

`build_unit` is what a worker runs. It depends on the unit and the job alone; called again it finds
the mark, checks the files against it and does nothing, or starts the unit over. The folder is
filled under another name (`partial_folders`), so two workers can have the same unit. That makes a
build the same for any number of workers, after any number of kills.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np

from data_prep.dedup_decisions import OVERLAP, REASONS, Decisions, Duplicates
from data_prep.documents import Document, Unit
from data_prep.errors import UserError
from data_prep.handling import Handling, kept_documents
from data_prep.manifest import (
    ShardInfo,
    Split,
    shard_from_json,
    write_atomically,
)
from data_prep.npy_files import hash_blocks
from data_prep.partial_folders import disk_errors, partial_folder, publish_folder
from data_prep.read_report import ReadReport
from data_prep.shard_writer import ShardWriter
from data_prep.splits import split_digest, split_of
from data_prep.tokenizer import Tokenizer
from data_prep.word_encoding import BATCH_CHARACTERS, BulkEncoder

DROPPED_NAME = "dropped.jsonl"
MARK_NAME = "done.json"


def unit_folder_name(unit_index: int) -> str:
    """Name of the folder of one unit, by its place in the plan."""
    return f"unit-{unit_index:06d}"


@dataclass(frozen=True)
class UnitJob:
    """What every unit of a build has in common.

    Args:
        work: folder of the unit folders.
        tokenizer: tokenizer folder or model file.
        handling: how sources are read and cleaned.
        heldout_fraction: share of the documents that goes to the split `heldout`, in [0, 1).
        shard_tokens: a shard that holds this many tokens takes no further document.
        dedup: folder of the decisions about duplicates; None if there are none.
        dedup_fingerprint: fingerprint of these decisions.
        duplicates: whether to drop the duplicates, or to keep them in the split of the first.
    """

    work: Path
    tokenizer: Path
    handling: Handling
    heldout_fraction: float
    shard_tokens: int
    dedup: Path | None = None
    dedup_fingerprint: str = ""
    duplicates: Duplicates = "drop"

    def folder(self, unit_index: int) -> Path:
        """Folder of one unit."""
        return self.work / unit_folder_name(unit_index)


@dataclass(frozen=True)
class UnitMark:
    """What a finished unit left behind.

    Args:
        input_bytes: bytes of input that the unit stands for.
        shards: its shards, in the order in which they were begun.
        dropped_sha256: sha256 of its dropped.jsonl.
        report: what was read and dropped.
    """

    input_bytes: int
    shards: tuple[ShardInfo, ...]
    dropped_sha256: str
    report: ReadReport

    def save(self, folder: Path) -> None:
        """Write the mark: from here on the unit is done."""
        values = {
            "input_bytes": self.input_bytes,
            "shards": [asdict(shard) for shard in self.shards],
            "dropped_sha256": self.dropped_sha256,
            "report": self.report.to_dict(),
        }
        write_atomically(folder / MARK_NAME, json.dumps(values).encode())

    @classmethod
    def load(cls, folder: Path) -> "UnitMark | None":
        """Read the mark of a unit; None if it is missing or makes no sense."""
        try:
            values = json.loads((folder / MARK_NAME).read_bytes())
            return cls(
                input_bytes=values["input_bytes"],
                shards=tuple(shard_from_json(shard) for shard in values["shards"]),
                dropped_sha256=values["dropped_sha256"],
                report=ReadReport.from_dict(values["report"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fits(self, folder: Path) -> bool:
        """Whether every file of the unit still has the hash that it was written with."""
        expected = {DROPPED_NAME: self.dropped_sha256}
        for shard in self.shards:
            expected[shard.tokens_file] = shard.tokens_sha256
            expected[shard.doc_ends_file] = shard.doc_ends_sha256
        try:
            return all(_sha256(folder / name) == digest for name, digest in expected.items())
        except OSError:
            return False


@dataclass(frozen=True)
class UnitDone:
    """What a worker tells about a unit: a few numbers, however large the unit was.

    Args:
        index: place of the unit in the plan.
        input_bytes: bytes of input that it stands for.
        num_tokens: tokens in its shards.
        worker: process and host that made it; empty if an earlier run had.
    """

    index: int
    input_bytes: int
    num_tokens: int
    worker: str


def build_unit(job: UnitJob, unit: Unit) -> UnitDone:
    """Make the shards of one unit, unless they are there already.

    Args:
        job: what all units have in common.
        unit: what to read.

    Returns:
        What was done; the mark is on disk.

    Raises:
        UserError: an input cannot be read or has changed, or the disk is full.
    """
    folder = job.folder(unit.index)
    mark, worker = UnitMark.load(folder), ""
    if mark is None or not mark.fits(folder):
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            mark = _make_unit(job, unit, folder)
        worker = f"process {os.getpid()} on {socket.gethostname()}"
    num_tokens = sum(shard.num_tokens for shard in mark.shards)
    return UnitDone(unit.index, mark.input_bytes, num_tokens, worker)


def _make_unit(job: UnitJob, unit: Unit, folder: Path) -> UnitMark:
    with partial_folder(job.work, folder.name) as partial:
        mark = _write_unit(job, unit, partial)
        mark.save(partial)
        publish_folder(partial, folder)
    return mark


def _write_unit(job: UnitJob, unit: Unit, folder: Path) -> UnitMark:
    encoder = _load_encoder(job.tokenizer)
    with ExitStack() as stack:
        log = stack.enter_context((folder / DROPPED_NAME).open("w", encoding="utf-8", newline="\n"))
        report = DropLog(log)
        shards = stack.enter_context(UnitShards(folder, unit.source, job.shard_tokens))
        for batch in _in_batches(_kept_documents(job, unit, report)):
            _write_batch(batch, encoder, shards, report)
        infos = shards.finish()
    plain_report = ReadReport.from_dict(report.to_dict())
    return UnitMark(unit.num_bytes, infos, _sha256(folder / DROPPED_NAME), plain_report)


@dataclass(frozen=True)
class _Batch:
    """Documents that are encoded together, as columns: an object each would keep the collector
    of cycles busy."""

    texts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)

    def add(self, document: Document, split: Split) -> None:
        self.texts.append(document.text)
        self.files.append(document.source)
        self.places.append(document.position)
        self.num_bytes.append(len(document.utf8))
        self.splits.append(split)


def _kept_documents(
    job: UnitJob, unit: Unit, report: ReadReport
) -> Iterator[tuple[Document, Split]]:
    """The documents that neither cleaning nor a deduplication drops, with their splits."""
    decisions = None
    if job.dedup is not None:
        decisions = _load_decisions(job.dedup, job.dedup_fingerprint).of_unit(unit.index)
    for document in kept_documents(unit, job.handling, report):
        digest = split_digest(document.utf8)
        decision = None if decisions is None else decisions.next(digest)
        if decision is not None:
            reason = REASONS[decision.action]
            if decision.action == OVERLAP or job.duplicates == "drop":
                detail = "" if decision.action == OVERLAP else f"cluster {decision.cluster}"
                report.drop(reason, document.source, document.position, detail)
                continue
            report.note(reason, document.source, document.position)
            digest = decision.split
        yield document, split_of(digest, job.heldout_fraction)
    if decisions is not None:
        decisions.finish(f"unit {unit.index} ({unit.parts[0].path} ...)")


def _in_batches(documents: Iterable[tuple[Document, Split]]) -> Iterator[_Batch]:
    """As many documents as are encoded at a time; one document may be as long as it likes."""
    batch, size = _Batch(), 0
    for document, split in documents:
        batch.add(document, split)
        size += document.cost_characters
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = _Batch(), 0
    yield batch


def _write_batch(
    batch: _Batch, encoder: BulkEncoder, shards: "UnitShards", report: ReadReport
) -> None:
    encoded = encoder.encode(batch.texts)
    sizes = np.diff(encoded.text_ends, prepend=0)
    for number in np.flatnonzero(sizes == 0).tolist():
        report.drop("no tokens", batch.files[number], batch.places[number])
    # The others' ids stand end to end, for those that were dropped have none.
    written = np.flatnonzero(sizes)
    ends, numbers = encoded.text_ends[written], written.tolist()
    splits: list[Split] = [batch.splits[number] for number in numbers]
    num_bytes = [batch.num_bytes[number] for number in numbers]
    first = start = 0
    for run_end in _run_ends(splits):
        # A call for every run of one split, not for every document: that would take longer than
        # the hashes do.
        while first < run_end:
            writer = shards.writer(splits[first])
            # The document that fills the shard still belongs to it.
            full = int(np.searchsorted(ends, start + shards.room(writer))) + 1
            last = min(run_end, full)
            end = int(ends[last - 1])
            shard_ends = ends[first:last] + (writer.num_tokens - start)
            writer.write(encoded.ids[start:end])
            writer.end_documents(shard_ends, sum(num_bytes[first:last]))
            first, start = last, end


def _run_ends(splits: Sequence[Split]) -> list[int]:
    """Behind the last document of each run of documents that share a split."""
    changes = [place for place, (a, b) in enumerate(pairwise(splits), start=1) if a != b]
    return [*changes, len(splits)]


class DropLog(ReadReport):
    """A report that also writes every drop down, however many there are.

    Args:
        log: receives one JSON object a line.
    """

    def __init__(self, log: TextIO) -> None:
        super().__init__()
        self._log = log

    def drop(self, reason: str, file: str, place: str = "", detail: str = "", count: int = 1):
        """Count a loss, remember it among the examples and write it down."""
        super().drop(reason, file, place, detail, count)
        entry = {"file": file, "place": place, "reason": reason, "detail": detail, "count": count}
        self._log.write(json.dumps(entry) + "\n")


class UnitShards:
    """The shards of one unit: one open per split, a new one when it is full.

    Use as a context manager: what was not finished is removed.

    Args:
        folder: where they go.
        source: source of the unit.
        shard_tokens: size from which a shard is full.
    """

    def __init__(self, folder: Path, source: str, shard_tokens: int) -> None:
        self._folder, self._source, self._shard_tokens = folder, source, shard_tokens
        self._stack = ExitStack()
        self._writers: dict[Split, ShardWriter] = {}
        self._finished: dict[str, ShardInfo] = {}
        self._num_begun = 0

    def writer(self, split: Split) -> ShardWriter:
        """The shard for the next document of a split."""
        writer = self._writers.get(split)
        if writer is not None and writer.num_tokens >= self._shard_tokens:
            self._close(split)
        if split not in self._writers:
            name = f"shard-{self._num_begun:05d}"
            writer = ShardWriter(self._folder, name, self._source, split)
            self._writers[split] = self._stack.enter_context(writer)
            self._num_begun += 1
        return self._writers[split]

    def room(self, writer: ShardWriter) -> int:
        """Tokens from which a shard of `writer` is full."""
        return self._shard_tokens - writer.num_tokens

    def finish(self) -> tuple[ShardInfo, ...]:
        """Close all shards; those that got no document leave no trace."""
        for split in list(self._writers):
            self._close(split)
        return tuple(info for _, info in sorted(self._finished.items()))

    def _close(self, split: Split) -> None:
        writer = self._writers.pop(split)
        if writer.num_tokens:
            info = writer.finish()
            self._finished[info.name] = info

    def __enter__(self) -> "UnitShards":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@lru_cache(maxsize=1)
def _load_decisions(folder: Path, fingerprint: str) -> Decisions:
    decisions = Decisions.read(folder)
    if decisions.fingerprint != fingerprint:
        raise UserError(
            f"{folder} changed while it was in use: its fingerprint was {fingerprint} when the "
            f"build began and is {decisions.fingerprint} now; start again with another --output"
        )
    return decisions


@lru_cache(maxsize=1)
def _load_encoder(path: Path) -> BulkEncoder:
    return BulkEncoder(Tokenizer.load(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hash_blocks(file)[0]
