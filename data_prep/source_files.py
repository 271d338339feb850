"""Sources as users name them -> the files that they mean, in a fixed order.

- `find_source_files`: a file, folder (recursive), glob, `datasets` folder or URL as its files.
- `SourceFile`: one of them.
- `ACCEPTED`: the formats, in words for messages.

The format is told by the suffix in front of a suffix of compression ("news.jsonl.gz" is jsonl);
whether a file really is compressed is told by its first bytes when it is read.
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

from data_prep.errors import UserError
from data_prep.locations import file_size, is_remote, list_remote, open_file
from data_prep.read_report import ReadReport

Kind = Literal["txt", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]

ACCEPTED = (
    ".txt, .jsonl, .json, .csv, .tsv (each plain or packed with gzip, zstd or xz), .parquet, and "
    "folders that `datasets` wrote with save_to_disk; also as URLs, such as s3://bucket/folder or "
    "hf://datasets/OWNER/NAME"
)
_KINDS: dict[str, Kind] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSION_SUFFIXES = {".gz", ".gzip", ".zst", ".zstd", ".xz"}
_DATASET_STATE = "state.json"
_DATASET_FILES = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", _DATASET_STATE}
_IGNORED = "ignored file"


@dataclass(frozen=True)
class SourceFile:
    """A file to be read."""

    path: str
    """As the user would write it."""
    real_path: str
    """Absolute and without symbolic links in front of the file's own name."""
    kind: Kind
    """Its format, apart from compression."""
    num_bytes: int
    """Its size."""


def find_source_files(source: str, report: ReadReport) -> list[SourceFile]:
    """List the files that a source means.

    Args:
        source: A file, a folder, a folder written by `datasets`, or a glob ("**" descends).
        report: Where files that are passed over are noted.

    Returns:
        The files, sorted by path; at least one.

    Raises:
        UserError: The source is missing, is not of an accepted format, or holds nothing readable.
    """
    path = Path(source)
    ignored_before = report.notes.get(_IGNORED, 0)
    if is_remote(source):
        files = list(_remote_files(source, report))
    elif path.is_dir():
        files = list(_walk(path, report, set()))
    elif path.exists():
        return [_named_file(path)]
    elif glob.has_magic(source):
        files = list(_matches(source, report))
    else:
        kind = "is a broken link" if path.is_symlink() else "does not exist"
        hub = f" (on the Hugging Face hub? then hf://datasets/{source})" * _is_hub_name(source)
        raise UserError(
            f"source {source} {kind}{hub}; accepted are files, folders and globs of {ACCEPTED}"
        )
    if not files:
        ignored = report.notes.get(_IGNORED, 0) - ignored_before
        others = f" ({ignored} other files were passed over)" if ignored else ""
        raise UserError(f"source {source} holds no text to read{others}; accepted are {ACCEPTED}")
    return sorted(files, key=lambda file: Path(file.path).parts)


