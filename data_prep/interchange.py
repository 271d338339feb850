"""Datasets to and from what other programs read: Megatron's pairs of files, and `datasets` folders.

- `export_megatron`: PREFIX-train.bin/.idx and PREFIX-heldout.bin/.idx, a document a sequence.
- `export_datasets`: a folder that `datasets.load_from_disk` opens, a document a row.
- `import_megatron`: a dataset of ours from pairs that were made with the same tokenizer.

Every token of a dataset passes the checks of its reader on the way out. What is imported has no
text; its splits and sizes come from the text that its ids decode to.
"""

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.assembly import copy_folder, describe_file, place_shard
from data_prep.build_plan import SHARD_TOKENS, SOFTWARE, version_of
from data_prep.errors import UserError
from data_prep.hf_tokenizer import write_hf_tokenizer
from data_prep.manifest import (
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    ShardInfo,
    SourceInfo,
    Split,
)
from data_prep.megatron_files import MegatronReader, MegatronWriter
from data_prep.shards import Dataset, ShardReader
from data_prep.splits import split_digest, split_of
from data_prep.tokenizer import MODEL_FILE, Tokenizer
from data_prep.unit_work import DROPPED_NAME, UnitShards

_TOKENS_AT_ONCE = 1 << 22


def export_megatron(
    folder: Path, prefix: Path, end_of_document: int | None = None
) -> dict[str, int]:
    """Write a dataset as Megatron's pairs of files, one pair a split.

    Args:
        folder: the dataset.
        prefix: what stands before "-train.bin" and "-heldout.bin".
        end_of_document: id to put behind every document, as Megatron's --append-eod; None for none.

    Returns:
        Name of the pair -> its documents; splits without documents get no pair.

    Raises:
        UserError: there is no such dataset, a file exists, or the id is not in the vocabulary.
        CorruptError: the dataset is not what was written.
    """
    dataset = Dataset.open(folder)
    vocab_size = dataset.manifest.vocab_size
    if end_of_document is not None and not 0 <= end_of_document < vocab_size:
        raise UserError(
            f"--end-of-document {end_of_document}: not in the vocabulary of {vocab_size}"
        )
    written: dict[str, int] = {}
    for split in SPLITS:
        if not dataset.manifest.num_documents(split):
            continue
        pair = prefix.with_name(f"{prefix.name}-{split}")
        with MegatronWriter(pair, vocab_size) as writer:
            for reader in dataset.readers(split):
                for ids, lengths in _document_groups(reader):
                    writer.append(*_with_ends(ids, lengths, end_of_document))
            writer.finish()
        written[str(pair)] = dataset.manifest.num_documents(split)
    return written


def _document_groups(
    reader: ShardReader,
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """Some whole documents at a time: their ids, and the length of each."""
    ends = reader.doc_ends()
    first, start = 0, 0
    while first < len(ends):
        behind = int(np.searchsorted(ends, start + _TOKENS_AT_ONCE, side="right"))
        behind = max(first + 1, behind)
        end = int(ends[behind - 1])
        yield reader.tokens(start, end), np.diff(ends[first:behind], prepend=start)
        first, start = behind, end


def _with_ends(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], end_of_document: int | None
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    if end_of_document is None:
        return ids, lengths
    return np.insert(ids, np.cumsum(lengths), end_of_document), lengths + 1


def export_datasets(folder: Path, output: Path) -> dict[str, int]:
    """Write a dataset as a folder of `datasets`: columns input_ids and source, a document a row.

    Args:
        folder: the dataset.
        output: the folder to make; needs the room twice while it is written.

    Returns:
        Split -> its documents.

    Raises:
        UserError: there is no such dataset, or the output exists.
        CorruptError: the dataset is not what was written.
    """
    import datasets

    dataset = Dataset.open(folder)
    if output.exists():
        raise UserError(f"{output} exists; choose another folder, or remove it")
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("uint32")), "source": datasets.Value("string")}
    )
    splits: list[Split] = [split for split in SPLITS if dataset.manifest.num_documents(split)]
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        made = {
            split: datasets.Dataset.from_generator(
                _rows,
                features=features,
                cache_dir=str(partial / "cache"),
                gen_kwargs={"folder": str(folder), "split": split},
                # Otherwise a dataset that was built again would be served from the cache.
                fingerprint=f"{dataset.fingerprint[:32]}-{split}",
            )
            for split in splits
        }
        as_dict = datasets.DatasetDict(made)  # pyright: ignore[reportCallIssue, reportArgumentType]
        as_dict.save_to_disk(str(partial / "made"))
        (partial / "made").replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {split: dataset.manifest.num_documents(split) for split in splits}


def _rows(folder: str, split: Split) -> Iterator[dict[str, Any]]:
    for reader in Dataset.open(folder).readers(split):
        for ids, lengths in _document_groups(reader):
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                yield {"input_ids": document, "source": reader.info.source}


