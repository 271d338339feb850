"""Whether all ranks hold the same bits where they should: finds a flipped bit that no loss shows.

What is replicated, and so can be compared:

    stage 0       weights and Adam's averages; a flipped bit stays, and its rank drifts away
    stages 1, 2   weights; each step overwrites them with those of the ranks that own them
    stage 3       weights that DeepSpeed keeps gathered, small ones; each step overwrites them
    every stage   Adam's step and the loss scale

A flipped bit in a part that only one rank owns changes all ranks alike, and is not found here.

Each rank adds up the bits of every tensor on its device, weighted by position, and hashes the sums;
the ranks exchange the hashes and, only where they differ, the sums. Sums are modulo 2^64 and every
weight is odd, so that a single flipped bit, +-2^k times an odd number, always changes them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline import faults
from pipeline.engine import Engines
from pipeline.engine_state import inner_optimizer, scalar_state
from pipeline.rank_files import MOMENTS

_BLOCK_ELEMENTS = 1 << 20
_BLOCK_FACTOR = 6364136223846793005  # odd; of Knuth's MMIX generator
_BITS_OF_BYTES = {2: torch.int16, 4: torch.int32}
_SCALARS = "Adam's step and the loss scale"
_NAMED_TENSORS = 5


@dataclass(frozen=True)
class ReplicaFinding:
    """Tensors of one engine that not all ranks hold alike."""

    engine: str
    names: tuple[str, ...]
    """Of the tensors."""
    ranks: tuple[int, ...]
    """The minority; empty where no majority agrees, as never with two ranks."""
    world_size: int

    def explain(self) -> str:
        """Write it for people.

        Returns:
            What differs, on which rank, and what that means.
        """
        more = len(self.names) - _NAMED_TENSORS
        names = ", ".join(self.names[:_NAMED_TENSORS]) + (f" and {more} more" if more > 0 else "")
        if not self.ranks:
            who = f"the {self.world_size} ranks disagree, and no majority says which is wrong,"
        else:
            noun, verb = ("ranks", "differ") if len(self.ranks) > 1 else ("rank", "differs")
            numbers = ", ".join(map(str, self.ranks))
            who = f"{noun} {numbers} of {self.world_size} {verb} from the majority"
        return (
            f"{who} in what all should hold alike: {names} ({self.engine}): a flipped bit, or a "
            "faulty device. A rank that is named again belongs on another node"
        )


def differing_ranks(
    engines: Engines, step: int, group: dist.ProcessGroup | None
) -> list[ReplicaFinding]:
    """Compare what is replicated over all ranks; a collective, at a step boundary.

    Args:
        engines: The engines.
        step: Completed optimizer steps.
        group: Control group of all ranks, on the CPU; None for a single process.

    Returns:
        The same on every rank: one finding an engine that differs; none where all is well.
    """
    if group is None or group.size() == 1:
        return []
    faults.reach("replica", step)
    names: dict[str, list[str]] = {}
    sums: dict[str, torch.Tensor] = {}
    for engine_name, engine in engines.by_name.items():
        names[engine_name], sums[engine_name] = _checksums(engine, None if names else step)
    content = b"".join(vector.numpy().tobytes() for vector in sums.values())
    digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
    if len(set(_gather(digest, group))) == 1:
        return []
    of_ranks = {engine_name: _gather(vector, group) for engine_name, vector in sums.items()}
    return [
        ReplicaFinding(
            engine_name,
            tuple(
                name
                for index, name in enumerate(names[engine_name])
                if len({row[index] for row in rows}) > 1
            ),
            _minority(rows),
            len(rows),
        )
        for engine_name, rows in of_ranks.items()
        if len(set(rows)) > 1
    ]


def _gather(value: torch.Tensor, group: dist.ProcessGroup) -> list[tuple[int, ...]]:
    """Collect a vector of integers from every rank, on every rank."""
    rows = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(rows, value, group=group)
    return [tuple(row.tolist()) for row in rows]


def _minority(of_ranks: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Ranks that differ from more than half of all; none where there is no such half."""
    majority, count = Counter(of_ranks).most_common(1)[0]
    if 2 * count <= len(of_ranks):
        return ()
    return tuple(rank for rank, each in enumerate(of_ranks) if each != majority)


def _checksums(engine: Any, poisoned_step: int | None) -> tuple[list[str], torch.Tensor]:
    """Names and checksums, int64 on the CPU, of what all ranks hold alike of an engine.

    The first tensor passes the injection point of a step.
    """
    text = json.dumps(scalar_state(engine), sort_keys=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    names: list[str] = []
    sums: list[torch.Tensor] = []
    weights = torch.empty(0)
    for name, tensor in _replicated(engine):
        if poisoned_step is not None and not names:
            tensor = faults.poison("replica", poisoned_step, tensor)
        if weights.device != tensor.device or not len(weights):
            weights = 2 * torch.arange(_BLOCK_ELEMENTS, device=tensor.device) + 1
        names.append(name)
        sums.append(_checksum(tensor, weights))
    vector = torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.int64)
    return [*names, _SCALARS], torch.cat([vector, torch.tensor([number])])


def _replicated(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that every rank holds whole, with their names; the same ones on every rank."""
    averages = inner_optimizer(engine).state if engine.zero_optimization_stage() == 0 else {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_status") and parameter.ds_status.name != "AVAILABLE":
            continue
        yield name, parameter.detach()
        for kind in MOMENTS:
            if kind in averages.get(parameter, ()):
                yield f"{kind} of {name}", averages[parameter][kind]


def _checksum(tensor: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of a tensor's bits modulo 2^64, an int64 scalar on its device."""
    bits = tensor.reshape(-1).view(_BITS_OF_BYTES[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in bits.split(len(weights)):
        total = total * _BLOCK_FACTOR + (block.long() * weights[: len(block)]).sum()
    return total
