"""One start of a run: what the command line, the launcher and the run folder have given it."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pipeline import faults
from pipeline.config import RunConfig
from pipeline.ds_config import BatchPlan, DeepSpeedConfig
from pipeline.resume import ACCEPTS_NOTHING, Accepts
from pipeline.run_data import RunData, summarize_dataset
from pipeline.run_folder import RunFolder
from pipeline.runtime import World, environment
from pipeline.stop_signal import StopSignal
from pipeline.watchdog import Watchdog


class StopRequested(Exception):
    """Somebody asked to stop before the first step; the same on all ranks."""


@dataclass(frozen=True)
class Session:
    """One start of a run."""

    config: RunConfig
    ds: DeepSpeedConfig
    plan: BatchPlan
    world: World
    control_group: dist.ProcessGroup
    folder: RunFolder
    stop: StopSignal
    watchdog: Watchdog
    accepts: Accepts = ACCEPTS_NOTHING
    writer_group: dist.ProcessGroup | None = None
    """Of all ranks, for commits that are written beside training."""

    def begin(self, stage: str) -> None:
        """Begin a stage of the start-up; a collective.

        Args:
            stage: A point of `pipeline.faults`, such as start.data.

        Raises:
            StopRequested: A rank was asked to stop.
        """
        step = self.folder.committed_step()
        self.watchdog.mark(stage, step)
        faults.reach(stage, step)
        if self.stop.agreed():
            raise StopRequested

    def identity(self, data: RunData) -> dict[str, Any]:
        """Collect what a resume compares.

        Args:
            data: The open dataset.

        Returns:
            JSON-ready values.
        """
        return {
            "dataset_fingerprint": data.dataset.fingerprint,
            "dataset": summarize_dataset(data.dataset.manifest),
            "tokenizer_fingerprint": data.tokenizer.fingerprint,
            "world_size": self.world.world_size,
            "environment": environment(),
        }
