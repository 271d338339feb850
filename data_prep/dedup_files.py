"""What the steps of a deduplication leave for each other in its work folder.

    WORK/sketch-000012/           one unit: digests, bands and shingles of its documents, in parts
        sketch.json               `UnitSketch`
        overlaps.jsonl            documents that hold evaluation text
        00000.documents.npy ...   `PART_FILES`; a part is at most some 131,072 documents
    WORK/copies-00003/            one range of digests: documents that are copies of earlier ones
    WORK/copied/copies.npy        bool [documents], which ones are copies
    WORK/pairs-00003/             one range of band hashes: pairs that may be near-duplicates
    WORK/edges-00012/             one part: those of its pairs that are
    WORK/clusters/                the first document of each one's cluster, and the report
    WORK/decisions-000012/        one unit: what becomes of its documents

Each folder appears whole or not at all (`partial_folders`), and is a function of the input; so a
step that finds the folder has nothing to do, and any process may do any step.

Documents are numbered through the corpus, in the order of the units. A pair (a, b) of N documents
is the one number a N + b.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.partial_folders import disk_errors, partial_folder, publish_folder
from data_prep.read_report import ReadReport

SKETCH_NAME = "sketch.json"
OVERLAPS_NAME = "overlaps.jsonl"
COPIES_FILE = "copied/copies.npy"
PART_FILES = {
    "documents": "one record a document: split digest, file, place, whether it is removed",
    "digests": "uint64 [n, 2], increasing: digests of the documents that are not removed",
    "digest_documents": "uint32 [n]: the document of each",
    "bands": "uint64 [m], increasing: band hashes of the documents that have shingles",
    "band_documents": "uint32 [m]: the document of each",
    "shingles": "uint32 [s]: shingles, document after document",
    "shingle_ends": "int64 [d]: where those of each document end",
}
Pairs = NDArray[np.int64]


def sketch_name(unit_index: int) -> str:
    """Name of the folder of a unit's sketch."""
    return f"sketch-{unit_index:06d}"


def decisions_name(unit_index: int) -> str:
    """Name of the folder of a unit's decisions."""
    return f"decisions-{unit_index:06d}"


@contextmanager
def step_folder(work: Path, name: str) -> Iterator[Path]:
    """Fill the folder of a step, for the body of a `with`; it appears when the body ends well.

    Args:
        work: the work folder.
        name: name of the folder.

    Yields:
        A folder of another name.

    Raises:
        UserError: the disk is full.
    """
    with disk_errors(work), partial_folder(work, name) as partial:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        publish_folder(partial, work / name)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as a .npy file."""
    np.save(path, array, allow_pickle=False)


def load_array(path: Path) -> NDArray[Any]:
    """Open an array of `save_array`; what is used of it is read then."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def new_array(path: Path, kind: str, count: int) -> np.memmap:
    """An array of zeros that lies in a file.

    Args:
        path: the file; replaced if it exists.
        kind: type of the values.
        count: how many.

    Returns:
        The array; `flush` makes it what others read.
    """
    return np.lib.format.open_memmap(path, "w+", np.dtype(kind), (count,))


@dataclass(frozen=True)
class UnitSketch:
    """What is known about a unit when its documents were read.

    Args:
        index: place of the unit in the plan.
        documents: documents that cleaning kept.
        parts: documents and band hashes of each part.
        files: files of the documents; records point here.
        content: digest of the split digests of all documents, in hexadecimal.
        overlaps: documents that hold evaluation text.
        report: what was read and dropped.
    """

    index: int
    documents: int
    parts: tuple[tuple[int, int], ...]
    files: tuple[str, ...]
    content: str
    overlaps: int
    report: ReadReport

    def save(self, folder: Path) -> None:
        """Write the sketch's own file."""
        values = {**asdict(self), "report": self.report.to_dict()}
        (folder / SKETCH_NAME).write_text(json.dumps(values), encoding="ascii")

    @classmethod
    def load(cls, work: Path, unit_index: int) -> "UnitSketch":
        """Read the sketch of a unit that was finished."""
        values = json.loads((work / sketch_name(unit_index) / SKETCH_NAME).read_bytes())
        values["parts"] = tuple((documents, bands) for documents, bands in values["parts"])
        values["files"] = tuple(values["files"])
        values["report"] = ReadReport.from_dict(values["report"])
        return cls(**values)


@dataclass(frozen=True)
class Parts:
    """All parts of all units, in the order of the corpus, and where they are.

    Args:
        work: the work folder.
        rows: int64 [parts, 3]: unit, number in the unit, first document; one more row ends them.
    """

    work: Path
    rows: NDArray[np.int64]

    @classmethod
    def of_units(cls, work: Path, sketches: list[UnitSketch]) -> "Parts":
        """Number the documents of all units through.

        Args:
            work: the work folder.
            sketches: of all units, in order.

        Returns:
            The parts.
        """
        rows, first = [], 0
        for sketch in sketches:
            for number, (documents, _) in enumerate(sketch.parts):
                rows.append((sketch.index, number, first))
                first += documents
        rows.append((len(sketches), 0, first))
        return cls(work, np.array(rows, np.int64))

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def num_documents(self) -> int:
        """Documents of the corpus."""
        return int(self.rows[-1, 2])

    def documents(self, part: int) -> range:
        """The documents of a part."""
        return range(int(self.rows[part, 2]), int(self.rows[part + 1, 2]))

    def of_unit(self, unit_index: int) -> range:
        """The parts of a unit."""
        first, end = np.searchsorted(self.rows[:-1, 0], [unit_index, unit_index + 1])
        return range(int(first), int(end))

    def part_of(self, documents: NDArray[np.int64]) -> NDArray[np.intp]:
        """The part of each document."""
        return np.searchsorted(self.rows[1:, 2], documents, side="right")

    def load(self, part: int, name: str) -> NDArray[Any]:
        """Open one of the `PART_FILES` of a part."""
        unit, number, _ = self.rows[part].tolist()
        return load_array(self.work / sketch_name(unit) / part_file(number, name))


def part_file(number: int, name: str) -> str:
    """Name of a file of a part, in the folder of its unit."""
    assert name in PART_FILES, name
    return f"{number:05d}.{name}.npy"
