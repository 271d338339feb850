"""Looks at ranks that meet on this host: over gloo, and over NCCL where there are GPUs.

As a program (`python -m pipeline.preflight.small_worlds`) it is one of the ranks.
"""

import dataclasses
import json
import socket
import sys
from collections.abc import Mapping

from pipeline.preflight.children import Answer, Child, child_environment
from pipeline.preflight.finding import Finding

_TIMEOUT_SECONDS = 100.0
_LOOPBACK = "127.0.0.1"


def look_at_world(
    node: str, variables: Mapping[str, str], backend: str, world_size: int
) -> Finding:
    """Start ranks that add numbers up.

    Args:
        node: This node's name.
        variables: Of the process.
        backend: "gloo" or "nccl".
        world_size: How many; with NCCL no more than there are GPUs.

    Returns:
        The finding.
    """
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = str(probe.getsockname()[1])
    device = {"DS_ACCELERATOR": "cpu"} if backend == "gloo" else {}
    inherited = {name: value for name, value in variables.items() if name != "DS_ACCELERATOR"}
    ranks = [
        Child(
            [sys.executable, "-m", "pipeline.preflight.small_worlds", node],
            child_environment(
                inherited,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                MASTER_ADDR=_LOOPBACK,
                MASTER_PORT=port,
                OMP_NUM_THREADS="1",
                **device,
            ),
        )
        for rank in range(world_size)
    ]
    answers = [rank.wait(_TIMEOUT_SECONDS) for rank in ranks]
    found = [finding for answer in answers if (finding := _finding(answer)) is not None]
    wrong = [finding for finding in found if not finding.ok]
    check = f"world of {world_size}, {backend}"
    if wrong:
        return dataclasses.replace(wrong[0], check=check)
    silent = [answer for answer in answers if _finding(answer) is None]
    if silent:
        text = f"a rank has ended without a word: {silent[0].reason}"
        return Finding(node, check, False, text, "see the lines of packages and of GPUs")
    return dataclasses.replace(found[0], check=check)


def _finding(answer: Answer) -> Finding | None:
    """What a rank says of the network; None where it has said nothing."""
    for line in answer.output.splitlines():
        if line.startswith('{"node":'):
            return Finding(**json.loads(line))
    return None


def main() -> None:
    """Be one rank, and print what it finds about the network as a JSON object."""
    from pipeline.preflight.network import look_at_peers
    from pipeline.runtime import World, launcher_environment

    found = look_at_peers(sys.argv[1], World.from_environment(), launcher_environment())
    for finding in found:
        if finding.check == "network":  # clock and versions of one host are the same
            print(json.dumps(dataclasses.asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
