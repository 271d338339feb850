"""What a dataset folder says about itself: `manifest.json`, sealed by `manifest.sha256`.

    Manifest.load(folder)   seal first, then version, then every value; errors name the file
    Manifest.save(folder)   manifest.json, then manifest.sha256; each atomically and on disk
    Manifest, ShardInfo, FileInfo, SourceInfo   frozen values, no behaviour beyond sums

The seal has the layout of `sha256sum`, so `sha256sum -c manifest.sha256` works without this
program; its 64 hexadecimal digits are the fingerprint of the dataset. Every other file is reached
through a hash in the manifest, so one flipped byte anywhere has somewhere to show. Names in a
manifest come from outside and become paths, so they are checked before they do.
"""

import dataclasses
import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from data_prep.errors import CorruptError, UserError

FORMAT_VERSION = 1
BLOCK_BYTES = 4 * 2**20
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.sha256"
TOKENIZER_FOLDER = "tokenizer"

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

SHARD_NAME = re.compile(r"shard-\d{5,}")
FILE_NAME = re.compile(r"(tokenizer/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileInfo:
    """A file beside the shards: its name relative to the dataset folder, size and sha256."""

    name: str
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check(FILE_NAME.fullmatch(self.name), f"file name {self.name!r} leaves the folder")
        _check_count("num_bytes", self.num_bytes)
        _check_sha256(self.sha256)


@dataclass(frozen=True)
class SourceInfo:
    """One source as the user named it.

    Args:
        name: file, folder, glob or URL.
        input_bytes: bytes of its files.
        options: how it was read and cleaned, where that is not the command's; words of a command.
        weight: how often training reads it while a source of weight 1 is read once.
    """

    name: str
    input_bytes: int
    options: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str), f"source name {self.name!r} is not text")
        _check_count("input_bytes", self.input_bytes)
        _check(isinstance(self.options, str), "source options are not text")
        is_number = isinstance(self.weight, int | float) and 0 <= self.weight < float("inf")
        _check(is_number, f"source weight {self.weight!r} is impossible")


@dataclass(frozen=True)
class ShardInfo:
    """One shard: a token file and its document ends, of one source and one split.

    Args:
        name: `shard-00000`; the files are NAME.tokens.npy and NAME.doc_ends.npy.
        source: the source as named on the command line.
        split: `train` or `heldout`.
        num_tokens: tokens in the shard.
        num_documents: documents in the shard; none is divided between shards.
        text_bytes: UTF-8 bytes of the documents' cleaned text.
        tokens_sha256: sha256 of the whole token file, header included.
        doc_ends_sha256: sha256 of the whole file of document ends.
        block_sha256s: sha256 of each 4 MiB block of the token file, header included.
    """

    name: str
    source: str
    split: Split
    num_tokens: int
    num_documents: int
    text_bytes: int
    tokens_sha256: str
    doc_ends_sha256: str
    block_sha256s: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(SHARD_NAME.fullmatch(self.name), f"shard name {self.name!r} is not shard-00000")
        _check(isinstance(self.source, str), f"source of {self.name} is not text")
        _check(self.split in SPLITS, f"split {self.split!r} of {self.name} is not in {SPLITS}")
        for key in ("num_tokens", "num_documents", "text_bytes"):
            _check_count(key, getattr(self, key))
        for digest in (self.tokens_sha256, self.doc_ends_sha256, *self.block_sha256s):
            _check_sha256(digest)

    @property
    def tokens_file(self) -> str:
        """Name of the token file."""
        return f"{self.name}.tokens.npy"

    @property
    def doc_ends_file(self) -> str:
        """Name of the file of document ends."""
        return f"{self.name}.doc_ends.npy"


