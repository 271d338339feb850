"""Datasets made by hand: of any size without taking disk, and with a manifest that lies.

A hole in a file reads as zeros, so that all blocks but the first of a shard share one sha256. `du`
of a terabyte made this way shows some 20 MB: the manifest, and the ends of documents.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from data_prep.assembly import describe_file
from data_prep.manifest import BLOCK_BYTES, Manifest, ShardInfo, Split
from data_prep.npy_files import HEADER_BYTES, npy_header
from data_prep.tokenizer import Tokenizer
from tests.small_datasets import ZEROS, bare_manifest

DOCUMENTS = 1000


def write_sparse_dataset(
    folder: Path, tokenizer: Path, num_shards: int, shard_bytes: int, num_heldout: int = 0
) -> Manifest:
    """Write a dataset of zeros, all of its hashes true but those of whole files.

    Args:
        folder: The dataset folder, made here.
        tokenizer: A tokenizer folder.
        num_shards: Shards.
        shard_bytes: Size of each token file, a multiple of 4 MiB.
        num_heldout: How many of the shards, the last ones, are held out.

    Returns:
        The manifest.
    """
    assert shard_bytes % BLOCK_BYTES == 0, "every block is full"
    shutil.copytree(tokenizer, folder / "tokenizer")
    count = (shard_bytes - HEADER_BYTES) // 4
    header = npy_header(np.dtype("<u4"), count)
    first = hashlib.sha256(header + bytes(BLOCK_BYTES - HEADER_BYTES)).hexdigest()
    zeros = hashlib.sha256(bytes(BLOCK_BYTES)).hexdigest()
    blocks = (first, *[zeros] * (shard_bytes // BLOCK_BYTES - 1))
    ends = np.linspace(0, count, DOCUMENTS + 1, dtype="<i8")[1:]
    ends_content = npy_header(ends.dtype, DOCUMENTS) + ends.tobytes()
    shards = []
    for number in range(num_shards):
        split: Split = "train" if number < num_shards - num_heldout else "heldout"
        shards.append(
            ShardInfo(
                name=f"shard-{number:05d}",
                source="zeros",
                split=split,
                num_tokens=count,
                num_documents=DOCUMENTS,
                text_bytes=4 * count,
                tokens_sha256=ZEROS,
                doc_ends_sha256=hashlib.sha256(ends_content).hexdigest(),
                block_sha256s=blocks,
            )
        )
        with (folder / shards[-1].tokens_file).open("wb") as file:
            file.write(header)
            file.truncate(shard_bytes)
        (folder / shards[-1].doc_ends_file).write_bytes(ends_content)
    model = Tokenizer.load(folder / "tokenizer")
    manifest = bare_manifest(
        shards,
        vocab_size=model.vocab_size,
        tokenizer_fingerprint=model.fingerprint,
        files=tuple(
            describe_file(path, f"tokenizer/{path.name}")
            for path in sorted((folder / "tokenizer").iterdir())
        ),
    )
    manifest.save(folder)
    return manifest


def reseal_dataset(folder: Path, *names: str) -> None:
    """Seal a changed manifest, as somebody who means harm would; of the files named, list anew."""
    values = json.loads((folder / "manifest.json").read_text())
    for entry in values["files"]:
        if entry["name"] in names:
            content = (folder / entry["name"]).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            entry |= {"num_bytes": len(content), "sha256": digest}
    content = json.dumps(values).encode()
    (folder / "manifest.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
