"""One commit as a reader sees it: what is in the folder, and whether every byte is as written.

    checkpoints/step-00010000/
        generator/rank-00000.safetensors ...     weights and Adam's averages, a file a rank
        discriminator/rank-00000.safetensors ...
        train_state.json                         step, counters, sums of the current interval
        config.resolved.json                     the configuration it belongs to
        manifest.json                            name, size and sha256 of every file above
        manifest.sha256                          sha256 of manifest.json

`verify_commit` reads every byte, `check_sizes` none but the manifest's. `pipeline.checkpoint`
writes commits and chooses among them.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.errors import CorruptError, UserError

FORMAT_VERSION = 1
_COMMIT = re.compile(r"step-(\d{8,})")
_RANK_FILE = re.compile(r"([a-z]+)/rank-(\d{5})\.safetensors")
_JSON_FILE = re.compile(r"[a-z_]+(\.[a-z_]+)*\.json")
_REQUIRED = ("config.resolved.json", "train_state.json")
_SEALS = ("manifest.json", "manifest.sha256")
_HASH_CHUNK_BYTES = 1 << 22


class UnknownFormatError(UserError):
    """A commit of another program version; it is whole, so it is neither used nor set aside."""


class _FileEntry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format_version: int
    step: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    files: dict[str, _FileEntry]


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

        Raises:
            CorruptError: It cannot be read or is no JSON.
        """
        return _load_json(self.path / name)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: unreadable ({error})") from error


def commit_name(step: int) -> str:
    """Name a commit by its completed optimizer steps.

    Args:
        step: Completed optimizer steps.

    Returns:
        Such as "step-00010000".
    """
    return f"step-{step:08d}"


def is_commit_name(name: str) -> bool:
    """Whether a folder's name says that it is a commit.

    Args:
        name: Name without its parents.

    Returns:
        Whether it is "step-" and eight digits or more.
    """
    return _COMMIT.fullmatch(name) is not None


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
    commits = [Commit(path, int(match[1])) for match, path in found]
    return sorted((c for c in commits if c.path.name == commit_name(c.step)), key=lambda c: c.step)