def import_megatron(
    prefixes: Sequence[Path],
    tokenizer_path: Path,
    output: Path,
    heldout_fraction: float = 0.01,
    end_of_document: int | None = None,
) -> Manifest:
    """Make a dataset of Megatron's pairs of files, each pair a source.

    Args:
        prefixes: the pairs without their suffixes.
        tokenizer_path: tokenizer folder or model file by which the pairs were made.
        output: the dataset folder to make.
        heldout_fraction: share of the documents that is held out, in [0, 0.5].
        end_of_document: id that ends every document there and is left out here; None for none.

    Returns:
        The manifest.

    Raises:
        UserError: a pair cannot be read, holds ids that are not the tokenizer's, or has no tokens;
            or the output exists.
    """
    if output.exists():
        raise UserError(f"{output} exists; choose another --output, or remove it")
    if not 0 <= heldout_fraction <= 0.5:
        raise UserError(f"--heldout-fraction {heldout_fraction}: must lie between 0 and 0.5")
    tokenizer = Tokenizer.load(tokenizer_path)
    readers = [MegatronReader(prefix) for prefix in prefixes]
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        importer = _Import(tokenizer, heldout_fraction, end_of_document, partial)
        partial.mkdir(parents=True)
        for prefix, reader in zip(prefixes, readers, strict=True):
            importer.add(prefix, reader)
        manifest = importer.finish(prefixes, tokenizer_path, readers)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


class _Import:
    """A dataset that is being made of pairs.

    Args:
        tokenizer: by which the pairs were made.
        heldout_fraction: share of the documents that is held out.
        end_of_document: id that ends every document there.
        folder: where the dataset is made.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        heldout_fraction: float,
        end_of_document: int | None,
        folder: Path,
    ) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        self._heldout_fraction, self._end_of_document = heldout_fraction, end_of_document
        self._parts: list[tuple[Path, ShardInfo]] = []
        self._num_empty = 0

    def add(self, prefix: Path, reader: MegatronReader) -> None:
        """Copy the documents of a pair."""
        work = self._folder / f"pair-{len(list(self._folder.glob('pair-*')))}"
        work.mkdir()
        with UnitShards(work, str(prefix), SHARD_TOKENS) as shards:
            for number, document in enumerate(reader.documents()):
                ids = self._checked(document, prefix, number)
                if not ids.size:
                    self._num_empty += 1
                    continue
                text = self._tokenizer.decode(ids).encode()
                writer = shards.writer(split_of(split_digest(text), self._heldout_fraction))
                writer.write(ids)
                writer.end_document(len(text))
            self._parts += [(work, info) for info in shards.finish()]

    def _checked(
        self, document: NDArray[np.integer], prefix: Path, number: int
    ) -> NDArray[np.integer]:
        if self._end_of_document is not None and document.size:
            if document[-1] != self._end_of_document:
                raise UserError(
                    f"{prefix}.bin: document {number} ends with the id {document[-1]}, not with "
                    f"--end-of-document {self._end_of_document}; leave the option out or mend it"
                )
            document = document[:-1]
        if document.size:
            low, high = int(document.min()), int(document.max())
            if low < self._tokenizer.unk_id or high >= self._tokenizer.num_pieces:
                wrong = low if low < self._tokenizer.unk_id else high
                raise UserError(
                    f"{prefix}.bin: document {number} holds the id {wrong}; text has ids from "
                    f"{self._tokenizer.unk_id} to {self._tokenizer.num_pieces - 1} in this "
                    f"tokenizer. Name the tokenizer that the pair was made with; if {wrong} ends "
                    f"every document there, add --end-of-document {wrong}"
                )
        return document

    def finish(
        self, prefixes: Sequence[Path], tokenizer_path: Path, readers: Sequence[MegatronReader]
    ) -> Manifest:
        """Number the shards and write what stands beside them, the manifest last."""
        folder = self._folder
        if not self._parts:
            raise UserError(
                f"{', '.join(map(str, prefixes))}: no tokens in them; nothing to import"
            )
        shards = tuple(place_shard([part], folder, n) for n, part in enumerate(self._parts))
        shutil.rmtree(work := folder / "tokenizer-files", ignore_errors=True)
        work.mkdir()
        (work / MODEL_FILE).write_bytes(self._tokenizer.model_bytes)
        write_hf_tokenizer(work / MODEL_FILE, work)
        files = tuple(copy_folder(work, folder / TOKENIZER_FOLDER))
        (folder / DROPPED_NAME).touch()
        for made in (*folder.glob("pair-*"), work):
            shutil.rmtree(made)
        sources = tuple(
            SourceInfo(str(prefix), reader.num_bytes)
            for prefix, reader in zip(prefixes, readers, strict=True)
        )
        words = ["deberta-prep", "import-megatron", *map(str, prefixes)]
        words += ["--tokenizer", str(tokenizer_path)]
        words += ["--heldout-fraction", str(self._heldout_fraction)]
        if self._end_of_document is not None:
            words += ["--end-of-document", str(self._end_of_document)]
        listing = json.dumps([[source.name, source.input_bytes] for source in sources])
        manifest = Manifest(
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            command=shlex.join(words),
            software={name: version_of(name) for name in SOFTWARE},
            sources=sources,
            plan_sha256=hashlib.sha256(listing.encode()).hexdigest(),
            dropped={"empty document": self._num_empty} if self._num_empty else {},
            notes={},
            files=(describe_file(folder / DROPPED_NAME, DROPPED_NAME), *files),
            shards=shards,
        )
        manifest.save(folder)
        return manifest
