"""Checkpoints as commits: whole or absent, verified before use, one for both networks.

    checkpoints/step-00010000/
        generator/rank-00000.safetensors ...     weights and Adam's averages, a file a rank
        discriminator/rank-00000.safetensors ...
        train_state.json                         step, counters, sums of the current interval
        config.resolved.json                     the configuration it belongs to
        manifest.json                            name, size and sha256 of every file above
        manifest.sha256                          sha256 of manifest.json
    checkpoints/latest                           a hint for people; loading looks at the commits

    save   every rank writes into `.partial`, syncs and hashes its files; rank 0 writes the
           manifest, renames the folder, moves `latest`, and only then removes what retention no
           longer keeps
    load   newest first; the first commit whose every byte is as written is used, and what was
           passed over is named and set aside

Why not DeepSpeed's own files: they are pickles, they do not cross ZeRO stages, and a flipped bit in
them loads without a word. The slices here are its state, in a form that fits any stage and world.
"""

import hashlib
import itertools
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.errors import CorruptError
from pipeline.config import CheckpointSection
from pipeline.engine_state import write_state
from pipeline.run_folder import fsync_file, fsync_folder, to_json, write_durably

FORMAT_VERSION = 1
_COMMIT = re.compile(r"step-(\d{8})$")
_HASH_CHUNK_BYTES = 1 << 22

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commit:
    """A published checkpoint."""

    path: Path
    step: int

    def read_json(self, name: str) -> Any:
        """Read one of the commit's JSON files.

        Args:
            name: File name, such as train_state.json.

        Returns:
            The decoded value.
        """
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def commit_name(step: int) -> str:
    """Name a commit by its completed optimizer steps.

    Args:
        step: Completed optimizer steps.

    Returns:
        Such as "step-00010000".
    """
    return f"step-{step:08d}"


def list_commits(checkpoints: Path) -> list[Commit]:
    """Find published commits without verifying them.

    Args:
        checkpoints: The run's checkpoints folder.

    Returns:
        Commits, oldest first.
    """
    if not checkpoints.is_dir():
        return []
    found = [(match, p) for p in checkpoints.iterdir() if (match := _COMMIT.fullmatch(p.name))]
    return sorted((Commit(p, int(match[1])) for match, p in found), key=lambda c: c.step)


def sha256_of(path: Path) -> str:
    """Hash a file in constant memory.

    Args:
        path: The file.

    Returns:
        Hexadecimal sha256.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(commit: Commit) -> dict[str, Any]:
    """Read a commit's manifest and check it against its own hash.

    Args:
        commit: A published commit.

    Returns:
        The manifest.

    Raises:
        CorruptError: The manifest or its hash is missing, altered or of another format.
    """
    path = commit.path / "manifest.json"
    try:
        expected = (commit.path / "manifest.sha256").read_bytes().decode("ascii").strip()
        actual = sha256_of(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path}: unreadable ({error})") from error
    if actual != expected:
        raise CorruptError(f"{path}: sha256 is {actual}, manifest.sha256 says {expected}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CorruptError(
            f"{path}: format_version {manifest.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}"
        )
    return manifest


def verify_files(commit: Commit, names: list[str], manifest: dict[str, Any]) -> None:
    """Check sizes and hashes of some of a commit's files.

    Args:
        commit: The commit.
        names: Relative names, as in the manifest.
        manifest: The commit's manifest.

    Raises:
        CorruptError: A file is missing, shorter, longer or altered; the message names it.
    """
    for name in names:
        path, expected = commit.path / name, manifest["files"][name]
        if not path.resolve().is_relative_to(commit.path.resolve()):
            raise CorruptError(f"{commit.path}: manifest.json names {name!r} outside of the commit")
        if not path.is_file():
            raise CorruptError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CorruptError(f"{path}: {path.stat().st_size} bytes, written {expected['bytes']}")
        if (actual := sha256_of(path)) != expected["sha256"]:
            raise CorruptError(f"{path}: sha256 is {actual}, written {expected['sha256']}")


def verify_commit(commit: Commit) -> None:
    """Check every byte of a commit in this process alone.

    Args:
        commit: The commit.

    Raises:
        CorruptError: Something is not as written; the message names the file.
    """
    manifest = read_manifest(commit)
    verify_files(commit, sorted(manifest["files"]), manifest)


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
        """
        final = self._folder / commit_name(step)
        partial = final.with_name(final.name + ".partial")
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            for network in engines:
                (partial / network).mkdir(parents=True)
            write_durably(partial / "train_state.json", to_json(train_state))
            write_durably(partial / "config.resolved.json", config_json)
        self._barrier()
        mine = [f"{network}/rank-{self._rank:05d}.safetensors" for network in engines]
        for name, engine in zip(mine, engines.values(), strict=True):
            write_state(engine, self._rank, partial / name)
            fsync_file(partial / name)
        if self._rank == 0:
            mine += ["train_state.json", "config.resolved.json"]
        files = self._gather({name: _describe(partial / name) for name in mine})
        if self._rank == 0:
            self._publish(partial, final, files, step)
        self._barrier()
        return Commit(final, step)

    def _publish(self, partial: Path, final: Path, files: list[dict[str, Any]], step: int) -> None:
        """Seal and rename a complete `.partial` folder, then apply retention."""
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
        self._prune()

    def _prune(self) -> None:
        """Remove commits that retention no longer keeps; the newest always stays."""
        commits = list_commits(self._folder)
        every = self._section.milestone_interval_steps
        for commit in commits[: -self._section.keep_last]:
            if not every or commit.step % every:
                # Renamed first: a removal that is interrupted leaves no half commit behind.
                doomed = commit.path.with_name(commit.path.name + ".removing")
                commit.path.rename(doomed)
                shutil.rmtree(doomed)

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
                shutil.rmtree(leftover, ignore_errors=True)
        self._barrier()
        damaged: dict[Path, str] = {}
        for commit in reversed(list_commits(self._folder)):
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
            verify_files(commit, sorted(manifest["files"])[self._rank :: size], manifest)
        except CorruptError as error:
            return str(error)
        return ""

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