def sha256_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """Hash a file in constant memory.

    Args:
        path: The file.
        progress: Called after every few megabytes.

    Returns:
        Hexadecimal sha256.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            progress()
    return digest.hexdigest()


def read_manifest(commit: Commit) -> dict[str, Any]:
    """Read a commit's manifest; check it against its own hash, and that it can be a manifest.

    Args:
        commit: A published commit.

    Returns:
        format_version, step, world_size, and files: name -> bytes and sha256.

    Raises:
        CorruptError: The manifest or its hash is missing or altered, or says what cannot be.
        UnknownFormatError: Another version of the program wrote it.
    """
    path, seal_path = commit.path / "manifest.json", commit.path / "manifest.sha256"
    for file in (path, seal_path):
        if not file.is_file():  # a named pipe would wait for ever
            raise CorruptError(f"{file}: unreadable (missing, or no ordinary file)")
    try:
        seal = seal_path.read_bytes()
        actual = sha256_of(path)
    except OSError as error:
        raise CorruptError(f"{path}: unreadable ({error})") from error
    if seal != f"{actual}\n".encode():
        raise CorruptError(f"{path}: sha256 is {actual}, manifest.sha256 says {seal[:80]!r}")
    manifest = _load_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an unknown"
        raise UnknownFormatError(
            f"{path}: format_version {version}, written by {age} program, and this one reads "
            f"{FORMAT_VERSION}: update this one, or name another run.folder"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path}: {where or 'the document'}: {first['msg']}") from error
    for problem in _contradictions(commit, manifest):
        raise CorruptError(f"{path}: {problem}")
    return manifest


def _contradictions(commit: Commit, manifest: dict[str, Any]) -> Iterator[str]:
    """Name what a valid seal does not excuse: other files, other ranks, another step."""
    step, names = manifest["step"], manifest["files"]
    named = _COMMIT.fullmatch(commit.path.name)
    if named and int(named[1]) != step:
        yield f"is of step {step}, and the folder is named {commit.path.name}"
    ranks: dict[str, set[int]] = {}
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            yield f"names {name!r} outside of the commit"
        if match := _RANK_FILE.fullmatch(name):
            ranks.setdefault(match[1], set()).add(int(match[2]))
        elif not _JSON_FILE.fullmatch(name) or name in _SEALS:
            yield f"names {name!r}, which is no file of a commit"
    for name in _REQUIRED:
        if name not in names:
            yield f"does not name {name}"
    world_size = manifest["world_size"]
    for network, found in ranks.items():
        if found != set(range(world_size)):
            yield f"names {len(found)} rank files of {network}, not those of {world_size} ranks"
    if not ranks:
        yield "names no rank file"


def check_names(commit: Commit, manifest: dict[str, Any]) -> None:
    """Refuse what nobody wrote into a commit: a reader takes every rank file it finds.

    Args:
        commit: The commit.
        manifest: Its manifest.

    Raises:
        CorruptError: There is a file or link that the manifest does not list; hidden files, which
            NFS makes and nobody reads, are no such.
    """
    for path in sorted(commit.path.rglob("*")):
        name = path.relative_to(commit.path)
        if path.is_dir() and not path.is_symlink():
            continue
        if not any(part.startswith(".") for part in name.parts) and (
            name.as_posix() not in (*manifest["files"], *_SEALS)
        ):
            raise CorruptError(f"{path}: not in manifest.json; remove it, or use another commit")


def check_sizes(commit: Commit, manifest: dict[str, Any], names: list[str] | None = None) -> None:
    """Check what costs no reading: that files are there, in the commit, and of their size.

    Args:
        commit: The commit.
        manifest: Its manifest.
        names: Relative names, as in the manifest; all of them where None.

    Raises:
        CorruptError: A file is missing, shorter, longer or elsewhere; the message names it.
    """
    for name in sorted(manifest["files"]) if names is None else names:
        path, expected = commit.path / name, manifest["files"][name]
        try:
            if not path.resolve().is_relative_to(commit.path.resolve()):
                raise CorruptError(f"{path}: leads outside of the commit")
            if not path.is_file():
                raise CorruptError(f"{path}: missing")
            size = path.stat().st_size
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
            raise CorruptError(f"{path}: unreadable ({error})") from error
        if size != expected["bytes"]:
            raise CorruptError(f"{path}: {size} bytes, written {expected['bytes']}")


def verify_files(
    commit: Commit,
    names: list[str],
    manifest: dict[str, Any],
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Check some of a commit's files: size, hash, and that they are what their names say.

    The last is for whoever can seal a manifest: a pickle has a valid hash, too.

    Args:
        commit: The commit.
        names: Relative names, as in the manifest.
        manifest: The commit's manifest.
        progress: Called after every few megabytes.

    Raises:
        CorruptError: A file is missing, shorter, longer, altered or no file of a commit; the
            message names it.
    """
    from pipeline.rank_files import open_rank_file  # costs a second to import

    for name in names:
        check_sizes(commit, manifest, [name])
        path, expected = commit.path / name, manifest["files"][name]
        try:
            actual = sha256_of(path, progress)
        except OSError as error:
            raise CorruptError(f"{path}: unreadable ({error})") from error
        if actual != expected["sha256"]:
            raise CorruptError(f"{path}: sha256 is {actual}, written {expected['sha256']}")
        if _RANK_FILE.fullmatch(name):
            open_rank_file(path)
        else:
            _load_json(path)


def verify_commit(commit: Commit) -> None:
    """Check every byte of a commit in this process alone.

    Args:
        commit: The commit.

    Raises:
        CorruptError: Something is not as written; the message names the file.
        UnknownFormatError: Another version of the program wrote it.
    """
    manifest = read_manifest(commit)
    check_names(commit, manifest)
    verify_files(commit, sorted(manifest["files"]), manifest)


def damage_of(commit: Commit) -> list[str]:
    """Check every byte of a commit, and go on after the first damaged file.

    Args:
        commit: The commit.

    Returns:
        A sentence for each damaged file; none where the commit is whole.

    Raises:
        UnknownFormatError: Another version of the program wrote it.
    """
    damage = []
    try:
        manifest = read_manifest(commit)
    except CorruptError as error:
        return [str(error)]
    try:
        check_names(commit, manifest)
    except CorruptError as error:
        damage.append(str(error))
    for name in sorted(manifest["files"]):
        try:
            verify_files(commit, [name], manifest)
        except CorruptError as error:
            damage.append(str(error))
    return damage
