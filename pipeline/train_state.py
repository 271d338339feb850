"""What the training loop carries from step to step, and whom it calls."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from pipeline.checkpoint import CheckpointStore
from pipeline.engine_stepping import StepOutcome
from pipeline.metrics_writer import MetricsWriter
from pipeline.progress import ProgressDisplay
from pipeline.resources import ResourceWatch
from pipeline.run_folder import RunFolder
from pipeline.stop_signal import StopSignal
from pipeline.stragglers import Stragglers
from pipeline.watchdog import Watchdog


@dataclass
class TrainState:
    """What a commit stores beside the networks; plain values, equal on all ranks."""

    step: int = 0
    """Completed optimizer steps."""
    skipped: dict[str, int] = field(default_factory=dict)
    """By engine: steps refused because a gradient was not finite."""
    consecutive_skipped: int = 0
    """Steps in a row in which some engine refused."""
    owes_evaluation: bool = False
    """A request to stop came before this step's evaluation was done; a resumed run does it."""
    starting_figures: dict[str, float] = field(default_factory=dict)
    """Continued pre-training: the held-out figures of the model that it began with."""

    def count(self, outcomes: dict[str, StepOutcome]) -> None:
        """Record what the optimizers did.

        Args:
            outcomes: By engine.
        """
        self.step += 1
        for name, outcome in outcomes.items():
            self.skipped[name] = self.skipped.get(name, 0) + (not outcome.applied)
        applied = all(outcome.applied for outcome in outcomes.values())
        self.consecutive_skipped = 0 if applied else self.consecutive_skipped + 1


@dataclass
class Services:
    """What the loop calls besides the step."""

    control_group: dist.ProcessGroup | None
    """All ranks, on the CPU; None for a single process."""
    checkpoints: CheckpointStore
    stop: StopSignal
    evaluate: Callable[[Callable[[], bool]], dict[str, float] | None]
    """Held-out figures; asks its argument before every batch whether to give up."""
    folder: RunFolder
    watchdog: Watchdog
    """Told of every sign of progress."""
    stragglers: Stragglers
    resources: ResourceWatch
    metrics: MetricsWriter | None
    """On rank 0 only."""
    progress: ProgressDisplay | None
    """On rank 0 only."""
