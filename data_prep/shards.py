"""Token shards: how a dataset is written and how every byte of it is checked before use.

A dataset folder (README.md beside this file is its normative description):

    manifest.json  manifest.sha256        what everything below must be
    tokenizer/spm.model ...               the tokenizer that made the ids
    shard-00000.tokens.npy                uint32 [num_tokens]: the documents, end to end
    shard-00000.doc_ends.npy              int64 [num_documents]: where each one ends, in tokens

For documents of 3, 2 and 3 tokens doc_ends is [3, 5, 8]; document 1 is tokens[3:5].

    ShardWriter   streams documents into two `.partial` files, hashes and renames them
    ShardReader   one shard; a 4 MiB block is hashed when it is first touched, and never trusted
    Dataset       all shards of a folder as one token stream a split; what training reads

Opening looks at names, sizes and headers only, so that a terabyte opens at once; the hash of a
block is compared before its first token is handed out, and what is read again is compared again
(`data_prep.checked_file`), so that no unchecked byte is used.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.checked_file import CheckedFile, OpenFiles
from data_prep.errors import CorruptError, UserError
from data_prep.manifest import (
    BLOCK_BYTES,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    ShardInfo,
    Split,
    sync_folder,
)
from data_prep.npy_files import CURE, HEADER_BYTES, NpyStream, check_npy, check_size, read_whole

__all__ = ["Dataset", "Manifest", "ShardInfo", "ShardReader", "ShardWriter", "Split"]

TOKEN_DTYPE = np.dtype("<u4")
DOC_END_DTYPE = np.dtype("<i8")


class ShardWriter:
    """Writes one shard, document by document, in memory that does not grow with it.

    Use as a context manager: leaving it without `finish` removes what was written.

    Args:
        folder: where the two files go.
        name: name of the shard, `shard-00000`.
        source: source of all its documents.
        split: split of all its documents.
    """

    def __init__(self, folder: Path, name: str, source: str, split: Split) -> None:
        self._folder = folder
        self._name = name
        self._source = source
        self._split: Split = split
        self._tokens = NpyStream(folder / f"{name}.tokens.npy", TOKEN_DTYPE)
        self._doc_ends = NpyStream(folder / f"{name}.doc_ends.npy", DOC_END_DTYPE)
        self._document_start = 0
        self._text_bytes = 0

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._tokens.count

    @property
    def document_tokens(self) -> int:
        """Tokens written since the last document ended."""
        return self._tokens.count - self._document_start

    def write(self, ids: NDArray[np.integer] | list[int]) -> None:
        """Append tokens to the current document.

        Args:
            ids: token ids, each in [0, 2^32).
        """
        self._tokens.append(ids)

    def end_document(self, text_bytes: int) -> None:
        """Close the current document, which must hold at least one token.

        Args:
            text_bytes: UTF-8 bytes of its cleaned text.
        """
        assert self.document_tokens > 0, "a document without tokens has no place in a shard"
        self.end_documents(np.array([self._tokens.count], DOC_END_DTYPE), text_bytes)

    def end_documents(self, ends: NDArray[np.int64], text_bytes: int) -> None:
        """Close documents that were written together.

        Args:
            ends: where each ends, in tokens of this shard, increasing; the last one here.
            text_bytes: UTF-8 bytes of their cleaned text.
        """
        self._doc_ends.append(ends)
        self._document_start = int(ends[-1])
        self._text_bytes += text_bytes

    def finish(self) -> ShardInfo:
        """Put both files on disk under their final names.

        Returns:
            The shard as the manifest describes it.
        """
        assert self.document_tokens == 0, "the last document was not ended"
        tokens_sha256, block_sha256s = self._tokens.finish()
        doc_ends_sha256, _ = self._doc_ends.finish()
        sync_folder(self._folder)
        return ShardInfo(
            name=self._name,
            source=self._source,
            split=self._split,
            num_tokens=self._tokens.count,
            num_documents=self._doc_ends.count,
            text_bytes=self._text_bytes,
            tokens_sha256=tokens_sha256,
            doc_ends_sha256=doc_ends_sha256,
            block_sha256s=block_sha256s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tokens.abort()
        self._doc_ends.abort()


class ShardReader:
    """Reads one shard; safe to share between threads.

    Args:
        folder: the dataset folder.
        info: the shard's entry in the manifest.
        files: where open files are kept; shared by the shards of a dataset.
    """

    def __init__(self, folder: Path, info: ShardInfo, files: OpenFiles | None = None) -> None:
        self.info = info
        self._tokens_path = folder / info.tokens_file
        self._doc_ends_path = folder / info.doc_ends_file
        self._tokens = CheckedFile(self._tokens_path, info.block_sha256s, files or OpenFiles())
        self._doc_ends_checked = False

    def check_layout(self) -> None:
        """Compare existence, size and header of both files with the manifest, without reading on.

        Raises:
            CorruptError: naming the file.
        """
        check_npy(self._tokens_path, TOKEN_DTYPE, self.info.num_tokens)
        check_npy(self._doc_ends_path, DOC_END_DTYPE, self.info.num_documents)
        num_blocks = -(-(HEADER_BYTES + self.info.num_tokens * 4) // BLOCK_BYTES)
        if len(self.info.block_sha256s) != num_blocks:
            raise CorruptError(
                f"{self._tokens_path}: the manifest lists {len(self.info.block_sha256s)} block "
                f"hashes, but {self.info.num_tokens} tokens fill {num_blocks}. {CURE}"
            )

    def tokens(self, start: int, end: int) -> NDArray[np.uint32]:
        """A copy of tokens [start, end), every byte of it checked.

        Args:
            start: first token, counted from the beginning of the shard.
            end: one past the last token.

        Returns:
            uint32 [end - start].

        Raises:
            CorruptError: naming the file and the block whose hash is wrong.
        """
        if not 0 <= start <= end <= self.info.num_tokens:
            raise IndexError(
                f"[{start}, {end}) of the {self.info.num_tokens} tokens of {self.info.name}"
            )
        if start == end:
            return np.empty(0, np.uint32)
        if not self._doc_ends_checked:
            # Training may never ask for the ends, but a damaged shard must not pass for a good
            # one; they are less than a hundredth of its bytes.
            self.doc_ends()
            self._doc_ends_checked = True
        content = self._tokens.read(HEADER_BYTES + start * 4, HEADER_BYTES + end * 4)
        return np.frombuffer(content, TOKEN_DTYPE).copy()

    def doc_ends(self) -> NDArray[np.int64]:
        """All document ends, after the whole file was hashed.

        Returns:
            int64 [num_documents], increasing, the last one equal to num_tokens.

        Raises:
            CorruptError: naming the file.
        """
        content = read_whole(self._doc_ends_path)
        if hashlib.sha256(content).hexdigest() != self.info.doc_ends_sha256:
            raise CorruptError(f"{self._doc_ends_path}: its sha256 is not the manifest's. {CURE}")
        return np.frombuffer(content, DOC_END_DTYPE, offset=HEADER_BYTES).astype(np.int64)


class Dataset:
    """A dataset folder as one stream of tokens a split; safe to share between threads.

    A split's stream is its shards in the order of the manifest, end to end.

    Args:
        folder: the dataset folder.
        manifest: its manifest.
        fingerprint: sha256 of manifest.json.
    """

    def __init__(self, folder: Path, manifest: Manifest, fingerprint: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        files = OpenFiles()
        readers = [ShardReader(folder, info, files) for info in manifest.shards]
        self._readers = {s: [r for r in readers if r.info.split == s] for s in SPLITS}
        self._token_ends = {s: _ends(r.info.num_tokens for r in self._readers[s]) for s in SPLITS}
        self._document_ends = {
            s: _ends(r.info.num_documents for r in self._readers[s]) for s in SPLITS
        }

    @classmethod
    def open(cls, folder: Path | str) -> "Dataset":
        """Open a dataset: manifest and tokenizer are hashed, every other file is looked at.

        Args:
            folder: the dataset folder.

        Returns:
            The dataset; its tokens are hashed block by block as they are read.

        Raises:
            UserError: there is no finished dataset in the folder.
            CorruptError: a file is missing, has another size or header, or (manifest and
                tokenizer) another content; the message names it.
        """
        folder = Path(folder)
        manifest, fingerprint = Manifest.load(folder)
        dataset = cls(folder, manifest, fingerprint)
        for info in manifest.files:
            path = folder / info.name
            check_size(path, info.num_bytes)
            in_tokenizer = info.name.startswith(f"{TOKENIZER_FOLDER}/")
            if in_tokenizer and hashlib.sha256(read_whole(path)).hexdigest() != info.sha256:
                raise CorruptError(f"{path}: its sha256 is not the manifest's. {CURE}")
        for split in SPLITS:
            for reader in dataset._readers[split]:
                reader.check_layout()
        return dataset

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer that made the ids."""
        return self.folder / TOKENIZER_FOLDER

    def split_tokens(self, split: Split) -> int:
        """Tokens in the stream of a split."""
        return self._token_ends[split][-1]

    def readers(self, split: Split) -> tuple[ShardReader, ...]:
        """The shards of a split in stream order."""
        return tuple(self._readers[split])

    def read(self, split: Split, start: int, end: int) -> NDArray[np.uint32]:
        """Tokens [start, end) of a split's stream, across shards where need be.

        Args:
            split: `train` or `heldout`.
            start: first token.
            end: one past the last token, at most `split_tokens(split)`.

        Returns:
            uint32 [end - start], a copy.

        Raises:
            CorruptError: a touched block is not what was written; the message names the file.
        """
        ends = self._token_ends[split]
        if not 0 <= start <= end <= ends[-1]:
            raise IndexError(f"[{start}, {end}) of the {ends[-1]} tokens of split {split}")
        pieces = []
        index = bisect_right(ends, start) - 1
        while start < end:
            stop = min(end, ends[index + 1])
            pieces.append(
                self._readers[split][index].tokens(start - ends[index], stop - ends[index])
            )
            start, index = stop, index + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)

    def document(self, split: Split, index: int) -> tuple[NDArray[np.uint32], ShardInfo]:
        """One document of a split.

        Args:
            split: `train` or `heldout`.
            index: document, counted from 0 through the split's stream.

        Returns:
            Its tokens, uint32 [length], and the shard that holds it.

        Raises:
            UserError: the split has no such document.
            CorruptError: a touched file is not what was written.
        """
        ends = self._document_ends[split]
        if not 0 <= index < ends[-1]:
            raise UserError(
                f"{self.folder}: no document {index} in split {split}, which has {ends[-1]} "
                f"documents, counted from 0"
            )
        shard = bisect_right(ends, index) - 1
        reader, local = self._readers[split][shard], index - ends[shard]
        doc_ends = reader.doc_ends()
        start = int(doc_ends[local - 1]) if local else 0
        return reader.tokens(start, int(doc_ends[local])), reader.info


def _ends(counts: Iterable[int]) -> list[int]:
    """Cumulative sums from 0: part i covers [ends[i], ends[i + 1])."""
    return list(accumulate(counts, initial=0))
