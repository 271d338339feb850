"""Slow ranks: everybody waits for the slowest, so each rank's own work is compared with its peers'.

A rank that computes much longer than the others (a hot or throttled device, a neighbour on its
host) is named on rank 0; the run goes on. Only work that waits for nobody may be measured, such as
forward passes.
"""

import logging
import socket
import statistics

import torch
import torch.distributed as dist

from pipeline.config import SafetySection
from pipeline.runtime import World

logger = logging.getLogger(__name__)


class Stragglers:
    """Compares the ranks' own seconds a step, every `straggler_steps` steps."""

    def __init__(
        self, section: SafetySection, world: World, group: dist.ProcessGroup | None
    ) -> None:
        """Learn where the ranks are; a collective.

        Args:
            section: [safety]: factor and steps.
            world: This process's place.
            group: Control group of all ranks, on the CPU; None for a single process.
        """
        self._section = section
        self._world = world
        self._group = group if world.world_size > 1 else None
        self._hosts: list[str] = [socket.gethostname()] * world.world_size
        if self._group is not None:
            dist.all_gather_object(self._hosts, socket.gethostname(), group=self._group)
        self._sum_seconds = 0.0
        self._steps = 0
        self._is_first_step = True

    def add(self, seconds: float, step: int) -> float | None:
        """Count a step; a collective each `straggler_steps` steps, on all ranks alike.

        Args:
            seconds: Time that this rank computed in the step, without waiting for others.
            step: Completed optimizer steps, for the message.

        Returns:
            Slowest rank's seconds over the median of its peers' where ranks were compared now;
            None otherwise, and in a world of one.
        """
        if self._is_first_step:  # compiles and warms up, on some ranks more than on others
            self._is_first_step = False
            return None
        self._sum_seconds += seconds
        self._steps += 1
        if self._steps < self._section.straggler_steps or self._group is None:
            return None
        mine = torch.tensor([self._sum_seconds / self._steps], dtype=torch.float64)
        self._sum_seconds, self._steps = 0.0, 0
        everyone = [torch.zeros_like(mine) for _ in range(self._world.world_size)]
        dist.all_gather(everyone, mine, group=self._group)
        return self._compare([float(each) for each in everyone], step)

    def _compare(self, mean_seconds: list[float], step: int) -> float:
        ratios = ratios_to_peers(mean_seconds)
        for rank, ratio in enumerate(ratios):
            if ratio >= self._section.straggler_factor and self._world.is_main:
                logger.warning(
                    "step %d: rank %d (host %s) computes %.2f times as long as the other ranks: "
                    "%.4f s a step, they %.4f s, mean of %d steps",
                    step,
                    rank,
                    self._hosts[rank],
                    ratio,
                    mean_seconds[rank],
                    mean_seconds[rank] / ratio,
                    self._section.straggler_steps,
                )
        return max(ratios)


def ratios_to_peers(seconds: list[float]) -> list[float]:
    """Compare each rank with the median of the others, which in a world of two is the other one.

    Args:
        seconds: By rank; at least two.

    Returns:
        By rank: its time over the median of all others' times.
    """
    ratios = []
    for rank, mine in enumerate(seconds):
        others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
        ratios.append(mine / max(others, 1e-9))
    return ratios
