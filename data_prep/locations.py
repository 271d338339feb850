"""Where the bytes of a source lie: a path of this machine, or a URL of any file system of fsspec.

- `is_remote`: whether a name is a URL ("s3://...", "gs://...", "https://...", "hf://datasets/...").
- `open_file`, `file_size`: a file as its bytes, wherever it lies.
- `list_remote`: the files that a remote source means.

A remote file is read as a stream of ranges and never copied to the disk. A read that fails is tried
again from where it stopped; what fails for good is an `OSError` with one line, like that of a disk.
fsspec is imported where it is needed: it costs a tenth of a second that local sources need not pay.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    retry,
    retry_if_not_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from data_prep.errors import UserError

BUFFER_BYTES = 1 << 20
READ_ATTEMPTS = 5
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB = "hf://datasets/"
_HOPELESS = (FileNotFoundError, PermissionError, ImportError, ValueError)
"""What no second attempt will change."""

Result = TypeVar("Result")


def is_remote(name: str) -> bool:
    """Tell whether a source or file is a URL.

    Args:
        name: As the user wrote it.

    Returns:
        Whether it begins with a scheme and "://"; "C:\\\\corpus" does not.
    """
    return _URL.match(name) is not None


def open_file(path: str) -> io.BufferedReader:
    """Open a file as the bytes that it holds.

    Args:
        path: A path or a URL.

    Returns:
        A buffered stream that can seek.

    Raises:
        OSError: The file cannot be opened.
    """
    if is_remote(path):
        return io.BufferedReader(_RemoteFile(path), BUFFER_BYTES)
    return io.BufferedReader(Path(path).open("rb", buffering=0), BUFFER_BYTES)


def file_size(path: str) -> int:
    """Size of a file, in bytes.

    Args:
        path: A path or a URL.

    Returns:
        The size.

    Raises:
        OSError: The file cannot be found, or the server does not tell its size.
    """
    if not is_remote(path):
        return Path(path).stat().st_size
    with _as_os_errors():
        size = _patiently(lambda: _file_system(path)[0].info(_file_system(path)[1]).get("size"))
    if size is None:
        raise OSError("the server does not tell its size; download the file first")
    return int(size)


def list_remote(source: str) -> list[str]:
    """List the files that a remote source means.

    Args:
        source: The URL of a file or a folder, or a URL with "*" or "**".

    Returns:
        URLs, sorted; hidden files are left out.

    Raises:
        UserError: The source is missing or cannot be reached, or its file system is not installed.
    """
    if "::" in source:
        raise UserError(
            f"source {source} chains file systems (::), which is not read; unpack it first"
        )
    try:
        with _as_os_errors():
            system, root = _file_system(source)
            names = _patiently(lambda: _find(system, root))
            urls = [system.unstrip_protocol(name) for name in names]
    except OSError as error:
        raise UserError(f"source {source} cannot be read: {error}; {_cure(source)}") from error
    if not urls:
        raise UserError(f"source {source} does not exist or holds no file; {_cure(source)}")
    return sorted(urls)


def _find(system: Any, root: str) -> list[str]:
    if any(mark in root for mark in "*?["):
        names = [name for name in system.glob(root) if system.isfile(name)]
    elif system.isfile(root):
        return [root]
    else:
        names = list(system.find(root))
    base = root.split("*", 1)[0].rpartition("/")[0]
    return [name for name in names if "/." not in name.removeprefix(base)]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.url_to_fs(url)
    return system, path


def _cure(source: str) -> str:
    if source.startswith(_HUB):
        name = "/".join(source.removeprefix(_HUB).split("/")[:2])
        return (
            f"check its name and the network; without a network, fetch it where there is one with "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER` and name the folder"
        )
    return "check its name, the network and the credentials, or copy its files to this machine"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Each file system of fsspec raises errors of its own; outside they are one kind."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        if isinstance(error, ValueError) and "range requests" in lines[0]:
            raise OSError(
                "the server gives files only as a whole, so that a large one cannot be cut into "
                "units; download it, or build with --unit-bytes above its size"
            ) from error
        raise OSError(f"{type(error).__name__}: {lines[0][:200]}") from error


def _patiently(action: Callable[[], Result], before: Callable[[], None] | None = None) -> Result:
    """Try what a network may refuse once and grant a second later.

    Args:
        action: what to do.
        before: called before each attempt but the first.
    """

    def prepare(state: RetryCallState) -> None:
        if before is not None and state.attempt_number > 1:
            before()

    return retry(
        retry=retry_if_not_exception_type(_HOPELESS),
        stop=stop_after_attempt(READ_ATTEMPTS),
        wait=wait_exponential(multiplier=0.2, max=5),
        before=prepare,
        reraise=True,
    )(action)()


class _RemoteFile(io.RawIOBase):
    """A file of fsspec as a raw stream that survives a lost connection.

    Args:
        url: the file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._file: Any = None
        with _as_os_errors():
            _patiently(self._open)

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
        system, path = _file_system(self._url)
        self._file = system.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with _as_os_errors():
            self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        with _as_os_errors():
            data = _patiently(lambda: self._read(len(buffer)), self._open)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        if self._file.tell() != self._position:
            self._file.seek(self._position)
        return self._file.read(count)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
