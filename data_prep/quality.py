"""Rules that tell running text from the rest of a crawl: those of Gopher and of C4.

- `gopher_failure`: lengths, symbols, bullets, letters and stop words of a document.
- `repetition_failure`: lines, paragraphs and word n-grams that come again and again.
- `c4_lines`: the lines of a page that C4 would keep, or why it drops the page.

Words are what stands between white space. The rules are about English and about pages of the web;
the limits are those of the papers.

Source:
    Rae et al., arXiv:2112.11446, section A.1.1 and table A1 (Gopher); Raffel et al.,
    arXiv:1910.10683, section 2.2 (C4), whose list of bad words is left out.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

GOPHER_WORDS = (50, 100_000)
GOPHER_MEAN_LENGTH = (3.0, 10.0)
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
TOP_NGRAM_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAM_SHARES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
C4_SENTENCES = 5
C4_LINE_WORDS = 3

_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s|$)")
_TERMINAL = (".", "!", "?", '"', "\u201d")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_MAX_WORD_CHARACTERS = 1000


def gopher_failure(text: str) -> str | None:
    """Name the first of Gopher's quality rules that a document breaks.

    Args:
        text: The document.

    Returns:
        The rule in a few words with what was found, or None if it breaks none.
    """
    words = text.split()
    count = len(words)
    low, high = GOPHER_WORDS
    if not low <= count <= high:
        return f"{count} words, {low} to {high} are kept"
    mean = sum(map(len, words)) / count
    low_mean, high_mean = GOPHER_MEAN_LENGTH
    if not low_mean <= mean <= high_mean:
        return f"words of {mean:.1f} characters on average, {low_mean:g} to {high_mean:g} are kept"
    ellipses = text.count("...") + text.count("\u2026")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shares = (
        ("hash signs a word", text.count("#") / count, 0.1),
        ("ellipses a word", ellipses / count, 0.1),
        ("of the lines begin with a bullet", _share(lines, _is_bullet), 0.9),
        ("of the lines end in an ellipsis", _share(lines, _ends_in_ellipsis), 0.3),
    )
    for what, share, limit in shares:
        if share > limit:
            return f"{share:.0%} {what}, {limit:.0%} at most"
    lettered = _share(words, _LETTER.search)
    if lettered < 0.8:
        return f"{lettered:.0%} of the words have a letter, 80% at least"
    found = STOP_WORDS.intersection(map(str.lower, words))
    return None if len(found) >= 2 else f"{len(found)} of {len(STOP_WORDS)} stop words, 2 at least"


def _share(items: Sequence[str], test: Callable[[str], object]) -> float:
    return sum(1 for item in items if test(item)) / max(1, len(items))


def _is_bullet(line: str) -> bool:
    return line.startswith(("\u2022", "-", "*"))


def _ends_in_ellipsis(line: str) -> bool:
    return line.endswith(("...", "\u2026"))


def repetition_failure(text: str) -> str | None:
    """Name the first of Gopher's repetition rules that a document breaks.

    Args:
        text: The document.

    Returns:
        The rule in a few words with what was found, or None if it breaks none.
    """
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    characters = max(1, len(text.strip()))
    for name, parts in (("lines", lines), ("paragraphs", paragraphs)):
        again = [part for part, count in Counter(parts).items() for _ in range(count - 1)]
        if len(again) > 0.3 * len(parts):
            return f"{len(again) / len(parts):.0%} of the {name} are repeated, 30% at most"
        if sum(map(len, again)) > 0.2 * characters:
            share = sum(map(len, again)) / characters
            return f"{share:.0%} of the characters are in repeated {name}, 20% at most"
    words = text.split()
    for size, limit in TOP_NGRAM_SHARES.items():
        share = _top_ngram_characters(words, size) / characters
        if share > limit:
            return f"{share:.0%} of the characters are one {size}-gram, {limit:.0%} at most"
    for size, limit in REPEATED_NGRAM_SHARES.items():
        share = _repeated_ngram_characters(words, size) / characters
        if share > limit:
            return (
                f"{share:.0%} of the characters are in repeated {size}-grams, {limit:.0%} at most"
            )
    return None


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[n:] for n in range(size)), strict=False))


def _top_ngram_characters(words: Sequence[str], size: int) -> int:
    """Characters in the n-gram that covers most; one that occurs once repeats nothing."""
    counts = Counter(_ngrams(words, size))
    return max(
        (count * sum(map(len, ngram)) for ngram, count in counts.items() if count > 1), default=0
    )


def _repeated_ngram_characters(words: Sequence[str], size: int) -> int:
    """Characters of the words that lie in an n-gram that occurs twice, each word counted once."""
    ngrams = _ngrams(words, size)
    counts = Counter(ngrams)
    total = covered = 0
    for start, ngram in enumerate(ngrams):
        if counts[ngram] > 1:
            total += sum(map(len, words[max(start, covered) : start + size]))
            covered = start + size
    return total


class KeptLines(NamedTuple):
    """What C4's rules leave of a page."""

    text: str | None
    """Its kept lines; None if the page is dropped."""
    removed: dict[str, int]
    """Rule -> lines that it removed."""
    failure: str
    """Why the page is dropped; empty if it is not."""


def c4_lines(text: str) -> KeptLines:
    """Keep the lines of a page that read like sentences.

    Args:
        text: The page.

    Returns:
        The lines that are kept, without marks of citations, and counts of the others; or why the
        page is dropped: braces, "lorem ipsum", or fewer than five sentences in what is left.
    """
    removed: Counter[str] = Counter()
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        return KeptLines(None, {}, 'holds "lorem ipsum"')
    if "{" in text:
        return KeptLines(None, {}, "holds a curly bracket")
    kept: list[str] = []
    for line in text.splitlines():
        line = _CITATION.sub("", line).strip()
        reason = _c4_line_failure(line)
        if reason:
            removed[reason] += 1
        elif line:
            kept.append(line)
    sentences = sum(len(_SENTENCE_END.findall(line)) for line in kept)
    if sentences < C4_SENTENCES:
        failure = f"{sentences} sentences in lines that are kept, {C4_SENTENCES} at least"
        return KeptLines(None, dict(removed), failure)
    return KeptLines("\n".join(kept), dict(removed), "")


def _c4_line_failure(line: str) -> str | None:
    if not line:
        return None
    words = line.split()
    lowered = line.lower()
    if not line.endswith(_TERMINAL) or line.endswith("..."):
        return "line without an end mark removed"
    if len(words) < C4_LINE_WORDS:
        return "line of few words removed"
    if max(map(len, words)) > _MAX_WORD_CHARACTERS:
        return "line with an endless word removed"
    if "javascript" in lowered:
        return "line about JavaScript removed"
    if _POLICY.search(lowered):
        return "line about terms of use removed"
    return None
