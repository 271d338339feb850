"""What stays in a checkpoints folder: retention, room for the next commit, leftovers, damage.

    beyond_retention   which commits the newest `keep_last` and the milestones do not need
    Upkeep             rank 0's care of a run's folder while it trains
    prune_commits      the same rule by hand, `deberta checkpoint prune`, every kept byte verified

A damaged commit never counts as kept, so that it cannot push a whole one out. What this process
wrote and read back, or verified at its start, is trusted; of older commits the sizes are compared,
which costs no reading.
"""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import CorruptError
from pipeline.commit import (
    Commit,
    UnknownFormatError,
    check_sizes,
    list_commits,
    read_manifest,
    verify_commit,
)
from pipeline.config import CheckpointSection

logger = logging.getLogger(__name__)


def free_bytes(folder: Path) -> int:
    """Ask how much room there is.

    Args:
        folder: A folder, which may have been removed meanwhile.

    Returns:
        Bytes that are free where it is, or was.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def beyond_retention(
    commits: list[Commit],
    keep_last: int,
    milestone_interval_steps: int,
    counts: Callable[[Commit], bool],
) -> list[Commit]:
    """Choose the commits that may be removed.

    Args:
        commits: Oldest first.
        keep_last: So many of the newest that count are kept.
        milestone_interval_steps: Multiples of this are kept; 0 keeps none.
        counts: Whether a commit can be relied on; asked newest first, as far as needed.

    Returns:
        All commits older than those that are kept and no milestone; none where too few count.
    """
    kept = list(itertools.islice(filter(counts, reversed(commits)), keep_last))
    if len(kept) < keep_last:
        return []
    every = milestone_interval_steps
    older = [commit for commit in commits if commit.step < kept[-1].step]
    return [commit for commit in older if not every or commit.step % every]


def remove_commit(commit: Commit) -> None:
    """Remove a commit so that an interruption leaves no half of it under its name.

    Args:
        commit: The commit.

    Raises:
        OSError: It cannot be removed, such as a file that a reader on NFS holds open.
    """
    doomed = commit.path.with_name(commit.path.name + ".removing")
    commit.path.rename(doomed)
    shutil.rmtree(doomed)


class Upkeep:
    """Rank 0's care of the checkpoints folder of a run that trains."""

    def __init__(self, folder: Path, section: CheckpointSection) -> None:
        """Look at a folder.

        Args:
            folder: The run's checkpoints folder.
            section: Retention.
        """
        self._folder = folder
        self._section = section
        self._trusted: set[Path] = set()
        self._distrusted: set[Path] = set()

    @property
    def keep_last(self) -> int:
        """Newest commits that are kept."""
        return self._section.keep_last

    def trust(self, commit: Commit) -> None:
        """Remember that every byte of a commit was read and is as written.

        Args:
            commit: The commit.
        """
        self._trusted.add(commit.path)
        self._distrusted.discard(commit.path)

    def prune(self, *, expecting: bool = False) -> None:
        """Remove commits that retention no longer keeps; the newest trusted one always stays.

        What cannot be removed is tried again after the next commit: no reason to end a run that
        has just been saved.

        Args:
            expecting: Another commit is about to come, and there is no room for it.
        """
        commits, keep_last = list_commits(self._folder), self._section.keep_last
        if expecting:
            keep_last = max(1, keep_last - 1)
        every = self._section.milestone_interval_steps
        doomed = beyond_retention(commits, keep_last, every, self._counts)
        newest_trusted = max((c.step for c in commits if c.path in self._trusted), default=-1)
        for commit in doomed:
            if commit.step >= newest_trusted:  # nothing newer has been read: it may be the last
                continue
            try:
                remove_commit(commit)
            except OSError as error:
                logger.warning("%s could not be removed: %s", commit.path, error)

    def _counts(self, commit: Commit) -> bool:
        """Whether a commit looks whole at a cost that every commit of a run can bear."""
        if commit.path in self._distrusted:
            return False
        try:
            check_sizes(commit, read_manifest(commit))
        except UnknownFormatError:
            return True
        except CorruptError as error:
            logger.warning("%s; it does not count as kept", error)
            return False
        return True

    def remove_leftovers(self) -> None:
        """Remove what a killed save or removal left behind."""
        for leftover in (*self._folder.glob("*.partial"), *self._folder.glob("*.removing")):
            with contextlib.suppress(OSError):
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()

    def set_aside(self, damaged: dict[Path, str]) -> None:
        """Name damaged commits and move them out of the way without losing them.

        Args:
            damaged: Folder -> what is wrong with it.
        """
        for path, problem in damaged.items():
            logger.warning("%s; the newest commit before it is used", problem)
            names = (path.with_name(f"{path.name}.corrupt-{n}") for n in itertools.count(1))
            try:
                path.rename(next(name for name in names if not name.exists()))
            except OSError as error:
                logger.warning("%s could not be set aside: %s", path, error)
                self._distrusted.add(path)


@dataclass(frozen=True)
class PruneReport:
    """What `prune_commits` did, or would do."""

    removed: list[Commit]
    kept: list[Commit]
    damaged: dict[Path, str]
    """Commits among those kept that do not count: folder -> what is wrong."""
    freed_bytes: int


def prune_commits(
    checkpoints: Path, keep_last: int, milestone_interval_steps: int, *, dry_run: bool
) -> PruneReport:
    """Remove old commits by hand, after every byte of those that stay has been read.

    Args:
        checkpoints: The folder of commits; nobody else may be writing into it.
        keep_last: Newest whole commits that are kept.
        milestone_interval_steps: Multiples of this are kept too; 0 keeps none.
        dry_run: Remove nothing.

    Returns:
        What was removed and what stays.

    Raises:
        CorruptError: No commit is whole: nothing is removed.
        OSError: Something cannot be removed.
    """
    damaged: dict[Path, str] = {}

    def is_whole(commit: Commit) -> bool:
        try:
            verify_commit(commit)
        except CorruptError as error:
            damaged[commit.path] = str(error)
        return commit.path not in damaged

    commits = list_commits(checkpoints)
    removed = beyond_retention(commits, keep_last, milestone_interval_steps, is_whole)
    if len(damaged) == len(commits) and commits:
        problems = "\n  ".join(damaged.values())
        raise CorruptError(f"no checkpoint is whole, so none is removed:\n  {problems}")
    freed = sum(disk_bytes(commit.path) for commit in removed)
    if not dry_run:
        for commit in removed:
            remove_commit(commit)
    kept = [commit for commit in commits if commit not in removed]
    return PruneReport(removed, kept, damaged, freed)


def disk_bytes(folder: Path) -> int:
    """Add up the files of a folder.

    Args:
        folder: Such as a commit's.

    Returns:
        Bytes; links do not count.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
