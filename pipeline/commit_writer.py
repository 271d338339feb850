"""Writing one commit: all ranks together, again after a passing failure, here or in a thread.

    room      rank 0 compares what all ranks are about to write with what is free
    prepare   rank 0 makes `step-N.partial` and writes what belongs to no rank
    share     every rank writes, syncs and hashes its files
    publish   rank 0 writes manifest and seal, renames the folder; then `latest`, state.json, and
              what retention no longer keeps is removed

After each part the ranks tell each other how it went, so that all of them go on, try again or give
up together. What has no collective of the training loop's group in it can run beside training:
`BackgroundWrite` does that over a group of its own.
"""

import errno
import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from data_prep.errors import UserError
from pipeline import faults
from pipeline.commit import FORMAT_VERSION, Commit, commit_name, sha256_of
from pipeline.commit_upkeep import Upkeep, free_bytes
from pipeline.engine_state import Snapshot, write_snapshot
from pipeline.run_folder import fsync_file, fsync_folder, to_json, write_durably

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 8.0
_LOOK_SECONDS = 0.5
SPARE_BYTES = 16 << 20
"""Room that a commit must leave for metrics and logs, beside a hundredth of its own size."""
PASSING_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS),
    *(errno.ESTALE, errno.ETIMEDOUT),
)
"""Somebody makes room, a server comes back: worth another attempt."""

logger = logging.getLogger(__name__)


class SaveError(UserError):
    """A commit could not be written; the same on all ranks, and the earlier commits are intact."""


class PassingSaveError(SaveError):
    """A commit that may succeed at another attempt."""


@dataclass(frozen=True)
class Draft:
    """A commit's contents, before it is anywhere."""

    step: int
    shares: dict[str, Callable[[], Snapshot]]
    """Network -> what makes or has this rank's slices; called once an attempt."""
    share_bytes: int
    """What they take on this rank."""
    train_state: str
    """JSON."""
    config: str
    """JSON."""


class _Problem(NamedTuple):
    """What one rank tells the others."""

    text: str
    passing: bool


