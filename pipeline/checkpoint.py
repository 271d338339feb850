"""Checkpoints as commits: whole or absent, verified before use, one for both networks.

    checkpoints/step-00010000/                   a commit, see `pipeline.commit`
    checkpoints/latest                           a hint for people; loading looks at the commits

    save   every rank writes into `.partial`, syncs and hashes its files; rank 0 writes the
           manifest, renames the folder, moves `latest`, and only then removes what retention no
           longer keeps; where one rank cannot write, no rank commits and training can go on
    load   newest first; the first commit whose every byte is as written is used, and what was
           passed over is named and set aside

Why not DeepSpeed's own files: they are pickles, they do not cross ZeRO stages, and a flipped bit in
them loads without a word. The slices here are its state, in a form that fits any stage and world.
"""

import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from data_prep.errors import CorruptError, UserError
from pipeline.commit import (
    FORMAT_VERSION,
    Commit,
    check_names,
    commit_name,
    list_commits,
    read_manifest,
    sha256_of,
    verify_files,
)
from pipeline.config import CheckpointSection
from pipeline.engine_state import write_state
from pipeline.run_folder import fsync_file, fsync_folder, to_json, write_durably

T = TypeVar("T")

logger = logging.getLogger(__name__)


class SaveError(UserError):
    """A commit could not be written; the same on all ranks, and the earlier commits are intact."""


class CheckpointStore:
    """The commits of one run; every method is a collective of the control group."""

    def __init__(
        self,
        folder: Path,
        section: CheckpointSection,
        rank: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Look at a folder.

        Args:
            folder: The run's checkpoints folder.
            section: Retention.
            rank: This process's rank.
            group: Control group of all ranks; None for a single process.
        """
        self._folder = folder
        self._section = section
        self._rank = rank
        self._group = group

    def save(
        self, step: int, engines: dict[str, Any], train_state: dict[str, Any], config_json: str
    ) -> Commit:
        """Publish the state of both networks.

        Args:
            step: Completed optimizer steps.
            engines: "generator" and "discriminator".
            train_state: JSON-ready state of the trainer.
            config_json: The resolved configuration.

        Returns:
            The commit.

        Raises:
            SaveError: A rank could not write; on all ranks, and nothing is left behind.
        """
        final = self._folder / commit_name(step)
        partial = final.with_name(final.name + ".partial")
        try:
            self._together(lambda: self._prepare(partial, engines, train_state, config_json))
            files = self._together(lambda: self._write_share(partial, engines))
            self._together(lambda: self._publish(partial, final, files, step))
        except SaveError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self._rank == 0:
            self._prune()
        self._barrier()
        return Commit(final, step)

    def _prepare(
        self, partial: Path, engines: dict[str, Any], train_state: dict[str, Any], config_json: str
    ) -> None:
        """Make the folder and write what belongs to no rank."""
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            for network in engines:
                (partial / network).mkdir(parents=True)
            write_durably(partial / "train_state.json", to_json(train_state))
            write_durably(partial / "config.resolved.json", config_json)

    def _write_share(self, partial: Path, engines: dict[str, Any]) -> dict[str, Any]:
        """Write and sync this rank's files; returns their manifest entries."""
        mine = [f"{network}/rank-{self._rank:05d}.safetensors" for network in engines]
        for name, engine in zip(mine, engines.values(), strict=True):
            write_state(engine, self._rank, partial / name)
            fsync_file(partial / name)
        if self._rank == 0:
            mine += ["train_state.json", "config.resolved.json"]
        return {name: _describe(partial / name) for name in mine}

    def _publish(self, partial: Path, final: Path, files: list[dict[str, Any]], step: int) -> None:
        """Seal and rename a complete `.partial` folder."""
        if self._rank != 0:
            return
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": len(files),
            "files": {name: entry for part in files for name, entry in part.items()},
        }
        write_durably(partial / "manifest.json", to_json(manifest))
        write_durably(partial / "manifest.sha256", sha256_of(partial / "manifest.json") + "\n")
        for folder in (*(p for p in partial.iterdir() if p.is_dir()), partial):
            fsync_folder(folder)
        if final.exists():  # the same step again, after its commit was found damaged or incomplete
            shutil.rmtree(final)
        partial.rename(final)
        fsync_folder(self._folder)
        write_durably(self._folder / "latest", final.name + "\n")

    def _prune(self) -> None:
        """Remove commits that retention no longer keeps; the newest always stays.

        What cannot be removed, such as a file that a reader on NFS holds open, is tried again at
        the next start: no reason to end a run that has just been saved.
        """
        commits = list_commits(self._folder)
        every = self._section.milestone_interval_steps
        for commit in commits[: -self._section.keep_last]:
            if not every or commit.step % every:
                # Renamed first: a removal that is interrupted leaves no half commit behind.
                doomed = commit.path.with_name(commit.path.name + ".removing")
                try:
                    commit.path.rename(doomed)
                    shutil.rmtree(doomed)
                except OSError as error:
                    logger.warning("%s could not be removed: %s", commit.path, error)

    def newest_valid(self) -> Commit | None:
        """Find the newest commit whose every byte is as written; ranks share the hashing.

        Commits newer than it are named in the log and renamed to `.corrupt-N`.

        Returns:
            The commit, or None where the run has none yet.

        Raises:
            CorruptError: There are commits and none of them is whole.
        """
        if self._rank == 0:
            for leftover in (*self._folder.glob("*.partial"), *self._folder.glob("*.removing")):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        self._barrier()
        damaged: dict[Path, str] = {}
        # As rank 0 sees them: on a shared file system the ranks' listings may differ for a while.
        for commit in reversed(self._gather(list_commits(self._folder))[0]):
            failures = [text for text in self._gather(self._check_share(commit)) if text]
            if not failures:
                self._set_aside(damaged)
                return commit
            damaged[commit.path] = failures[0]
        if damaged:
            # Nothing is renamed here: the next start must not take the run for a new one.
            raise CorruptError(
                "no checkpoint is whole:\n  "
                + "\n  ".join(damaged.values())
                + f"\nrestore one from a copy into {self._folder}, or start again in another "
                "run.folder"
            )
        return None

    def _set_aside(self, damaged: dict[Path, str]) -> None:
        """Name the damaged commits and move them out of the way without losing them."""
        if self._rank == 0:
            for path, problem in damaged.items():
                logger.warning("%s; the newest commit before it is used", problem)
                names = (path.with_name(f"{path.name}.corrupt-{n}") for n in itertools.count(1))
                path.rename(next(name for name in names if not name.exists()))
        self._barrier()

    def _check_share(self, commit: Commit) -> str:
        """Verify this rank's share of the files; returns what is wrong, or nothing."""
        size = 1 if self._group is None else self._group.size()
        try:
            manifest = read_manifest(commit)
            check_names(commit, manifest)
            verify_files(commit, sorted(manifest["files"])[self._rank :: size], manifest)
        except (CorruptError, OSError) as error:  # a disk may also refuse to read
            return str(error)
        return ""

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank; where one fails to write, all of them raise the same."""
        result, problem = None, ""
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            problem = (
                f"rank {self._rank} cannot write a checkpoint into {self._folder}: {error} "
                f"({_free_bytes(self._folder) / 1e6:,.0f} MB are free there)"
            )
        parts = self._gather((result, problem))
        for _, problem in parts:
            if problem:
                raise SaveError(problem)
        return [result for result, _ in parts]

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _gather(self, value: Any) -> list[Any]:
        """Collect a small value from every rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def _describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, read back from where it was written."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _free_bytes(folder: Path) -> int:
    """Free space where a folder is, or was before somebody removed it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
