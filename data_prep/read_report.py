"""What was read, what was dropped and why: the account that every reader of sources keeps.

- `ReadReport`: exact counts by reason, and a bounded number of places as examples. Reports of
  units are added up in the order of the units, which makes the sum the same for any number of
  workers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

EXAMPLES_PER_FILE = 5
FILES_PER_REASON = 200
MALFORMED = frozenset(
    {
        "damaged file",
        "field given twice",
        "invalid CSV",
        "invalid JSON",
        "invalid UTF-8",
        "JSON value is not an object",
        "missing field",
        "text is not a string",
    }
)
"""Reasons that speak of a source that is broken or is read in a wrong way; the others are limits
that somebody set, or inputs of nothing."""


def _in_words(reason: str, place: str, detail: str) -> str:
    before = f"{place}: " if place else ""
    after = f" ({detail})" if detail else ""
    return f"{before}{reason}{after}"


@dataclass
class ReadReport:
    """Counts of documents read, inputs dropped and oddities met; `a + b` joins two reports."""

    files: int = 0
    """Files opened; one that is shared by several units counts where it begins."""
    documents: int = 0
    """Documents handed on."""
    blank_lines: int = 0
    """Lines of white space between documents; not dropped, since they say nothing."""
    text_bytes: int = 0
    """Their length as UTF-8."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> inputs (files, lines or rows) that gave no document."""
    notes: dict[str, int] = field(default_factory=dict)
    """Oddity -> times it was met; nothing was lost by these."""
    examples: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Reason or oddity -> file -> the first cases, as "line 17: reason (detail)"; bounded."""

    def drop(self, reason: str, file: str, place: str = "", detail: str = "", count: int = 1):
        """Count a loss and remember where it was.

        Args:
            reason: The class of the loss, for example "invalid UTF-8".
            file: The file, as the user would write it.
            place: The place in the file, for example "line 17"; empty for the whole file.
            detail: What exactly was found.
            count: How many inputs were lost.
        """
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self._remember(reason, file, [_in_words(reason, place, detail)])

    def note(self, oddity: str, file: str, place: str = "", detail: str = "", count: int = 1):
        """Count something worth knowing by which nothing was lost; arguments as in `drop`.

        Args:
            oddity: The class, for example "ignored file".
            file: The file, as the user would write it.
            place: The place in the file; empty for the whole file.
            detail: What exactly was found.
            count: How many times.
        """
        self.notes[oddity] = self.notes.get(oddity, 0) + count
        self._remember(oddity, file, [_in_words(oddity, place, detail)])

    def _remember(self, reason: str, file: str, cases: list[str]) -> None:
        # A file's name may hold bytes that no console and no JSON file can.
        file = file.encode("utf-8", "backslashreplace").decode("utf-8")
        files = self.examples.setdefault(reason, {})
        if file in files or len(files) < FILES_PER_REASON:
            known = files.setdefault(file, [])
            known.extend(cases[: EXAMPLES_PER_FILE - len(known)])

    def add(self, other: "ReadReport") -> None:
        """Count what another report counts, too; its examples come behind those that are here.

        Args:
            other: The report of what was read after this.
        """
        self.files += other.files
        self.documents += other.documents
        self.blank_lines += other.blank_lines
        self.text_bytes += other.text_bytes
        for counts, more in ((self.dropped, other.dropped), (self.notes, other.notes)):
            for reason, count in more.items():
                counts[reason] = counts.get(reason, 0) + count
        for reason, files in other.examples.items():
            for file, cases in files.items():
                self._remember(reason, file, cases)

    def __add__(self, other: "ReadReport") -> "ReadReport":
        total = ReadReport.from_dict(self.to_dict())
        total.add(other)
        return total

    @property
    def total_dropped(self) -> int:
        """Inputs that gave no document, over all reasons."""
        return sum(self.dropped.values())

    @property
    def malformed(self) -> dict[str, int]:
        """Broken inputs by reason; those who read them cannot have meant it so."""
        return {reason: count for reason, count in self.dropped.items() if reason in MALFORMED}

    def lines(self) -> Iterator[str]:
        """Tell the remembered cases, one line each.

        Yields:
            For example 'news.jsonl: line 17: missing field (no "text" (has: body, id))'.
        """
        for reason in sorted(self.examples):
            for file, cases in self.examples[reason].items():
                yield from (f"{file}: {case}" for case in cases)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold; `from_dict` reads them back."""
        return {
            "files": self.files,
            "documents": self.documents,
            "blank_lines": self.blank_lines,
            "text_bytes": self.text_bytes,
            "dropped": dict(sorted(self.dropped.items())),
            "notes": dict(sorted(self.notes.items())),
            "examples": {
                reason: {file: list(cases) for file, cases in files.items()}
                for reason, files in sorted(self.examples.items())
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReadReport":
        """Read back what `to_dict` gave.

        Args:
            values: The result of `to_dict`, perhaps after a trip through JSON.

        Returns:
            An equal report that shares nothing with `values`.
        """
        return cls(
            files=values["files"],
            documents=values["documents"],
            blank_lines=values["blank_lines"],
            text_bytes=values["text_bytes"],
            dropped=dict(values["dropped"]),
            notes=dict(values["notes"]),
            examples={
                reason: {file: list(cases) for file, cases in files.items()}
                for reason, files in values["examples"].items()
            },
        )
