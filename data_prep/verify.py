"""What the writer of a dataset promises, checked without trusting the writer.

check_files       every byte: sizes, headers, sha256 of files and blocks
check_contents    what the bytes mean: id range, no special ids, document ends, counts
verify            all of it, every damaged file in one message; then the rates of `roundtrip`
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import CorruptError
from data_prep.hf_tokenizer import ParityReport, compare_tokenizers
from data_prep.manifest import (
    MANIFEST_NAME,
    SEAL_NAME,
    SPLITS,
    FileInfo,
    Manifest,
    ShardInfo,
)
from data_prep.npy_files import check_size, hash_blocks
from data_prep.roundtrip import RoundtripReport, measure_roundtrip, sample_texts
from data_prep.shards import Dataset, ShardReader
from data_prep.tokenizer import Tokenizer

PARITY_DOCUMENTS = 500
_SCAN_TOKENS = 2**20
_MAX_LISTED = 20


@dataclass(frozen=True)
class VerifyReport:
    """A dataset in which nothing is damaged.

    Args:
        fingerprint: fingerprint of the dataset.
        files: files checked.
        num_bytes: bytes hashed.
        documents: documents of both splits.
        tokens: tokens of both splits.
        unknown_tokens: tokens that are [UNK].
        unlisted: files in the folder that the manifest does not know.
        roundtrip: what decoding and encoding again changed.
        parity: how the ids of tokenizer.json compare with those of spm.model.
    """

    fingerprint: str
    files: int
    num_bytes: int
    documents: int
    tokens: int
    unknown_tokens: int
    unlisted: tuple[str, ...]
    roundtrip: RoundtripReport
    parity: ParityReport

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can hold, rates included."""
        values = asdict(self)
        values["roundtrip"]["document_rate"] = self.roundtrip.document_rate
        values["roundtrip"]["token_rate"] = self.roundtrip.token_rate
        return values


def verify(
    folder: Path,
    sample_documents: int | None = 1000,
    num_threads: int = 1,
) -> VerifyReport:
    """Check a dataset completely.

    Args:
        folder: the dataset folder.
        sample_documents: documents of each split to decode and encode again; None for all.
        num_threads: files that are hashed at the same time.

    Returns:
        The report.

    Raises:
        UserError: there is no finished dataset in the folder.
        CorruptError: something is damaged; the message names every such file.
    """
    manifest, fingerprint = Manifest.load(folder)
    problems = _check_in_parallel(folder, manifest, num_threads)
    if problems:
        raise CorruptError(_summary(folder, problems))
    dataset = Dataset.open(folder)
    tokenizer = Tokenizer.load(dataset.tokenizer_folder)
    check_tokenizer(dataset, tokenizer)
    readers = [reader for split in SPLITS for reader in dataset.readers(split)]
    unknown = sum(check_contents(reader, tokenizer) for reader in readers)
    return VerifyReport(
        fingerprint=fingerprint,
        files=2 * len(manifest.shards) + len(manifest.files) + 2,
        num_bytes=sum(path.stat().st_size for path in _promised_files(folder, manifest)),
        documents=manifest.num_documents(),
        tokens=manifest.num_tokens(),
        unknown_tokens=unknown,
        unlisted=_unlisted(folder, manifest),
        roundtrip=measure_roundtrip(dataset, tokenizer, sample_documents),
        parity=compare_tokenizers(
            dataset.tokenizer_folder, sample_texts(dataset, tokenizer, PARITY_DOCUMENTS)
        ),
    )


def _check_in_parallel(folder: Path, manifest: Manifest, num_threads: int) -> list[str]:
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(lambda item: list(check_files(folder, item)), _items(manifest))
        return [problem for problems in found for problem in problems]


def _items(manifest: Manifest) -> list[ShardInfo | FileInfo]:
    return [*manifest.shards, *manifest.files]


