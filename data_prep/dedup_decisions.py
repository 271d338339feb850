"""What a deduplication decided, as a folder that `build --dedup` applies.

    FOLDER/dedup.json              what was read and how, counts, clusters, sha256 of the rest
    FOLDER/dedup.sha256            its seal; 64 digits that are the fingerprint of the decisions
    FOLDER/removed.jsonl           every document that goes: file, place, why, what is kept
    FOLDER/decisions.document.npy  uint32  its number in its unit, among those that cleaning kept
    FOLDER/decisions.action.npy    uint8   1 copy, 2 near-duplicate, 3 holds evaluation text
    FOLDER/decisions.cluster.npy   int64   number in the corpus of the document that is kept
    FOLDER/decisions.split.npy     uint64  the kept document's split digest, which decides the split

A document without a decision is kept. Decisions are in the order of the units; `dedup.json` says
how many documents and decisions each unit has, and a digest of its documents.

    Decisions.open(folder)     every byte checked
    decisions.of_unit(index)   for the worker of that unit: `next` for each document, then `finish`
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.errors import CorruptError, UserError
from data_prep.manifest import SourceInfo
from data_prep.npy_files import hash_blocks

DEDUP_NAME = "dedup.json"
SEAL_NAME = "dedup.sha256"
FORMAT_VERSION = 1
COPY, NEAR_COPY, OVERLAP = 1, 2, 3
REASONS = {COPY: "exact duplicate", NEAR_COPY: "near duplicate", OVERLAP: "evaluation overlap"}
Duplicates = Literal["drop", "keep"]
COLUMNS = {"document": "<u4", "action": "|u1", "cluster": "<i8", "split": "<u8"}
_CURE = "deduplicate again with `deberta-prep dedup`, or restore the folder"


def column_file(column: str) -> str:
    """Name of the file of a column."""
    return f"decisions.{column}.npy"


class Decision(NamedTuple):
    """What becomes of a document."""

    action: int
    """One of `REASONS`."""
    cluster: int
    """Number in the corpus of the document that is kept instead."""
    split: int
    """Its split digest."""


class UnitDecisions:
    """The decisions about one unit, asked for document by document.

    Args:
        folder: the folder of the decisions, for messages.
        content: digest that the unit's documents must have.
        columns: the decisions of this unit.
    """

    def __init__(self, folder: Path, content: str, columns: dict[str, np.ndarray]) -> None:
        self._folder, self._content = folder, content
        self._columns = columns
        self._row = self._document = 0
        self._found = hashlib.blake2b(digest_size=16)

    def next(self, split_digest: int) -> Decision | None:
        """What becomes of the next document that cleaning kept.

        Args:
            split_digest: of `splits.split_digest`.

        Returns:
            The decision; None to keep it as it is.
        """
        self._found.update(split_digest.to_bytes(8, "big"))
        documents, row = self._columns["document"], self._row
        here = self._document
        self._document += 1
        if row == documents.size or int(documents[row]) != here:
            return None
        self._row += 1
        action, cluster, split = (
            int(self._columns[column][row]) for column in ("action", "cluster", "split")
        )
        return Decision(action, cluster, split)

    def finish(self, unit_name: str) -> None:
        """Check that the documents were those that the decisions are about.

        Args:
            unit_name: for the message.

        Raises:
            UserError: they were others.
        """
        if self._found.hexdigest() != self._content:
            raise UserError(
                f"{unit_name} does not hold the documents that {self._folder} decided about: a "
                f"source was changed meanwhile, or is read by another version of this program; "
                f"deduplicate again with `deberta-prep dedup`"
            )


@dataclass(frozen=True)
class Decisions:
    """A folder of decisions whose bytes were checked.

    Args:
        folder: the folder.
        fingerprint: sha256 of dedup.json.
        values: what dedup.json holds.
    """

    folder: Path
    fingerprint: str
    values: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Decisions":
        """Check a folder of decisions.

        Args:
            folder: the folder.

        Returns:
            The decisions.

        Raises:
            UserError: there are none in the folder, or of another version.
            CorruptError: a file is not what was written.
        """
        opened = cls.read(folder)
        for name, expected in opened.values["files"].items():
            try:
                with (folder / name).open("rb") as file:
                    found, _ = hash_blocks(file)
            except OSError as error:
                raise CorruptError(
                    f"{folder / name}: cannot be read ({error.strerror}); {_CURE}"
                ) from error
            if found != expected:
                raise CorruptError(
                    f"{folder / name}: its sha256 is not that of {DEDUP_NAME}; {_CURE}"
                )
        return opened

    @classmethod
    def read(cls, folder: Path) -> "Decisions":
        """Read dedup.json alone; arguments and errors as for `open`."""
        if not (folder / SEAL_NAME).is_file():
            raise UserError(
                f"{folder}: no {SEAL_NAME} in it, so it holds no decisions or their making was "
                f"interrupted; run `deberta-prep dedup SOURCE... --output {folder}` (again: it "
                f"continues)"
            )
        try:
            content, seal = (folder / DEDUP_NAME).read_bytes(), (folder / SEAL_NAME).read_bytes()
        except OSError as error:
            raise CorruptError(f"{folder}: cannot be read ({error.strerror}); {_CURE}") from error
        fingerprint = hashlib.sha256(content).hexdigest()
        if seal != seal_of(fingerprint):
            raise CorruptError(f"{folder / DEDUP_NAME}: does not match {SEAL_NAME}; {_CURE}")
        values = json.loads(content)
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder / DEDUP_NAME}: format version {values['format_version']}, but this "
                f"program reads version {FORMAT_VERSION}; deduplicate again"
            )
        return cls(folder, fingerprint, values)

    def refuse_other_input(
        self, sources: tuple[SourceInfo, ...], plan_sha256: str, reading: str
    ) -> None:
        """Check that a build reads what the decisions are about.

        Args:
            sources: the sources of the build.
            plan_sha256: sha256 of its list of units.
            reading: its options of reading and cleaning.

        Raises:
            UserError: it does not; the message says in what they differ.
        """
        now = {
            "sources": [[source.name, source.input_bytes, source.options] for source in sources],
            "reading": reading,
            "plan_sha256": plan_sha256,
        }
        differences = [
            f"  {key}\n    decided about: {self.values[key]}\n    to be built:   {value}"
            for key, value in now.items()
            if self.values[key] != value
        ]
        if differences:
            raise UserError(
                f"--dedup {self.folder} was decided about another input:\n"
                + "\n".join(differences)
                + "\nName the same sources, in the same order and with the same options, or "
                "deduplicate again with `deberta-prep dedup`"
            )

    def of_unit(self, unit_index: int) -> UnitDecisions:
        """The decisions about one unit.

        Args:
            unit_index: place of the unit in the plan.

        Returns:
            The decisions, from the first document on.
        """
        ends = np.cumsum([unit["decisions"] for unit in self.values["units"]])
        unit = self.values["units"][unit_index]
        here = slice(int(ends[unit_index]) - unit["decisions"], int(ends[unit_index]))
        columns = {
            column: np.load(self.folder / column_file(column), mmap_mode="r")[here]
            for column in COLUMNS
        }
        return UnitDecisions(self.folder, unit["content"], columns)


def seal_of(fingerprint: str) -> bytes:
    """The line that sha256sum prints for dedup.json."""
    return f"{fingerprint}  {DEDUP_NAME}\n".encode()
