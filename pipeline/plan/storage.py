"""Bytes on disk: checkpoints with what retention keeps, and the dataset.

A commit holds fp32 weights and both of Adam's averages of every parameter once, whatever the ranks,
the ZeRO stage and the precision are; beside them are a header a file and some small JSON files.
"""

from dataclasses import dataclass
from pathlib import Path

from data_prep.manifest import Manifest
from pipeline.config import RunConfig
from pipeline.phases import TrainSchedule
from pipeline.plan.parameters import EngineParameters
from pipeline.plan.sharding import FP32_BYTES, STATE_KINDS

TOKEN_BYTES = 4
"""A token in a shard: uint32."""
_HEADER_BYTES_A_SLICE = 130  # name, kind, type, shape, offsets in a safetensors header
TEXT_BYTES = 1 << 16
"""Assumed: manifest, configuration and the trainer's state."""


@dataclass(frozen=True)
class Storage:
    """What a run needs of disks."""

    commit_bytes: int
    kept_commits: int
    """At the end of the run: the newest, the milestones, and one that is being written."""
    milestones: int
    train_tokens: int
    """Tokens that the run trains on, padding and repeats included."""
    dataset_tokens: int | None
    """Tokens of the training split; None without a dataset."""

    @property
    def disk_bytes(self) -> int:
        """Of all commits that are kept at once."""
        return self.commit_bytes * self.kept_commits

    @property
    def data_bytes(self) -> int:
        """Of the dataset, or of one in which every token is trained on once."""
        tokens = self.train_tokens if self.dataset_tokens is None else self.dataset_tokens
        return TOKEN_BYTES * tokens

    @property
    def epochs(self) -> float | None:
        """Passes over the dataset; None without one."""
        return self.train_tokens / self.dataset_tokens if self.dataset_tokens else None


def plan_storage(
    config: RunConfig,
    engines: dict[str, EngineParameters],
    schedule: TrainSchedule,
    world_size: int,
) -> Storage:
    """Count checkpoints and data.

    Args:
        config: The run; data.path may name a dataset.
        engines: From `engine_parameters`.
        schedule: The run's phases.
        world_size: Ranks, each of which writes a file a network.

    Returns:
        Bytes and tokens.

    Raises:
        UserError: data.path names no finished dataset.
    """
    checkpoint, last = config.checkpoint, config.schedule.max_steps
    slices = STATE_KINDS * sum(len(engine.ordered) for engine in engines.values())
    values = STATE_KINDS * FP32_BYTES * sum(engine.elements for engine in engines.values())
    # A parameter is in one rank's file, or in those of two neighbours.
    header = _HEADER_BYTES_A_SLICE * (slices + STATE_KINDS * world_size * len(engines))
    every = checkpoint.milestone_interval_steps
    commits = -(-last // checkpoint.interval_steps)
    newest = min(checkpoint.keep_last, commits)
    oldest_kept = last - (newest - 1) * checkpoint.interval_steps
    milestones = max(0, (oldest_kept - 1) // every) if every else 0
    dataset = None
    if config.data.path:
        dataset = Manifest.load(Path(config.data.path))[0].num_tokens("train")
    return Storage(
        commit_bytes=values + header + TEXT_BYTES,
        kept_commits=newest + milestones + 1,
        milestones=milestones,
        train_tokens=schedule.tokens_before(last),
        dataset_tokens=dataset,
    )