@dataclass(frozen=True)
class Manifest:
    """Everything a dataset folder promises.

    Args:
        vocab_size: rows of the word table; every token id is below it.
        tokenizer_fingerprint: sha256 of tokenizer/spm.model.
        command: the build command, reduced to the words that determine the bytes.
        software: versions of what determines the bytes.
        sources: the sources in the order of the command line.
        plan_sha256: sha256 of the list of units: every input file, its size and how it was cut.
        dropped: reason -> inputs (lines, records, documents or files) that were left out.
        notes: oddity that reading met -> times; nothing was lost by these.
        files: every file but the shards, the manifest and its seal.
        shards: the shards; their order is the order of the token streams.
        format_version: version of the layout of the folder.
    """

    vocab_size: int
    tokenizer_fingerprint: str
    command: str
    software: Mapping[str, str]
    sources: tuple[SourceInfo, ...]
    plan_sha256: str
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    files: tuple[FileInfo, ...]
    shards: tuple[ShardInfo, ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_count("vocab_size", self.vocab_size)
        _check(self.vocab_size <= 2**32, f"vocab_size {self.vocab_size} is beyond uint32")
        _check_sha256(self.tokenizer_fingerprint)
        _check_sha256(self.plan_sha256)
        _check(isinstance(self.command, str), "command is not text")
        names = [shard.name for shard in self.shards] + [file.name for file in self.files]
        _check(len(set(names)) == len(names), "a file is listed twice")

    def num_tokens(self, split: Split | None = None) -> int:
        """Tokens of one split, or of both."""
        return sum(shard.num_tokens for shard in self._of(split))

    def num_documents(self, split: Split | None = None) -> int:
        """Documents of one split, or of both."""
        return sum(shard.num_documents for shard in self._of(split))

    def text_bytes(self, split: Split | None = None) -> int:
        """UTF-8 bytes of the cleaned text of one split, or of both."""
        return sum(shard.text_bytes for shard in self._of(split))

    def _of(self, split: Split | None) -> list[ShardInfo]:
        return [shard for shard in self.shards if split in (None, shard.split)]

    def save(self, folder: Path) -> str:
        """Write manifest.json and then its seal, each atomically.

        Args:
            folder: the dataset folder; every other file must already be there.

        Returns:
            The fingerprint: sha256 of manifest.json in hexadecimal.
        """
        values = {"format_version": self.format_version, **dataclasses.asdict(self)}
        content = (json.dumps(values, indent=1) + "\n").encode()
        write_atomically(folder / MANIFEST_NAME, content)
        write_atomically(folder / SEAL_NAME, _seal(content).encode())
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> tuple["Manifest", str]:
        """Read and check a manifest.

        Args:
            folder: the dataset folder.

        Returns:
            The manifest and its fingerprint (64 hexadecimal digits).

        Raises:
            UserError: there is no finished dataset, or another version of the format.
            CorruptError: the manifest does not match its seal, or holds an impossible value.
        """
        content = _read_sealed(folder)
        try:
            values = json.loads(content)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{folder / MANIFEST_NAME}: not a manifest ({error!r})") from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder / MANIFEST_NAME}: format version {version!r}, but this program reads "
                f"version {FORMAT_VERSION}; build the dataset again with `deberta-prep build`, or "
                f"use the version of this program that wrote it"
            )
        try:
            return manifest_from_json(values), hashlib.sha256(content).hexdigest()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{folder / MANIFEST_NAME}: {error}") from error


def manifest_from_json(values: dict[str, Any]) -> Manifest:
    """The manifest in a parsed manifest.json; ValueError or TypeError if it is impossible."""
    parsed = dict(values)
    parsed["sources"] = tuple(SourceInfo(**source) for source in values["sources"])
    parsed["files"] = tuple(FileInfo(**file) for file in values["files"])
    parsed["shards"] = tuple(shard_from_json(shard) for shard in values["shards"])
    return Manifest(**parsed)


def shard_from_json(values: dict[str, Any]) -> ShardInfo:
    """The shard in a parsed JSON object; ValueError or TypeError if it is impossible."""
    return ShardInfo(**{**values, "block_sha256s": tuple(values["block_sha256s"])})


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a sealed manifest: the last thing that a build writes."""
    return (folder / SEAL_NAME).is_file()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that, after a crash, it holds the old or the new content, never a mixture.

    Args:
        path: the file.
        content: its new bytes.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: a rename is durable only after its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_sealed(folder: Path) -> bytes:
    """The bytes of manifest.json, after its seal was found to fit."""
    manifest, seal = folder / MANIFEST_NAME, folder / SEAL_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: no such dataset folder; make one with `deberta-prep build`")
    if not manifest.is_file() and not seal.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST_NAME} in it, so it is not a dataset or its build has not "
            f"finished; run `deberta-prep build ... --output {folder}` (again: it continues)"
        )
    for path in (manifest, seal):
        if not path.is_file():
            raise CorruptError(f"{path}: missing; restore it, or build the dataset again")
    try:
        content, found_seal = manifest.read_bytes(), seal.read_bytes()
    except OSError as error:
        raise CorruptError(
            f"{error.filename or manifest}: cannot be read ({error.strerror}); make it readable, "
            f"restore it, or build the dataset again"
        ) from error
    if found_seal != _seal(content).encode():
        raise CorruptError(
            f"{manifest}: does not match {SEAL_NAME}; one of the two was changed after the build. "
            f"Restore both from a copy, or build the dataset again"
        )
    return content


def _seal(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n"


def _check(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_count(key: str, value: object) -> None:
    _check(type(value) is int and cast(int, value) >= 0, f"{key} {value!r} is not a count")


def _check_sha256(value: object) -> None:
    _check(isinstance(value, str) and SHA256.fullmatch(value), f"{value!r} is not a sha256")
