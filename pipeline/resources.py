"""Watches what a run can run out of, so that it can still commit and stop before that happens.

    host memory   on the first rank of every host: the machine's, or what the job was given
    GPU memory    on every rank: what was left at the highest point so far
    disk, inodes  on rank 0: of the file systems of the run folder and of its checkpoints, beside
                  what the next commit needs

`ResourceWatch.look` is called at every step boundary and reads every few seconds. What it returns
goes round with the requests to stop (`pipeline.stop_signal`), as one number, so that all ranks stop
in the same step and rank 0 can say why.

A limit is never more than half of what was there when the watch began: a run that always fits, if
only just, is not stopped for it.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch

from pipeline.config import SafetySection
from pipeline.host_memory import available_bytes
from pipeline.runtime import World

MIB = 1 << 20
GIB = 1 << 30
_RANK_BITS, _AMOUNT_BITS = 20, 38
_WARN_FACTOR = 2

logger = logging.getLogger(__name__)


class Kind(IntEnum):
    """What can run out; of several at once the highest is told."""

    HOST_MEMORY = 1
    GPU_MEMORY = 2
    DISK = 3
    INODES = 4


_TEXTS = {
    Kind.HOST_MEMORY: "{amount:,} MiB of memory are left on the host of rank {rank} "
    "(safety.min_host_memory_gib): ask for more memory a node, start fewer ranks on it, or look "
    "for what grows",
    Kind.GPU_MEMORY: "{amount:,} MiB of memory are left on the GPU of rank {rank} "
    "(safety.min_gpu_memory_gib): lower train_micro_batch_size_per_gpu, set "
    "model.activation_checkpointing, or look for what grows",
    Kind.DISK: "{amount:,} MiB are left on the disk of the run folder, what the next commit needs "
    "included (safety.min_free_disk_gib): make room, or lower checkpoint.keep_last",
    Kind.INODES: "{amount:,} more files fit on the disk of the run folder, those of the next "
    "commit included (safety.min_free_inodes): remove files there",
}


@dataclass(frozen=True)
class Shortage:
    """What is running out, and where."""

    kind: Kind
    rank: int
    amount: int
    """MiB, or files, that are left."""

    @property
    def reason(self) -> str:
        """What is running out, how much is left and what helps."""
        return _TEXTS[self.kind].format(amount=self.amount, rank=self.rank)

    def encode(self) -> int:
        """Write it as a number that ranks can compare.

        Returns:
            A positive number below 2^63.
        """
        amount = min(self.amount, (1 << _AMOUNT_BITS) - 1)
        rank = min(self.rank, (1 << _RANK_BITS) - 1)
        return (self.kind << _RANK_BITS | rank) << _AMOUNT_BITS | amount

    @classmethod
    def decode(cls, number: int) -> "Shortage":
        """Read what `encode` wrote.

        Args:
            number: The greatest that any rank has.

        Returns:
            The shortage.
        """
        amount = number & ((1 << _AMOUNT_BITS) - 1)
        rank = (number >> _AMOUNT_BITS) & ((1 << _RANK_BITS) - 1)
        return cls(Kind(number >> (_AMOUNT_BITS + _RANK_BITS)), rank, amount)


@dataclass(frozen=True)
class CommitNeeds:
    """What writing the next commit takes."""

    disk_bytes: int
    host_bytes: int
    """Of memory, for the copies of all ranks of this host."""
    num_files: int


@dataclass
class _Gauge:
    """One thing that can run out, with the least that was allowed and what was there at first."""

    kind: Kind
    unit: int
    """Bytes, or files, of one unit in messages."""
    allowed: float
    """What must stay free; 0 watches nothing."""
    needed: int
    """What must be free beside that, or there is no point in stopping."""
    read: Callable[[], int | None]
    """What is free now; None where that cannot be known."""
    first: int | None = None
    has_warned: bool = False

    def look(self, rank: int) -> Shortage | None:
        """Read once; warn, or say that it is time to stop."""
        free = self.read()
        if free is None or not self.allowed:
            return None
        if self.first is None:
            self.first = free
        shortage = Shortage(self.kind, rank, free // self.unit)
        spare = min(self.allowed, max(0.0, (self.first - self.needed) / 2))
        is_low = free < self.needed + _WARN_FACTOR * spare
        if is_low and not self.has_warned:
            logger.warning("%s", shortage.reason)
        self.has_warned = is_low
        if free >= self.needed + spare:
            return None
        # A run that cannot commit any more goes on: somebody may make room.
        return shortage if free >= self.needed else None


class ResourceWatch:
    """Looks now and then at what this rank is to watch."""

    def __init__(
        self,
        section: SafetySection,
        world: World,
        folder: Path,
        commit_needs: Callable[[], CommitNeeds],
    ) -> None:
        """Prepare; nothing is read before the first look.

        Args:
            section: [safety], for the limits.
            world: This process's place.
            folder: The run folder.
            commit_needs: Asked at the first look, behind the first step.
        """
        self._section = section
        self._world = world
        self._folder = folder
        self._commit_needs = commit_needs
        self._gauges: list[_Gauge] | None = None
        self._looked_seconds = -float("inf")

    def look(self) -> Shortage | None:
        """Read what is free, if it is time to.

        Returns:
            What is running out; None while nothing is.
        """
        now = time.monotonic()
        if now - self._looked_seconds < self._section.resource_interval_seconds:
            return None
        self._looked_seconds = now
        if self._gauges is None:
            self._gauges = self._all_gauges()
        found = [each for gauge in self._gauges if (each := gauge.look(self._world.rank))]
        return max(found, key=Shortage.encode, default=None)

    def _all_gauges(self) -> list[_Gauge]:
        """What this rank is to watch."""
        section, needs = self._section, self._commit_needs()
        gauges: list[_Gauge] = []
        if self._world.local_rank == 0 and section.min_host_memory_gib:
            allowed = section.min_host_memory_gib * GIB + needs.host_bytes
            gauges.append(_Gauge(Kind.HOST_MEMORY, MIB, allowed, 0, available_bytes))
        if self._world.device.type == "cuda":
            allowed = section.min_gpu_memory_gib * GIB
            gauges.append(_Gauge(Kind.GPU_MEMORY, MIB, allowed, 0, self._gpu_bytes))
        if self._world.is_main:
            gauges += self._disk_gauges(needs)
        return gauges

    def _disk_gauges(self, needs: CommitNeeds) -> list[_Gauge]:
        """Room and inodes of the run folder, and of the checkpoints where these lie elsewhere."""
        checkpoints = self._folder / "checkpoints"
        folders = {checkpoints: (needs.disk_bytes, needs.num_files)}
        if checkpoints.stat().st_dev != self._folder.stat().st_dev:
            folders[self._folder] = (0, 0)
        gauges: list[_Gauge] = []
        for folder, (num_bytes, num_files) in folders.items():
            allowed = self._section.min_free_disk_gib * GIB
            gauges.append(_Gauge(Kind.DISK, MIB, allowed, num_bytes, _free_bytes_of(folder)))
            allowed = self._section.min_free_inodes
            gauges.append(_Gauge(Kind.INODES, 1, allowed, num_files, _free_inodes_of(folder)))
        return gauges

    def _gpu_bytes(self) -> int:
        """What was left on the GPU at the highest point so far; the allocator keeps the rest."""
        device = self._world.device
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        highest = torch.cuda.max_memory_allocated(device)
        return free + reserved - highest


def _free_bytes_of(folder: Path) -> Callable[[], int | None]:
    return lambda: _statvfs(folder, lambda found: found.f_bavail * found.f_frsize)


def _free_inodes_of(folder: Path) -> Callable[[], int | None]:
    # File systems without a fixed number of inodes say that they have none at all.
    return lambda: _statvfs(folder, lambda found: found.f_favail if found.f_files else None)


def _statvfs(folder: Path, take: Callable[[os.statvfs_result], int | None]) -> int | None:
    try:
        return take(os.statvfs(folder))
    except OSError:  # a folder that is gone is told by the commit that needs it
        return None