def check_files(folder: Path, item: ShardInfo | FileInfo) -> Iterator[str]:
    """Check every byte of a shard or of another file.

    Args:
        folder: the dataset folder.
        item: its entry in the manifest.

    Yields:
        What is wrong, one message a file.
    """
    try:
        if isinstance(item, FileInfo):
            check_size(folder / item.name, item.num_bytes)
            yield from _check_hash(folder / item.name, item.sha256)
            return
        ShardReader(folder, item).check_layout()
        yield from _check_hash(folder / item.doc_ends_file, item.doc_ends_sha256)
        yield from _check_hash(folder / item.tokens_file, item.tokens_sha256, item.block_sha256s)
    except CorruptError as error:
        yield str(error)


def _check_hash(path: Path, sha256: str, blocks: tuple[str, ...] | None = None) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            found, found_blocks = hash_blocks(file)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"
        return
    wrong = [
        n
        for n, pair in enumerate(zip(found_blocks, blocks or (), strict=False))
        if len(set(pair)) > 1
    ]
    if wrong:
        yield f"{path}: its sha256 is not the manifest's, in 4 MiB blocks {wrong[:_MAX_LISTED]}"
    elif found != sha256:
        yield f"{path}: its sha256 is not the manifest's"


def check_tokenizer(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer in the folder is the one that the manifest names.

    Args:
        dataset: the dataset.
        tokenizer: the tokenizer of its folder.

    Raises:
        CorruptError: it is another one.
    """
    promised = (dataset.manifest.tokenizer_fingerprint, dataset.manifest.vocab_size)
    found = (tokenizer.fingerprint, tokenizer.vocab_size)
    if found != promised:
        raise CorruptError(
            f"{dataset.folder / MANIFEST_NAME}: promises a tokenizer with sha256 and vocabulary "
            f"{promised}, but {dataset.tokenizer_folder} holds {found}; build the dataset again"
        )


def check_contents(reader: ShardReader, tokenizer: Tokenizer) -> int:
    """Check what the numbers of a shard mean.

    Args:
        reader: the shard.
        tokenizer: the tokenizer that made it.

    Returns:
        How many tokens are [UNK].

    Raises:
        CorruptError: the shard cannot have been written by `build`; the message says why.
    """
    info = reader.info
    ends = reader.doc_ends()
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any() or ends[-1] != info.num_tokens:
        raise CorruptError(
            f"{info.doc_ends_file}: the document ends do not increase up to {info.num_tokens}, "
            f"the number of tokens; the writer was at fault: build the dataset again"
        )
    special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id]
    unknown = 0
    for start in range(0, info.num_tokens, _SCAN_TOKENS):
        ids = reader.tokens(start, min(start + _SCAN_TOKENS, info.num_tokens))
        wrong = np.flatnonzero((ids >= tokenizer.num_pieces) | np.isin(ids, special))
        if wrong.size:
            raise CorruptError(
                f"{info.tokens_file}: token {start + wrong[0]} has the id {ids[wrong[0]]}, which "
                f"text never gets (ids are below {tokenizer.num_pieces} and not {special}); the "
                f"writer was at fault: build the dataset again"
            )
        unknown += int((ids == tokenizer.unk_id).sum())
    return unknown


def _promised_files(folder: Path, manifest: Manifest) -> Iterator[Path]:
    yield folder / MANIFEST_NAME
    yield folder / SEAL_NAME
    for shard in manifest.shards:
        yield folder / shard.tokens_file
        yield folder / shard.doc_ends_file
    for file in manifest.files:
        yield folder / file.name


def _unlisted(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    promised = set(_promised_files(folder, manifest))
    found = (path for path in folder.rglob("*") if path.is_file() and path not in promised)
    return tuple(sorted(str(path.relative_to(folder)) for path in found))


def _summary(folder: Path, problems: list[str]) -> str:
    listed = "\n".join(f"  {problem}" for problem in problems[:_MAX_LISTED])
    more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    return f"{folder}: {len(problems)} of its files are damaged:\n{listed}{more}"
