"""One commit as a reader sees it: what is in the folder, and whether every byte is as written.

    checkpoints/step-00010000/
        generator/rank-00000.safetensors ...     weights and Adam's averages, a file a rank
        discriminator/rank-00000.safetensors ...
        train_state.json                         step, counters, sums of the current interval
        config.resolved.json                     the configuration it belongs to
        manifest.json                            name, size and sha256 of every file above
        manifest.sha256                          sha256 of manifest.json

`pipeline.checkpoint` writes commits and chooses among them.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import CorruptError

FORMAT_VERSION = 1
_COMMIT = re.compile(r"step-(\d{8})$")
_HASH_CHUNK_BYTES = 1 << 22


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
        seal = (commit.path / "manifest.sha256").read_bytes()
        actual = sha256_of(path)
    except OSError as error:
        raise CorruptError(f"{path}: unreadable ({error})") from error
    if seal != f"{actual}\n".encode():
        raise CorruptError(f"{path}: sha256 is {actual}, manifest.sha256 says {seal!r}")
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


def check_names(commit: Commit, manifest: dict[str, Any]) -> None:
    """Refuse state that nobody wrote into a commit: a reader takes every rank file it finds.

    Args:
        commit: The commit.
        manifest: Its manifest.

    Raises:
        CorruptError: There is a safetensors file that the manifest does not list.
    """
    for path in sorted(commit.path.rglob("*.safetensors")):
        if path.relative_to(commit.path).as_posix() not in manifest["files"]:
            raise CorruptError(f"{path}: not in manifest.json; remove it, or use another commit")


def verify_commit(commit: Commit) -> None:
    """Check every byte of a commit in this process alone.

    Args:
        commit: The commit.

    Raises:
        CorruptError: Something is not as written; the message names the file.
    """
    manifest = read_manifest(commit)
    check_names(commit, manifest)
    verify_files(commit, sorted(manifest["files"]), manifest)
