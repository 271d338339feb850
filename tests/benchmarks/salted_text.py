"""Text for benchmarks: the embedded corpus again and again, each time with words respelled.

Without that, a cache of words or a search for duplicates would see a corpus that repeats itself.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from data_prep.build import BuildReport, build
from data_prep.build_plan import BuildOptions
from data_prep.documents import ReadOptions, ReadReport, embedded_corpus
from data_prep.tokenizer_training import TrainingOptions, train_tokenizer_from_sources

PIECES = 8_000
DOCUMENT_CHARACTERS = 3_000
RESPELLED_SHARE = 0.1


class InProcess:
    """An executor without processes, whose start would be measured along."""

    def run(self, task, items):
        yield from map(task, items)


def paragraphs() -> Iterator[str]:
    """The lines of the embedded corpus."""
    for path in sorted(embedded_corpus().rglob("*.txt")):
        yield from path.read_text(encoding="utf-8").splitlines()


def respell(text: str, rng: random.Random) -> str:
    """Shuffle the letters of some words."""
    words = [
        "".join(rng.sample(word, len(word))) if rng.random() < RESPELLED_SHARE else word
        for word in text.split(" ")
    ]
    return " ".join(words)


def documents(num_bytes: int) -> Iterator[str]:
    """Documents of a few kilobytes, until there are so many bytes."""
    done, repetition, lines = 0, 0, []
    while True:
        rng = random.Random(repetition)
        for line in paragraphs():
            lines.append(respell(line, rng) if repetition else line)
            if sum(map(len, lines)) >= DOCUMENT_CHARACTERS:
                text = "\n".join(lines)
                yield text
                done += len(text.encode())
                lines = []
                if done >= num_bytes:
                    return
        repetition += 1


def write_jsonl(path: Path, num_bytes: int) -> list[str]:
    """Write documents as {"text": ...} lines; returns their texts."""
    texts = list(documents(num_bytes))
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def train_tokenizer(folder: Path) -> None:
    """A unigram model of the embedded corpus, with its Hugging Face files."""
    train_tokenizer_from_sources(
        [str(embedded_corpus())],
        folder,
        TrainingOptions(PIECES),
        ReadOptions(txt_document="line"),
        ReadReport(),
    )


def build_dataset(
    source: Path, tokenizer: Path, output: Path, heldout_fraction: float = 0.0
) -> BuildReport:
    """`deberta-prep build` with one worker, in this process; by default nothing is held out."""
    options = BuildOptions(heldout_fraction=heldout_fraction)
    return build([str(source)], tokenizer, output, options, InProcess())
