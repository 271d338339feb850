"""Token shards: how a dataset is written and how every byte of it is checked before use.

A dataset folder (README.md beside this file is its normative description):

    manifest.json  manifest.sha256        what everything below must be
    tokenizer/spm.model ...               the tokenizer that made the ids
    shard-00000.tokens.npy                uint32 [num_tokens]: the documents, end to end
    shard-00000.doc_ends.npy              int64 [num_documents]: where each one ends, in tokens

For documents of 3, 2 and 3 tokens doc_ends is [3, 5, 8]; document 1 is tokens[3:5].

    ShardWriter   streams documents into two files (`data_prep.shard_writer`)
    ShardReader   one shard; a 4 MiB block is hashed when it is first touched
    Dataset       all shards of a folder as one token stream a split; what training reads

Opening looks at names, sizes and headers only, so that a terabyte opens at once; the hash of a
block is compared before its first token is handed out, and what is read again is compared again
(`data_prep.checked_file`), so that no unchecked byte is used. What was compared stays in memory for
a while (`data_prep.block_cache`), and that copy is what is handed out.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.block_cache import CACHE_BYTES, NOWHERE, BlockCache
from data_prep.checked_file import CheckedFile, OpenFiles
from data_prep.errors import CorruptError, UserError
from data_prep.manifest import (
    BLOCK_BYTES,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    ShardInfo,
    Split,
)
from data_prep.npy_files import CURE, HEADER_BYTES, check_npy, check_size, read_whole
from data_prep.shard_writer import DOC_END_DTYPE, TOKEN_DTYPE

_HEADER_TOKENS = HEADER_BYTES // TOKEN_DTYPE.itemsize
_LONE_CACHE_BYTES = BLOCK_BYTES  # of a shard that is read by itself, front to back


class ShardReader:
    """Reads one shard; safe to share between threads.

    Args:
        folder: the dataset folder.
        info: the shard's entry in the manifest.
        cache: keeps its tokens among those of its dataset; without one it keeps a few itself.
        file: index of its token file in the cache.
    """

    def __init__(
        self, folder: Path, info: ShardInfo, cache: BlockCache | None = None, file: int = 0
    ) -> None:
        self.info = info
        self._tokens_path = folder / info.tokens_file
        self._doc_ends_path = folder / info.doc_ends_file
        if cache is None:
            tokens = CheckedFile(self._tokens_path, info.block_sha256s, OpenFiles())
            cache = BlockCache([tokens], _LONE_CACHE_BYTES)
        self._cache = cache
        self.first_position = cache.first_position(file) + _HEADER_TOKENS
        """Position of its first token in the cache."""
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
        self.check_doc_ends()
        return self._cache.read(self.first_position + start, self.first_position + end)

    def check_doc_ends(self) -> None:
        """Hash the document ends, once.

        Training may never ask for them, but a damaged shard must not pass for a good one; they are
        less than a hundredth of its bytes.

        Raises:
            CorruptError: naming their file.
        """
        if not self._doc_ends_checked:
            self.doc_ends()
            self._doc_ends_checked = True

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
        cache_bytes: memory for checked tokens.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, fingerprint: str, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = fingerprint
        files, shards = OpenFiles(), manifest.shards
        self._cache = BlockCache(
            [CheckedFile(folder / s.tokens_file, s.block_sha256s, files) for s in shards],
            cache_bytes,
        )
        readers = [ShardReader(folder, s, self._cache, n) for n, s in enumerate(shards)]
        self._readers = {s: [r for r in readers if r.info.split == s] for s in SPLITS}
        self._token_ends = {s: _ends(r.info.num_tokens for r in self._readers[s]) for s in SPLITS}
        self._shard_ends = {s: np.array(self._token_ends[s]) for s in SPLITS}
        self._shard_positions = {
            s: np.array([r.first_position for r in self._readers[s]], np.int64) for s in SPLITS
        }
        self._document_ends = {
            s: _ends(r.info.num_documents for r in self._readers[s]) for s in SPLITS
        }

    @classmethod
    def open(cls, folder: Path | str, cache_bytes: int = CACHE_BYTES) -> "Dataset":
        """Open a dataset: manifest and tokenizer are hashed, every other file is looked at.

        Args:
            folder: the dataset folder.
            cache_bytes: memory for checked tokens; taken when they are read.

        Returns:
            The dataset; its tokens are hashed block by block as they are read.

        Raises:
            UserError: there is no finished dataset in the folder.
            CorruptError: a file is missing, has another size or header, or (manifest and
                tokenizer) another content; the message names it.
        """
        folder = Path(folder)
        manifest, fingerprint = Manifest.load(folder)
        dataset = cls(folder, manifest, fingerprint, cache_bytes)
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

    def read_rows(
        self,
        split: Split,
        starts_B: NDArray[np.int64],
        count: int,
        edges: tuple[int, int],
        rows_at_once: int,
    ) -> list[NDArray[np.uint32]]:
        """Read many runs of equal length at once, each with a token before and one behind it.

        Args:
            split: `train` or `heldout`.
            starts_B: int64 [B], the first token of each run in the split's stream.
            count: N, tokens of a run.
            edges: what stands before and behind every run.
            rows_at_once: rows of an array.

        Returns:
            uint32 [rows_at_once, 1 + N + 1] each, in the order of the runs, the last one shorter.

        Raises:
            CorruptError: a touched block is not what was written; the message names the file.
        """
        shard_B, positions_B, is_in_one_shard_B = self._places(split, starts_B, count)
        self._check_doc_ends(split, shard_B)
        others = np.flatnonzero(~is_in_one_shard_B).tolist()
        positions_B[others] = NOWHERE
        parts = self._cache.gather(positions_B, count, edges, rows_at_once)
        for number in others:
            (part, row), start = divmod(number, rows_at_once), int(starts_B[number])
            parts[part][row, 1:-1] = self.read(split, start, start + count)
        return parts

    def announce_rows(self, split: Split, starts_B: NDArray[np.int64], count: int) -> bool:
        """Have threads read and hash the blocks that `read_rows` will soon need.

        What they cannot read is left to it, and the error with it.

        Args:
            split: `train` or `heldout`.
            starts_B: int64 [B], the first token of each run in the split's stream.
            count: tokens of a run.

        Returns:
            False where too many blocks are on their way; to be announced again later.
        """
        shard_B, positions_B, _ = self._places(split, starts_B, count)
        try:
            # Before the threads, behind whose blocks a disk would make this wait.
            self._check_doc_ends(split, shard_B)
        except CorruptError:
            return True
        return self._cache.announce(positions_B)

    def stop_announced(self) -> None:
        """Read nothing ahead any more, and wait for the threads that do."""
        self._cache.stop_announced()

    def _check_doc_ends(self, split: Split, shard_B: NDArray[np.int64]) -> None:
        for shard in np.flatnonzero(np.bincount(shard_B)).tolist():
            self._readers[split][shard].check_doc_ends()

    def _places(
        self, split: Split, starts_B: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """The shard of each run, its position in the cache, and whether no other shard follows."""
        ends = self._shard_ends[split]
        if starts_B.min(initial=0) < 0 or starts_B.max(initial=0) + count > ends[-1]:
            raise IndexError(f"rows that leave the {ends[-1]} tokens of split {split}")
        shard_B = np.searchsorted(ends, starts_B, side="right") - 1
        positions_B = starts_B + (self._shard_positions[split] - ends[:-1])[shard_B]
        return shard_B, positions_B, starts_B + count <= ends[shard_B + 1]

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
