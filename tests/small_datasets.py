"""Datasets of a few tokens made by hand: shards, the manifest around them, damage to them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.manifest import FileInfo, Manifest, ShardInfo, Split
from data_prep.shard_writer import ShardWriter
from data_prep.shards import Dataset

ZEROS = "0" * 64


def bare_manifest(shards: Iterable[ShardInfo], **changes: Any) -> Manifest:
    """A manifest without text, cleaning or tokenizer behind it.

    Args:
        shards: What it lists.
        **changes: Fields that say something.

    Returns:
        The manifest, not saved.
    """
    manifest = Manifest(
        vocab_size=1000,
        tokenizer_fingerprint=ZEROS,
        command="",
        software={},
        sources=(),
        plan_sha256=ZEROS,
        dropped={},
        notes={},
        files=(),
        shards=tuple(shards),
    )
    return replace(manifest, **changes)


def write_shard(
    folder: Path, index: int, documents: Iterable[Any], split: Split = "train"
) -> ShardInfo:
    """Write a shard of the source "corpus".

    Args:
        folder: An existing folder.
        index: Number of the shard.
        documents: Sequences of ids.
        split: "train" or "heldout".

    Returns:
        Its entry for a manifest.
    """
    with ShardWriter(folder, f"shard-{index:05d}", "corpus", split) as writer:
        for document in documents:
            writer.write(document)
            writer.end_document(text_bytes=10)
        return writer.finish()


def make_dataset(folder: Path, shards: Sequence[tuple[Any, Sequence[Any]]]) -> Dataset:
    """Write shards, a file in the place of a tokenizer, and a manifest.

    Args:
        folder: An existing folder.
        shards: Split and documents of each.

    Returns:
        The dataset, open.
    """
    infos = [write_shard(folder, n, docs, split) for n, (split, docs) in enumerate(shards)]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spm.model").write_bytes(b"model")
    file = FileInfo("tokenizer/spm.model", 5, hashlib.sha256(b"model").hexdigest())
    bare_manifest(infos, files=(file,)).save(folder)
    return Dataset.open(folder)


def flip(path: Path, position: int, bit: int = 1) -> None:
    """Change bits of one byte of a file.

    Args:
        path: The file.
        position: Which byte.
        bit: The bits.
    """
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ bit]))
