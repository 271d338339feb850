"""Repair of texts, the length filter, and the division of long texts; pure and deterministic.

- `repair_text`: characters that no tokenizer should see are removed, and counted.
- `clean_document`: repair and filter of one document, accounted for in its `ReadReport`.
- `split_long`: a text as the chunks that are encoded, each alone. Normative: the chunks decide
  the ids, so that another cut would be another dataset format.
"""

import re
from dataclasses import dataclass, replace

from data_prep.documents import Document
from data_prep.errors import UserError
from data_prep.read_report import ReadReport

CHUNK_BYTES = 256 << 10
"""Longest chunk that is encoded at once, in bytes as UTF-8."""

_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85]")
_CONTROL_BYTES = bytes(set(range(32)) - {9, 10} | {127})
_C1_BYTES = re.compile(b"\xc2[\x80-\x9f]")
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class CleaningOptions:
    """Which documents are kept."""

    min_characters: int = 1
    """Shorter documents are dropped; in characters after repair, white space around not counted."""

    def __post_init__(self) -> None:
        if self.min_characters < 1:
            raise UserError(
                f"the least number of characters is {self.min_characters}; it must be 1 or more"
            )


@dataclass(frozen=True)
class RepairedText:
    """A text fit for a tokenizer, and what had to go."""

    text: str
    removed: dict[str, int]
    """Class of characters -> how many were removed; empty for a sound text."""


def repair_text(text: str) -> RepairedText:
    """Remove what is not text from a text.

    Carriage returns, vertical tabs, form feeds and U+0085 become line feeds ("\\r\\n" one of them);
    NUL, the other control characters but the tab, and lone surrogates are removed.

    Args:
        text: Any string, lone surrogates included.

    Returns:
        The text, which now encodes as UTF-8, and the counts of what was removed.
    """
    if _is_sound(text):
        return RepairedText(text, {})
    text = _LINE_ENDS.sub("\n", text)
    unwanted = _UNWANTED.findall(text)
    if not unwanted:
        return RepairedText(text, {})
    removed: dict[str, int] = {}
    for character in unwanted:
        kind = _class_of(character)
        removed[kind] = removed.get(kind, 0) + 1
    return RepairedText(_UNWANTED.sub("", text), removed)


def _is_sound(text: str) -> bool:
    """Tell that nothing is to be repaired, ten times as fast as a search through the text does."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return len(data.translate(None, _CONTROL_BYTES)) == len(data) and not _C1_BYTES.search(data)


def _class_of(character: str) -> str:
    if character == "\x00":
        return "NUL character removed"
    if "\ud800" <= character <= "\udfff":
        return "lone surrogate removed"
    return "control character removed"


def clean_document(
    document: Document, options: CleaningOptions, report: ReadReport
) -> Document | None:
    """Repair one document and decide whether it is kept.

    Args:
        document: As it was read.
        options: Which documents are kept.
        report: Where removed characters and dropped documents are counted.

    Returns:
        The document with its repaired text, or None if it is too short.
    """
    repaired = repair_text(document.text)
    for kind, count in repaired.removed.items():
        report.note(kind, document.source, document.position, count=count)
    length = len(repaired.text.strip())
    if length < options.min_characters:
        detail = f"{length} characters, {options.min_characters} are asked for"
        report.drop("too short", document.source, document.position, detail)
        return None
    return replace(document, text=repaired.text)


def split_long(text: str, limit: int = CHUNK_BYTES) -> list[str]:
    """Divide a text into the chunks that are encoded, each alone.

    A chunk is the longest run of at most `limit` bytes that ends behind a space, tab or line feed;
    where there is none, the longest run of whole characters. SentencePiece's pieces never cross
    white space, so that only a word above the limit could be encoded differently as a whole.

    Args:
        text: Any string.
        limit: Longest chunk in bytes as UTF-8; at least 4, the longest character.

    Returns:
        The chunks; joined together they are the text. None for an empty text.

    Raises:
        ValueError: `limit` is below 4.
    """
    if limit < 4:
        raise ValueError(f"limit {limit} is shorter than a character")
    if not text:
        return []
    if 4 * len(text) <= limit:
        return [text]
    # Lone surrogates pass through, so that the function is total.
    data = text.encode("utf-8", "surrogatepass")
    chunks: list[str] = []
    start = 0
    while len(data) - start > limit:
        end = start + limit
        cut = max(data.rfind(mark, start, end) for mark in (b" ", b"\t", b"\n")) + 1
        if not cut:
            cut = end
            while data[cut] & 0xC0 == 0x80:
                cut -= 1
        chunks.append(data[start:cut].decode("utf-8", "surrogatepass"))
        start = cut
    chunks.append(data[start:].decode("utf-8", "surrogatepass"))
    return chunks
