"""Finished units -> a dataset: shards numbered in unit order, the manifest last.

A unit's shard that is big enough becomes a shard of the dataset as it is, by a hard link. Small
ones of the same source and split (held-out documents, the ends of sources) are joined with those
of the following units, so that a large corpus does not end in thousands of tiny files. What is
joined depends on sizes in unit order alone.

The dataset is put together in a partial folder beside the units and then moved, file by file, the
manifest and its seal last. After a kill the whole step is simply done again; two processes that do
it at once give each file the same bytes.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.manifest import (
    MANIFEST_NAME,
    SEAL_NAME,
    FileInfo,
    ShardInfo,
    Split,
    sync_folder,
)
from data_prep.npy_files import hash_blocks
from data_prep.shard_writer import ShardWriter
from data_prep.shards import ShardReader
from data_prep.unit_work import DROPPED_NAME

JOIN_BELOW_TOKENS = 2**22
"""A shard of fewer tokens (16 MiB) is joined with its successors until they reach this size."""
_COPY_TOKENS = 2**20
FinishedUnit = tuple[Path, tuple[ShardInfo, ...]]
"""Folder of a unit, and its shards in the order in which they were begun."""


@dataclass
class _Group:
    """Shards of units that become one shard of the dataset."""

    source: str
    split: Split
    parts: list[tuple[Path, ShardInfo]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(info.num_tokens for _, info in self.parts)


def group_shards(
    units: Iterable[FinishedUnit], join_below: int
) -> list[list[tuple[Path, ShardInfo]]]:
    """Decide which shards of units become which shards of the dataset.

    Args:
        units: folder and shards of every unit, in unit order.
        join_below: shards of fewer tokens are joined.

    Returns:
        For each shard of the dataset, in its order, the (folder, shard) pairs that it is made of.
    """
    groups: list[_Group] = []
    open_groups: dict[tuple[str, Split], _Group] = {}
    for folder, shards in units:
        for info in shards:
            key = (info.source, info.split)
            is_big = info.num_tokens >= join_below
            group = None if is_big else open_groups.get(key)
            if group is None:
                group = _Group(info.source, info.split)
                groups.append(group)
                if not is_big:
                    open_groups[key] = group
            group.parts.append((folder, info))
            if not is_big and group.num_tokens >= join_below:
                del open_groups[key]
    return [group.parts for group in groups]


def place_shard(parts: list[tuple[Path, ShardInfo]], folder: Path, index: int) -> ShardInfo:
    """Make one shard of the dataset.

    Args:
        parts: (unit folder, shard) pairs of one source and split.
        folder: the dataset folder.
        index: number of the shard in the dataset.

    Returns:
        The shard as the manifest lists it.

    Raises:
        CorruptError: a part that has to be copied is not what was written.
    """
    name = f"shard-{index:05d}"
    if len(parts) > 1:
        return _join(parts, folder, name)
    unit_folder, info = parts[0]
    placed = replace(info, name=name)
    link_or_copy(unit_folder / info.tokens_file, folder / placed.tokens_file)
    link_or_copy(unit_folder / info.doc_ends_file, folder / placed.doc_ends_file)
    return placed


def _join(parts: list[tuple[Path, ShardInfo]], folder: Path, name: str) -> ShardInfo:
    first = parts[0][1]
    with ShardWriter(folder, name, first.source, first.split) as writer:
        for unit_folder, info in parts:
            reader = ShardReader(unit_folder, info)
            offset = writer.num_tokens
            for start in range(0, info.num_tokens, _COPY_TOKENS):
                writer.write(reader.tokens(start, min(start + _COPY_TOKENS, info.num_tokens)))
            writer.end_documents(reader.doc_ends() + np.int64(offset), info.text_bytes)
        return writer.finish()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links.

    Args:
        source: the file.
        target: its other name, in a folder of this process alone; not there yet.
    """
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def join_drop_logs(unit_folders: Iterable[Path], folder: Path) -> FileInfo:
    """Concatenate the lists of what was dropped, in unit order.

    Args:
        unit_folders: folders of all units, in order.
        folder: the dataset folder.

    Returns:
        The joined file as the manifest lists it.
    """
    target = folder / DROPPED_NAME
    with target.open("wb") as output:
        for unit_folder in unit_folders:
            with (unit_folder / DROPPED_NAME).open("rb") as log:
                shutil.copyfileobj(log, output)
        output.flush()
        os.fsync(output.fileno())
    return describe_file(target, DROPPED_NAME)


def copy_folder(source: Path, target: Path) -> Iterator[FileInfo]:
    """Copy the files of a flat folder and put them on disk.

    Args:
        source: folder of the files.
        target: folder inside the dataset; made here.

    Yields:
        Each file as the manifest lists it, in the order of the names.
    """
    target.mkdir()
    for path in sorted(source.iterdir()):
        link_or_copy(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
        yield describe_file(target / path.name, f"{target.name}/{path.name}")
    sync_folder(target)


def describe_file(path: Path, name: str) -> FileInfo:
    """Size and sha256 of a file, under the name that the manifest gives it."""
    with path.open("rb") as file:
        sha256, _ = hash_blocks(file)
    return FileInfo(name, path.stat().st_size, sha256)


def publish_dataset(partial: Path, output: Path) -> None:
    """Move a whole dataset to its place, so that it is one only when all of it is there.

    Args:
        partial: folder of all its files, on disk. A rename between two names of one file does
            nothing, by POSIX, so some may be left there.
        output: the dataset folder, on the same file system.
    """
    last = [partial / MANIFEST_NAME, partial / SEAL_NAME]
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path not in last)
    for path in files:
        target = output / path.relative_to(partial)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    for folder in {output, *(output / path.relative_to(partial).parent for path in files)}:
        sync_folder(folder)
    for path in last:
        path.replace(output / path.name)
        sync_folder(output)
