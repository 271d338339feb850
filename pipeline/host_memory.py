"""How much memory this process may still take on its host: the machine's, or what its job has.

A batch system or a container limits memory by control groups. Each group above the process may have
a limit, and the tightest one counts. Pages of files do not: the kernel gives them back by itself.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_LIMIT_BYTES = 1 << 60
"""Control groups of version 1 write a number of this size where there is no limit."""
_FILE_PAGES = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def available_bytes() -> int:
    """Ask how much memory can still be taken on this host.

    Returns:
        Bytes: what the machine has, or what is left within the tightest limit above this process.
    """
    rooms = (
        room
        for group in _groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
        if (room := room_bytes(group)) is not None
    )
    return min([psutil.virtual_memory().available, *rooms])


def _groups(membership: Path, mounted: Path) -> Iterator[Path]:
    """All memory control groups that this process is in, its own and those above.

    In a container the names in `membership` may be the host's, of which the container sees none but
    the top: what does not exist is passed over by those who read.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mounted / "memory" if controllers else mounted
        path = Path(name.lstrip("/"))
        yield from (top / each for each in (path, *path.parents))


def room_bytes(group: Path) -> int | None:
    """Ask what is left within the limit of one control group.

    Args:
        group: Its folder, of version 1 or 2.

    Returns:
        Bytes; None where it has no limit, or is no such group.
    """
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (group / limit_name).read_text(encoding="ascii").strip()
            used = int((group / usage_name).read_text(encoding="ascii"))
            if limit == "max" or int(limit) >= _NO_LIMIT_BYTES:
                return None
            return max(0, int(limit) - used + _file_bytes(group))
        except (OSError, ValueError):
            continue
    return None


def _file_bytes(group: Path) -> int:
    """Pages of files in a group and below; version 1 writes its own pages and the total."""
    pages = dict(
        line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
    )
    names = _FILE_PAGES[2:] if _FILE_PAGES[2] in pages else _FILE_PAGES[:2]
    return sum(int(pages.get(name, 0)) for name in names)
