"""Looks at a folder: room, inodes, and whether what is written is read back, and how fast."""

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

from pipeline.preflight.finding import Finding

SAMPLE_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_MIN_ROOM_BYTES = 1 << 30
_MIN_INODES = 1000
_MIN_MB_PER_SECOND = 5.0
"""A checkpoint of the largest preset (8.6 GB) would take half an hour."""
_MAX_OFFSET_SECONDS = 5.0


def look_at_folder(node: str, name: str, folder: Path, sample_bytes: int = SAMPLE_BYTES) -> Finding:
    """Write, sync and read a file, which is removed again.

    Args:
        node: This node's name.
        name: What the folder is for: "run folder" or "scratch".
        folder: It, or the place where it will be made.
        sample_bytes: Size of the file.

    Returns:
        The finding.
    """
    check = f"{name} {folder}"
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        found = os.statvfs(place)
        room = found.f_bavail * found.f_frsize
        written, read = _rates(place, sample_bytes)
    except OSError as error:
        cure = "mount or repair it, or choose another folder"
        return Finding(node, check, False, f"{error.strerror or error}", cure)
    inodes = f"{found.f_favail:,} inodes" if found.f_files else "any number of files"
    seen = f"{room / 1e9:,.1f} GB and {inodes} free, writes {written:,.0f}, reads {read:,.0f} MB/s"
    if room < _MIN_ROOM_BYTES or (found.f_files and found.f_favail < _MIN_INODES):
        return Finding(node, check, False, seen, "make room, or choose another folder")
    if min(written, read) < _MIN_MB_PER_SECOND:
        return Finding(
            node, check, False, seen, "checkpoints would take hours: see who else uses it"
        )
    return Finding(node, check, True, seen)


def _rates(folder: Path, sample_bytes: int) -> tuple[float, float]:
    """Measure writing with fsync, and reading from the disk, in MB/s."""
    path = folder / f".deberta-doctor-{socket.gethostname()}-{secrets.token_hex(4)}"
    chunk = secrets.token_bytes(min(_CHUNK_BYTES, sample_bytes))
    rounds = max(1, sample_bytes // len(chunk))
    try:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(rounds):
                file.write(chunk)
            os.fsync(file.fileno())
        written = time.perf_counter() - began
        with path.open("rb", buffering=0) as file:
            # Or the page cache would answer instead of the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            for _ in range(rounds):
                if _read_fully(file.fileno(), len(chunk)) != chunk:
                    raise OSError(0, "other bytes are read back than were written")
        read = time.perf_counter() - began
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    megabytes = rounds * len(chunk) / 1e6
    return megabytes / written, megabytes / read


def _read_fully(descriptor: int, count: int) -> bytes:
    parts = []
    while count > 0 and (part := os.read(descriptor, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def look_at_clock(node: str, folder: Path) -> Finding:
    """Compare this node's clock with that of the file server, by the time of a new file.

    Args:
        node: This node's name.
        folder: The run folder, or the place where it will be made.

    Returns:
        The finding; on a local disk both clocks are the same.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    path = place / f".deberta-doctor-{socket.gethostname()}-{secrets.token_hex(4)}"
    try:
        path.touch()
        offset = time.time() - path.stat().st_mtime
    except OSError as error:
        return Finding(
            *(node, "clock", False, f"no file can be made in {place}: {error.strerror}"),
            "see the run folder's line",
        )
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return judge_clock(node, offset, f"the file system of {folder}")


def judge_clock(node: str, offset_seconds: float, other: str) -> Finding:
    """Say whether a clock is near enough to another.

    Args:
        node: Whose clock.
        offset_seconds: How far it is ahead.
        other: Of what.

    Returns:
        The finding.
    """
    text = f"{offset_seconds:+.2f} s against {other}"
    if abs(offset_seconds) <= _MAX_OFFSET_SECONDS:
        return Finding(node, "clock", True, text)
    return Finding(node, "clock", False, text, "start chronyd or ntpd there (chronyc makestep)")
