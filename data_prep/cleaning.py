"""Repair of texts, the rules by which they are kept, and the division of long ones; deterministic.

- `CleaningOptions`: what is repaired, masked and asked of a document.
- `repair_text`: characters that no tokenizer should see are removed, and counted.
- `clean_document`: everything that is done to one document, accounted for in its `ReadReport`.
- `split_long`: a text as the chunks that are encoded, each alone. Normative: the chunks decide
  the ids, so that another cut would be another dataset format.

Rules are in `quality`, addresses in `private_data`, languages in `language`. The order is:
decoding, control characters, C4's lines, masks, lengths, Gopher's rules, language.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from data_prep.documents import Document
from data_prep.errors import UserError
from data_prep.language import identify_language, known_languages
from data_prep.private_data import mask_emails, mask_ips
from data_prep.quality import c4_lines, gopher_failure, repetition_failure
from data_prep.read_report import ReadReport

CHUNK_BYTES = 256 << 10
"""Longest chunk that is encoded at once, in bytes as UTF-8."""

_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85]")
_CONTROL_BYTES = bytes(set(range(32)) - {9, 10} | {127})
_C1_LEAD = b"\xc2"
_C1_BYTES = re.compile(_C1_LEAD + b"[\x80-\x9f]")
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


Rules = Literal["gopher", "repetition", "c4"]
Masks = Literal["email", "ip"]


@dataclass(frozen=True)
class CleaningOptions:
    """What is done to documents, and which are kept."""

    min_characters: int = 1
    """Shorter documents are dropped; in characters after repair, white space around not counted."""
    max_characters: int | None = None
    """Longer documents are dropped; None for no limit."""
    fix_unicode: bool = False
    """Whether text that was decoded wrongly once ("schÃ¶n") is put right, by ftfy."""
    rules: tuple[Rules, ...] = ()
    """Quality rules that a document must not break; `c4` also removes lines."""
    masks: tuple[Masks, ...] = ()
    """Addresses that are replaced by words."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages that are kept; all if empty."""
    min_language_probability: float = 0.5
    """Below it the language counts as unknown."""

    def __post_init__(self) -> None:
        if self.min_characters < 1:
            raise UserError(
                f"the least number of characters is {self.min_characters}; it must be 1 or more"
            )
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise UserError(
                f"the largest number of characters, {self.max_characters}, is below the least, "
                f"{self.min_characters}; raise it"
            )
        if not 0 <= self.min_language_probability <= 1:
            raise UserError(
                f"the least probability of a language is {self.min_language_probability}; it must "
                f"lie between 0 and 1"
            )
        for name, given, known in (
            ("rule", self.rules, get_args(Rules)),
            ("mask", self.masks, get_args(Masks)),
        ):
            for value in given:
                if value not in known or given.count(value) > 1:
                    raise UserError(
                        f'{name} "{value}" is unknown or named twice; there are {", ".join(known)}'
                    )
        if self.languages:
            known = known_languages()
            for code in self.languages:
                if code not in known:
                    raise UserError(
                        f'language "{code}" is not known to py3langid; it knows '
                        f"{' '.join(sorted(known))}"
                    )
        if self.fix_unicode:
            _fixer()

    @classmethod
    def parse(cls, words: Sequence[str], min_characters: int = 1) -> "CleaningOptions":
        """Read the words of `--clean`.

        Args:
            words: Each a rule, a mask, "fix-unicode", "language=CODE[,CODE]",
                "min-language-probability=P" or "max-characters=N".
            min_characters: As the field.

        Returns:
            The options.

        Raises:
            UserError: A word is unknown, named twice, or its value impossible.
        """
        given: dict[str, Any] = {"rules": (), "masks": ()}
        for word in words:
            key, _, value = word.partition("=")
            if word in get_args(Rules):
                given["rules"] += (word,)
            elif word in get_args(Masks):
                given["masks"] += (word,)
            elif key not in _VALUES or bool(value) == (key == "fix-unicode"):
                raise UserError(f"--clean {word} is unknown; there are {', '.join(CLEANING_WORDS)}")
            elif _VALUES[key][0] in given:
                raise UserError(f"--clean {key} is given twice; give it once")
            else:
                field, convert = _VALUES[key]
                try:
                    given[field] = convert(value)
                except ValueError as error:
                    raise UserError(f"--clean {word}: {value} is not a number") from error
        return cls(min_characters=min_characters, **given)

    def words(self) -> list[str]:
        """The options as pairs of words of a command line; `parse` reads those of --clean."""
        clean = [*self.rules, *self.masks]
        clean += ["fix-unicode"] * self.fix_unicode
        if self.max_characters is not None:
            clean.append(f"max-characters={self.max_characters}")
        if self.languages:
            clean.append(f"language={','.join(self.languages)}")
            clean.append(f"min-language-probability={self.min_language_probability}")
        pairs = [word for each in clean for word in ("--clean", each)]
        return ["--min-characters", str(self.min_characters), *pairs]

    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions decide what these options do."""
        return ("ftfy",) * self.fix_unicode + ("py3langid",) * bool(self.languages)


_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "fix-unicode": ("fix_unicode", lambda _: True),
    "max-characters": ("max_characters", int),
    "language": ("languages", lambda value: tuple(value.split(","))),
    "min-language-probability": ("min_language_probability", float),
}
CLEANING_WORDS = (
    *get_args(Rules),
    *get_args(Masks),
    "fix-unicode",
    "max-characters=N",
    "language=CODE,...",
    "min-language-probability=P",
)
"""What --clean takes, in words for messages."""


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
    text = _LINE_ENDS.sub("\n", text)
    unwanted = _UNWANTED.findall(text)
    if not unwanted:
        return RepairedText(text, {})
    removed: dict[str, int] = {}
    for character in unwanted:
        kind = _class_of(character)
        removed[kind] = removed.get(kind, 0) + 1
    return RepairedText(_UNWANTED.sub("", text), removed)


def _is_sound(document: Document) -> bool:
    """Tell that nothing is to be repaired, ten times as fast as a search through the text does."""
    try:
        data = document.utf8
    except UnicodeEncodeError:
        return False
    if len(data.translate(None, _CONTROL_BYTES)) != len(data):
        return False
    return _C1_LEAD not in data or not _C1_BYTES.search(data)


def _class_of(character: str) -> str:
    if character == "\x00":
        return "NUL character removed"
    if "\ud800" <= character <= "\udfff":
        return "lone surrogate removed"
    return "control character removed"


def clean_document(
    document: Document, options: CleaningOptions, report: ReadReport
) -> Document | None:
    """Repair and mask one document, and decide whether it is kept.

    Args:
        document: As it was read.
        options: What is done and asked.
        report: Where repairs, masks and dropped documents are counted.

    Returns:
        The document with its text as it is to be encoded, or None if it is dropped.
    """
    where = (document.source, document.position)
    if options.fix_unicode and (fixed := _fixer()(document.text)) != document.text:
        document = replace(document, text=fixed)
        report.note("decoding repaired", *where)
    text = document.text
    if not _is_sound(document):
        repaired = repair_text(text)
        text = repaired.text
        for kind, count in repaired.removed.items():
            report.note(kind, *where, count=count)
    if "c4" in options.rules:
        lines = c4_lines(text)
        for kind, count in lines.removed.items():
            report.note(kind, *where, count=count)
        if lines.text is None:
            report.drop("C4 rule", *where, lines.failure)
            return None
        text = lines.text
    for mask in options.masks:
        text, count = _MASKERS[mask](text)
        if count:
            report.note(f"{mask} address masked", *where, count=count)
    dropped = _reason_to_drop(text, options)
    if dropped is not None:
        report.drop(dropped[0], *where, dropped[1])
        return None
    return document if text is document.text else replace(document, text=text)


_MASKERS: dict[Masks, Callable[[str], tuple[str, int]]] = {"email": mask_emails, "ip": mask_ips}


def _reason_to_drop(text: str, options: CleaningOptions) -> tuple[str, str] | None:
    """The class of the first thing that speaks against a text, and what was found."""
    length = len(text.strip())
    if length < options.min_characters:
        return "too short", f"{length} characters, {options.min_characters} are asked for"
    if options.max_characters is not None and length > options.max_characters:
        return "too many characters", f"{length}, {options.max_characters} at most"
    if "gopher" in options.rules and (failure := gopher_failure(text)):
        return "Gopher quality rule", failure
    if "repetition" in options.rules and (failure := repetition_failure(text)):
        return "Gopher repetition rule", failure
    if options.languages:
        code, probability = identify_language(text)
        known = probability >= options.min_language_probability
        if not known or code not in options.languages:
            return "language", f"{code} with probability {probability:.2f}"
    return None


@lru_cache(maxsize=1)
def _fixer() -> Callable[[str], str]:
    try:
        from ftfy import TextFixerConfig, fix_text
    except ImportError as error:
        raise UserError(
            "--clean fix-unicode needs the package ftfy; install it with pip install '.[clean]'"
        ) from error
    # Widths, ligatures and normal forms are the business of the tokenizer's normalization; quotes
    # and entities are what somebody wrote.
    config = TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        explain=False,
    )
    return lambda text: fix_text(text, config)


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