class CommitWriter:
    """Writes commits of one run; every method is a collective of its group."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        group: dist.ProcessGroup | None,
        *,
        attempts: int,
        upkeep: Upkeep,
        on_published: Callable[[int], None] | None,
    ) -> None:
        """Look at a folder.

        Args:
            folder: The run's checkpoints folder.
            rank: This process's rank.
            group: A gloo group of all ranks that nobody else uses meanwhile; None for one process.
            attempts: Times that a commit is tried.
            upkeep: Retention; used on rank 0.
            on_published: Called on rank 0 with the step of a commit that is safe.
        """
        self._folder = folder
        self._rank = rank
        self._group = group
        self._attempts = attempts
        self._upkeep = upkeep
        self._on_published = on_published
        self.published_step = 0
        """Of the newest commit that this writer has published; the same on all ranks."""

    def write(self, draft: Draft, progress: Callable[[], None]) -> Commit:
        """Publish a commit.

        Args:
            draft: Its contents.
            progress: Called again and again while files are written and hashed.

        Returns:
            The commit.

        Raises:
            SaveError: It could not be written; on all ranks, and nothing is left behind.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(PassingSaveError),
            stop=stop_after_attempt(self._attempts),
            # No jitter: the ranks must take their next attempt together.
            wait=wait_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS),
            before_sleep=self._warn_of_retry,
            reraise=True,
        )
        return retrying(self._attempt, draft, progress)

    def _warn_of_retry(self, state: RetryCallState) -> None:
        if self._rank == 0 and state.outcome is not None:
            text = str(state.outcome.exception())  # the error's frames hold snapshots
            logger.warning("%s; attempt %d of %d", text, state.attempt_number, self._attempts)

    def _attempt(self, draft: Draft, progress: Callable[[], None]) -> Commit:
        progress()
        final = self._folder / commit_name(draft.step)
        partial = final.with_name(final.name + ".partial")
        needed = sum(gather(draft.share_bytes, self._group))
        try:
            self._together(draft, needed, lambda: self._make_room(draft, needed))
            self._together(draft, needed, lambda: self._prepare(partial, draft))
            parts = self._together(
                draft, needed, lambda: self._write_share(partial, draft, progress)
            )
            self._together(draft, needed, lambda: self._publish(partial, final, parts, draft.step))
        except SaveError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.published_step = draft.step
        commit = Commit(final, draft.step)
        if self._rank == 0:
            self._announce(commit)
        return commit

    def _make_room(self, draft: Draft, needed: int) -> None:
        """Refuse to start what cannot end; old commits that are about to go may go first."""
        if self._rank != 0:
            return
        needed = room_for(needed)
        if free_bytes(self._folder) < needed:
            self._upkeep.prune(expecting=True)
        if (free := free_bytes(self._folder)) < needed:
            raise SaveError(
                f"{self._folder}: commit {commit_name(draft.step)} needs {needed:,} bytes and "
                f"{free:,} bytes are free there: make room, or lower checkpoint.keep_last (now "
                f"{self._upkeep.keep_last})"
            )

    def _prepare(self, partial: Path, draft: Draft) -> None:
        """Make the folder and write what belongs to no rank."""
        faults.reach("save.begin", draft.step)
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            for network in draft.shares:
                (partial / network).mkdir(parents=True)
            write_durably(partial / "train_state.json", draft.train_state)
            write_durably(partial / "config.resolved.json", draft.config)

    def _write_share(
        self, partial: Path, draft: Draft, progress: Callable[[], None]
    ) -> dict[str, Any]:
        """Write and sync this rank's files; returns their manifest entries."""
        faults.reach("save.share", draft.step)
        mine = {f"{name}/rank-{self._rank:05d}.safetensors": s for name, s in draft.shares.items()}
        for name, share in mine.items():
            write_snapshot(share(), partial / name, progress)
        faults.reach("save.written", draft.step)
        for name in mine:
            fsync_file(partial / name)
            progress()
        names = [*mine, *(["train_state.json", "config.resolved.json"] if self._rank == 0 else [])]
        return {name: describe_file(partial / name, progress) for name in names}

    def _publish(self, partial: Path, final: Path, parts: list[dict[str, Any]], step: int) -> None:
        """Seal and rename a complete `.partial` folder."""
        if self._rank != 0:
            return
        faults.reach("save.manifest", step)
        files = {name: entry for part in parts for name, entry in part.items()}
        for name, entry in files.items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise OSError(
                    errno.ESTALE,
                    "written by another rank, and rank 0 does not see it: run.folder must be on a "
                    "file system that all ranks share",
                    str(path),
                )
        seal(partial, step, len(parts), files)
        faults.reach("save.rename", step)
        replaced = final.with_name(final.name + ".removing")
        if final.is_dir():  # the same step again, after a run went back to an earlier one
            final.rename(replaced)
        partial.rename(final)
        fsync_folder(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _announce(self, commit: Commit) -> None:
        """Say where the newest commit is, and remove old ones; none of it can unmake the commit."""
        self._upkeep.trust(commit)
        try:
            faults.reach("save.latest", commit.step)
            write_durably(self._folder / "latest", commit.path.name + "\n")
            if self._on_published is not None:
                self._on_published(commit.step)
            faults.reach("save.prune", commit.step)
            self._upkeep.prune()
        except OSError as error:
            logger.warning("%s is committed, but what follows failed: %s", commit.path, error)

    def _together(self, draft: Draft, needed: int, action: Callable[[], T]) -> list[T]:
        """Do something on every rank; where one fails to write, all of them raise the same."""
        result, problem, unexpected = None, None, None
        try:
            result = action()
        except SaveError as error:
            problem = _Problem(str(error), passing=False)
        except (OSError, SafetensorError) as error:
            problem = _Problem(
                f"rank {self._rank} cannot write a checkpoint into {self._folder}: {error} "
                f"({commit_name(draft.step)} needs {needed:,} bytes, "
                f"{free_bytes(self._folder):,} bytes are free there)",
                _error_number(error) in PASSING_ERRORS,
            )
        except Exception as error:
            # The others must hear of it, or they would wait for this rank until a time-out.
            unexpected = error
            problem = _Problem(f"rank {self._rank}: {type(error).__name__}: {error}", False)
        reports = gather((result, problem), self._group)
        if unexpected is not None:
            raise unexpected
        problems = [problem for _, problem in reports if problem is not None]
        if problems:
            passing = all(problem.passing for problem in problems)
            raise (PassingSaveError if passing else SaveError)(problems[0].text)
        return [result for result, _ in reports]


class BackgroundWrite:
    """One commit that is written beside training."""

    def __init__(self, writer: CommitWriter, draft: Draft) -> None:
        """Start.

        Args:
            writer: Has a group of its own.
            draft: Snapshots; they are freed as soon as they are written.
        """
        self._error: Exception | None = None
        self._marks = 0
        # A daemon: a process that fails elsewhere must not wait for its peers' answers here.
        self._thread = threading.Thread(
            target=self._run, args=(writer, draft), name="commit-writer", daemon=True
        )
        self._thread.start()

    def _run(self, writer: CommitWriter, draft: Draft) -> None:
        try:
            writer.write(draft, self._mark)
        except SaveError as error:
            self._error = SaveError(str(error))  # without frames, which hold the snapshots
        except Exception as error:
            self._error = error

    def _mark(self) -> None:
        self._marks += 1

    def join(self, progress: Callable[[], None]) -> Exception | None:
        """Wait for its end.

        Args:
            progress: Called while it gets on.

        Returns:
            A SaveError, the same on all ranks; something that nobody expected; or None.
        """
        marks = -1
        while self._thread.is_alive():
            self._thread.join(timeout=_LOOK_SECONDS)
            if marks != self._marks:
                marks = self._marks
                progress()
        return self._error


def room_for(num_bytes: int) -> int:
    """Say how much must be free before a commit is begun.

    Args:
        num_bytes: What all ranks are about to write.

    Returns:
        Bytes.
    """
    return num_bytes + num_bytes // 100 + SPARE_BYTES


def seal(folder: Path, step: int, world_size: int, files: dict[str, Any]) -> None:
    """Write the manifest of a folder that is complete but for it, and make all names durable.

    Args:
        folder: A `.partial` folder whose files are on the disk.
        step: Completed optimizer steps.
        world_size: Ranks that the files are of.
        files: Relative name -> bytes and sha256.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "files": files,
    }
    write_durably(folder / "manifest.json", to_json(manifest))
    write_durably(folder / "manifest.sha256", sha256_of(folder / "manifest.json") + "\n")
    for each in (*(path for path in folder.iterdir() if path.is_dir()), folder):
        fsync_folder(each)


def describe_file(path: Path, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Read a file back from where it was written.

    Args:
        path: The file.
        progress: Called after every few megabytes.

    Returns:
        Its entry in the manifest: bytes and sha256.
    """
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, progress)}


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Collect a small value from every rank, on every rank; a collective.

    Args:
        value: This rank's.
        group: All ranks; None for a single process.

    Returns:
        The values in rank order.
    """
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _error_number(error: Exception) -> int | None:
    """The system's number of an error; safetensors has it in the text alone."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else None
