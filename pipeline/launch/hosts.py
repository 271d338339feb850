"""Hosts and how many ranks each takes."""

import re
from dataclasses import dataclass

from data_prep.errors import UserError

# Names go to ssh and to shells of other hosts.
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True)
class Host:
    """One host."""

    name: str
    slots: int
    """Ranks."""


def parse_hosts(text: str) -> list[Host]:
    """Read hosts from the command line.

    Args:
        text: Such as `n1:8,n2:8`; the first one is rank 0's.

    Returns:
        The hosts.

    Raises:
        UserError: It is not of that form, or a host comes twice.
    """
    hosts = []
    for part in text.split(","):
        name, _, slots = part.strip().rpartition(":")
        if not _HOST.fullmatch(name) or not slots.isdigit() or int(slots) < 1:
            raise UserError(
                f"--hosts {text}: {part.strip()!r} is not NAME:RANKS; write hosts as n1:8,n2:8, "
                "the names as ssh knows them"
            )
        hosts.append(Host(name, int(slots)))
    names = [host.name for host in hosts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--hosts {text}: {', '.join(twice)} comes twice; add up its ranks")
    return hosts


def hostfile(hosts: list[Host]) -> str:
    """Write hosts as DeepSpeed and Open MPI read them.

    Args:
        hosts: The hosts.

    Returns:
        The text of a hostfile.
    """
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
