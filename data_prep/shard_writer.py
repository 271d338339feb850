"""One shard on its way to the disk: documents end to end, hashed and renamed when all are there.

ShardWriter   streams documents into two `.partial` files, hashes and renames them
"""

from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import ShardInfo, Split, sync_folder
from data_prep.npy_files import NpyStream

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

    def __exit__(self, *_: object) -> None:
        self._tokens.abort()
        self._doc_ends.abort()
