"""How each source is read and cleaned: one way for all of them, or ways of their own.

- `Handling`, `SourceHandling`: the options of every source, by its name.
- `kept_documents`: the documents of a unit as they are to be encoded, the same for `build` and
  for `dedup`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.cleaning import CleaningOptions, clean_document
from data_prep.documents import Document, ReadOptions, Unit, read_unit
from data_prep.read_report import ReadReport


@dataclass(frozen=True)
class SourceHandling:
    """How a source is read and cleaned."""

    read: ReadOptions = field(default_factory=ReadOptions)
    """How its files become documents."""
    cleaning: CleaningOptions = field(default_factory=CleaningOptions)
    """What is done to these, and which are kept."""

    def words(self) -> list[str]:
        """The options as pairs of words of the command line, none left to its default."""
        return [
            *("--text-field", self.read.text_field),
            *("--txt-document", self.read.txt_document),
            *("--max-document-bytes", str(self.read.max_document_bytes)),
            *self.cleaning.words(),
        ]


@dataclass(frozen=True)
class Handling:
    """How all sources are read and cleaned."""

    default: SourceHandling = field(default_factory=SourceHandling)
    """The way of every source that has none of its own."""
    others: tuple[tuple[str, SourceHandling], ...] = ()
    """Sources with ways of their own."""

    def of(self, source: str) -> SourceHandling:
        """Look up a source.

        Args:
            source: As the user named it.

        Returns:
            How it is read and cleaned.
        """
        return dict(self.others).get(source, self.default)

    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions decide what cleaning does, in the order of their names."""
        ways = (self.default, *(way for _, way in self.others))
        return tuple(sorted({name for way in ways for name in way.cleaning.packages()}))


def kept_documents(unit: Unit, handling: Handling, report: ReadReport) -> Iterator[Document]:
    """Read and clean the documents of a unit.

    Args:
        unit: What to read.
        handling: How.
        report: Where everything that is read, dropped or odd is counted.

    Yields:
        The documents that are kept, in order.

    Raises:
        UserError: A file cannot be read, or is not the one that was planned.
    """
    way = handling.of(unit.source)
    for document in read_unit(unit, way.read, report):
        kept = clean_document(document, way.cleaning, report)
        if kept is not None:
            yield kept
