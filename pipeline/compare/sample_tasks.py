"""Two labelled tasks made of the embedded corpus: a comparison can be tried without a network.

    python -m pipeline.compare.sample_tasks OUTPUT

    OUTPUT/speaker/{train,test}.jsonl        a paragraph -> the president who spoke it
    OUTPUT/punctuation/{train,test}.conll    words in lower case -> the mark behind each

Every fifth paragraph of a speech is for testing. Systems that are pre-trained on the corpus have
read the test paragraphs too, without labels and all of them alike.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from data_prep.errors import EXIT_USAGE

_EVERY = 5
_LEAST_WORDS = 8
_FIRST_YEAR_OF_THE_SON = 2001
_MARKS = {",": "COMMA", ";": "COMMA", ":": "COMMA", ".": "STOP", "?": "STOP", "!": "STOP"}


def paragraphs() -> Iterator[tuple[str, str, bool]]:
    """Read the embedded corpus, but for its shortest paragraphs.

    Yields:
        Speaker, paragraph, and whether it is for testing.
    """
    speeches = resources.files("data_prep") / "samples" / "speeches"
    for speech in sorted(speeches.iterdir(), key=lambda entry: entry.name):
        year, _, speaker = speech.name.removesuffix(".txt").partition("-")
        if speaker == "Bush":
            speaker += " (son)" if int(year) >= _FIRST_YEAR_OF_THE_SON else " (father)"
        lines = speech.read_text(encoding="utf-8").splitlines()
        long_lines = [line for line in lines if len(line.split()) >= _LEAST_WORDS]
        for number, line in enumerate(long_lines, start=1):
            yield speaker, line, number % _EVERY == 0


def tagged_words(paragraph: str) -> list[tuple[str, str]]:
    """Take the marks off the words of a paragraph.

    Args:
        paragraph: Running text.

    Returns:
        (word in lower case, COMMA, STOP or O), one for each word with a letter or a digit.
    """
    pairs = []
    for word in paragraph.split():
        core = re.sub(r"^\W+|\W+$", "", word).lower()
        marks = [mark for mark in re.sub(r"^.*\w", "", word) if mark in _MARKS]
        if core:
            pairs.append((core, _MARKS[marks[0]] if marks else "O"))
        elif marks and pairs:
            pairs[-1] = (pairs[-1][0], _MARKS[marks[0]])
    return pairs


def write_sample_tasks(output: Path) -> None:
    """Write both tasks.

    Args:
        output: Folder to make, or one that this function has made.
    """
    for is_test, name in ((False, "train"), (True, "test")):
        chosen = [(speaker, text) for speaker, text, test in paragraphs() if test == is_test]
        lines = [json.dumps({"text": text, "label": speaker}) for speaker, text in chosen]
        _write(output / "speaker" / f"{name}.jsonl", lines)
        sentences = ["\n".join(map(" ".join, tagged_words(text))) + "\n" for _, text in chosen]
        _write(output / "punctuation" / f"{name}.conll", sentences)


def _write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m pipeline.compare.sample_tasks OUTPUT", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    write_sample_tasks(Path(sys.argv[1]))
