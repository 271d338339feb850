"""Checkpoints as commits: whole or absent, verified before use, one for both networks.

    checkpoints/step-00010000/                   a commit, see `pipeline.commit`
    checkpoints/latest                           a hint for people; loading looks at the commits

    save   every rank writes into `.partial`, syncs and hashes its files; rank 0 writes the
           manifest, renames the folder, moves `latest`, and only then removes what retention no
           longer keeps (`pipeline.commit_writer`, `pipeline.commit_upkeep`); where one rank cannot
           write, no rank commits and training can go on
    load   newest first; the first commit whose every byte is as written is used, and what was
           passed over is named and set aside

With checkpoint.asynchronous training waits for a copy in memory only; the rest happens in a thread.
The next `save`, or `finish`, waits for that thread and raises what it could not do.

Why not DeepSpeed's own files: they are pickles, they do not cross ZeRO stages, and a flipped bit in
them loads without a word. The slices here are its state, in a form that fits any stage and world.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.errors import CorruptError
from pipeline.commit import (
    Commit,
    UnknownFormatError,
    check_names,
    commit_name,
    list_commits,
    read_manifest,
    verify_files,
)
from pipeline.commit_upkeep import Upkeep
from pipeline.commit_writer import BackgroundWrite, CommitWriter, Draft, SaveError, gather
from pipeline.config import CheckpointSection
from pipeline.engine_state import Snapshot, snapshot, state_bytes
from pipeline.run_folder import to_json

__all__ = ["CheckpointStore", "SaveError"]

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The commits of one run; every method is a collective of the control group."""

    def __init__(
        self,
        folder: Path,
        section: CheckpointSection,
        rank: int,
        group: dist.ProcessGroup | None,
        *,
        writer_group: dist.ProcessGroup | None = None,
        on_published: Callable[[int], None] | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Look at a folder.

        Args:
            folder: The run's checkpoints folder.
            section: Retention, attempts, and whether training waits.
            rank: This process's rank.
            group: Control group of all ranks; None for a single process.
            writer_group: Another gloo group of all ranks, for what is written beside training:
                its collectives must never meet those of the loop. None where nothing is.
            on_published: Called on rank 0, in the thread that writes, with the step of a commit
                that is safe.
            on_progress: Called on every rank, in the thread that waits for files, while they are
                written or read: a slow disk is no hang.

        Raises:
            ValueError: Several ranks are to write beside training and have no group for it.
        """
        if section.asynchronous and group is not None and group.size() > 1 and writer_group is None:
            raise ValueError("checkpoint.asynchronous: several ranks need a writer_group")
        self._folder = folder
        self._section = section
        self._rank = rank
        self._group = group
        self._on_progress = on_progress
        self._upkeep = Upkeep(folder, section)
        self._writer = CommitWriter(
            folder,
            rank,
            writer_group if section.asynchronous else group,
            attempts=section.write_attempts,
            upkeep=self._upkeep,
            on_published=on_published,
        )
        self._under_way: BackgroundWrite | None = None

    @property
    def published_step(self) -> int:
        """Step of the newest commit that this process knows to be safe; 0 where there is none."""
        return self._writer.published_step

    def save(
        self,
        step: int,
        engines: dict[str, Any],
        train_state: dict[str, Any],
        config_json: str,
        *,
        wait: bool = False,
    ) -> Commit:
        """Publish the state of all networks, or start to.

        Args:
            step: Completed optimizer steps.
            engines: "generator" and "discriminator", or "joint".
            train_state: JSON-ready state of the trainer.
            config_json: The resolved configuration.
            wait: Return when it is published, with checkpoint.asynchronous too; for a last commit.

        Returns:
            The commit; it is published where training waits for it, and otherwise once `finish`
            or the next `save` returns.

        Raises:
            SaveError: A rank could not write; on all ranks, and nothing is left behind. With
                checkpoint.asynchronous and without `wait` it is the commit before this one that
                failed, and this one is under way.
        """
        earlier = self._join()
        in_background = self._section.asynchronous and not wait
        shares: dict[str, Callable[[], Snapshot]] = {}
        for network, engine in engines.items():
            # Made only when it is written where training waits: one network's copy at a time.
            take = partial(snapshot, engine, self._rank)
            shares[network] = partial(_same, take()) if in_background else take
        draft = Draft(
            step,
            shares,
            sum(state_bytes(engine, self._rank) for engine in engines.values()),
            to_json(train_state),
            config_json,
        )
        if not in_background:
            if earlier is not None:
                logger.warning("%s; step %d is written now", earlier, step)
            return self._writer.write(draft, self._on_progress)
        self._under_way = BackgroundWrite(self._writer, draft)
        if earlier is not None:
            raise earlier
        return Commit(self._folder / commit_name(step), step)

    def finish(self) -> None:
        """Wait for the commit that is under way, if there is one.

        Raises:
            SaveError: It could not be written; the same on all ranks.
        """
        error = self._join()
        if error is not None:
            raise error

    def _join(self) -> SaveError | None:
        """Wait for the commit that is under way; returns what it could not do."""
        if self._under_way is None:
            return None
        error = self._under_way.join(self._on_progress)
        self._under_way = None
        if error is not None and not isinstance(error, SaveError):
            raise error
        return error

    def newest_valid(self) -> Commit | None:
        """Find the newest commit whose every byte is as written; ranks share the hashing.

        Commits newer than it are named in the log and renamed to `.corrupt-N`.

        Returns:
            The commit, or None where the run has none yet.

        Raises:
            CorruptError: There are commits and none of them is whole.
            UnknownFormatError: The newest was written by another version of the program.
        """
        if (error := self._join()) is not None:
            logger.warning("%s", error)
        if self._rank == 0:
            self._upkeep.remove_leftovers()
        self._barrier()
        damaged: dict[Path, str] = {}
        # As rank 0 sees them: on a shared file system the ranks' listings may differ for a while.
        mine = list_commits(self._folder) if self._rank == 0 else []
        for commit in reversed(gather(mine, self._group)[0]):
            problems = [p for p in gather(self._check_share(commit), self._group) if p is not None]
            for problem in problems:
                if isinstance(problem, UnknownFormatError):
                    raise problem
            if not problems:
                if self._rank == 0:
                    self._upkeep.set_aside(damaged)
                    self._upkeep.trust(commit)
                self._barrier()
                self._writer.published_step = commit.step
                return commit
            damaged[commit.path] = str(problems[0])
        if damaged:
            # Nothing is renamed here: the next start must not take the run for a new one.
            raise CorruptError(
                "no checkpoint is whole:\n  "
                + "\n  ".join(damaged.values())
                + f"\nrestore one from a copy into {self._folder}, or start again in another "
                "run.folder"
            )
        return None

    def _check_share(self, commit: Commit) -> CorruptError | UnknownFormatError | None:
        """Verify this rank's share of the files; returns what is wrong."""
        size = 1 if self._group is None else self._group.size()
        try:
            manifest = read_manifest(commit)
            check_names(commit, manifest)
            mine = sorted(manifest["files"])[self._rank :: size]
            verify_files(commit, mine, manifest, self._on_progress)
        except (CorruptError, UnknownFormatError) as error:
            return error
        except OSError as error:  # a disk may also refuse to list a folder
            return CorruptError(f"{commit.path}: unreadable ({error})")
        return None

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


def _same(taken: Snapshot) -> Snapshot:
    """Give out a snapshot that was taken before; the retries of a commit need it again."""
    return taken