def _is_hub_name(source: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def _remote_files(source: str, report: ReadReport) -> Iterator[SourceFile]:
    urls = list_remote(source)
    saved = _saved_remotely(urls)
    for url in urls:
        folder = next((folder for folder in saved if url.startswith(folder)), None)
        if folder is not None and url not in saved[folder]:
            continue
        # Behind the path a URL may carry a query: "news.jsonl.gz?download=true".
        path = PurePosixPath(urlsplit(url).path)
        kind = "arrow" if folder is not None else kind_of(path)
        if kind is None and len(urls) == 1 and urlsplit(source).path.endswith(path.name):
            raise _unknown_format(source)
        if kind is None or path.name in _DATASET_FILES:
            report.note(_IGNORED, url, detail="format")
            continue
        try:
            yield SourceFile(url, url, kind, file_size(url))
        except OSError as error:
            raise UserError(f"source {url} cannot be read: {error}") from error


def _saved_remotely(urls: Sequence[str]) -> dict[str, set[str]]:
    """Remote folders that `datasets` wrote, with "/" behind -> the files of their states."""
    saved = {}
    for url in urls:
        folder = url.removesuffix(_DATASET_STATE)
        if folder == url or not folder.endswith("/"):
            continue
        try:
            with open_file(url) as file:
                names = _names_in_state(file.read(), url)
        except OSError as error:
            raise UserError(f"source {url} cannot be read: {error}") from error
        saved[folder] = {folder + name for name in names}
        for name in names:
            if folder + name not in urls:
                raise _missing_file(url, name)
    return saved


def _matches(pattern: str, report: ReadReport) -> Iterator[SourceFile]:
    visited: set[str] = set()
    # Path.glob takes no absolute patterns.
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        path = Path(match)
        if not path.is_dir():
            yield from _listed_file(path, report)
        elif "**" not in pattern:
            # "**" matches what is inside the folders too, which must not be listed twice.
            yield from _walk(path, report, visited)


def kind_of(path: PurePath) -> Kind | None:
    """Tell the format of a file by its name.

    Args:
        path: The file; a suffix of compression is looked through.

    Returns:
        The format, or None if the name does not tell an accepted one.
    """
    name = PurePosixPath(path.name.lower())
    if name.suffix in _COMPRESSION_SUFFIXES:
        name = name.with_suffix("")
    return _KINDS.get(name.suffix)


def _source_file(path: Path, kind: Kind, num_bytes: int) -> SourceFile:
    real = Path(os.path.realpath(path.parent)) / path.name
    return SourceFile(str(path), str(real), kind, num_bytes)


def _named_file(path: Path) -> SourceFile:
    """A file that the user named: what cannot be read is an error, not something to pass over."""
    kind = kind_of(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"source {path} is not a regular file; write its text to a file first")
    if kind is None:
        raise _unknown_format(str(path))
    return _source_file(path, kind, status.st_size)


def _unknown_format(source: str) -> UserError:
    return UserError(
        f"source {source} is of no known format (the name's suffix tells it); accepted are "
        f"{ACCEPTED}"
    )


def _listed_file(path: Path, report: ReadReport) -> Iterator[SourceFile]:
    """A file that was found: foreign, hidden and special ones are noted and passed over."""
    kind = kind_of(path)
    if path.name in _DATASET_FILES:
        return
    if path.name.startswith(".") or kind is None:
        report.note(_IGNORED, str(path), detail="hidden" if path.name[0] == "." else "format")
        return
    try:
        status = path.stat()
    except OSError as error:
        report.note(_IGNORED, str(path), detail=error.strerror or "unreadable")
        return
    if stat.S_ISREG(status.st_mode):
        yield _source_file(path, kind, status.st_size)
    else:
        report.note(_IGNORED, str(path), detail="not a regular file")


def _walk(folder: Path, report: ReadReport, visited: set[str]) -> Iterator[SourceFile]:
    real = os.path.realpath(folder)
    if real in visited:
        # Links that lead back up would be followed for ever.
        return
    visited.add(real)
    if (folder / _DATASET_STATE).is_file():
        yield from _saved_dataset(folder)
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be listed: {error.strerror}; make it readable or name its "
            "files one by one"
        ) from error
    for entry in entries:
        if entry.is_dir():
            if entry.name.startswith("."):
                report.note(_IGNORED, str(entry), detail="hidden folder")
            else:
                yield from _walk(entry, report, visited)
        else:
            yield from _listed_file(entry, report)


def _saved_dataset(folder: Path) -> Iterator[SourceFile]:
    """The Arrow files of a folder that `datasets` wrote; stale cache files beside them are not."""
    state_file = folder / _DATASET_STATE
    try:
        data = state_file.read_bytes()
    except OSError as error:
        raise _not_a_state(str(state_file), error) from error
    for name in _names_in_state(data, str(state_file)):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise _missing_file(str(state_file), name)
        yield _source_file(path, "arrow", path.stat().st_size)


def _names_in_state(data: bytes, state_file: str) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in json.loads(data)["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_state(state_file, error) from error


def _not_a_state(state_file: str, error: Exception) -> UserError:
    return UserError(
        f"{state_file} is not the state of a folder written by datasets' save_to_disk "
        f"({type(error).__name__}: {error}); save the dataset again, or name its files"
    )


def _missing_file(state_file: str, name: str) -> UserError:
    return UserError(
        f"{state_file} names the file {name}, which is not in the folder; save the dataset again"
    )
