"""A comparison before anything is trained: its runs, their commands and what they cost.

OUTPUT/compare.json                     what the folder belongs to
OUTPUT/runs/NAME-seed-K/                run folders
OUTPUT/logs/NAME-seed-K.log             what the runs printed
OUTPUT/finetuned/NAME-seed-K-TASK.json  scores
OUTPUT/comparison.{json,md,png}         the result
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import Dataset
from pipeline.compare.matching import Cost, Match
from pipeline.compare.systems import System
from pipeline.ds_config import BatchPlan, DeepSpeedConfig

MARKER = "compare.json"


@dataclass(frozen=True)
class CompareOptions:
    """What to compare."""

    systems: tuple[str, ...]
    """Presets or files."""
    deepspeed_config: Path
    dataset: Path
    output: Path
    match: Match = "flops"
    budget: float | None = None
    """FLOPs, steps or tokens of a run; what the first system's own schedule spends where None."""
    seeds: int = 3
    """Runs of each system: run.seed of the first and the numbers after it."""
    words: tuple[str, ...] = ()
    """`section.key=value` words for all systems."""


@dataclass(frozen=True)
class Run:
    """One training of one system."""

    system: System
    seed: int
    folder: Path
    log: Path
    words: tuple[str, ...]
    """What follows the system's source on the command line."""

    @property
    def name(self) -> str:
        """The run folder's name: system and seed."""
        return self.folder.name


@dataclass(frozen=True)
class Plan:
    """A comparison that can begin."""

    systems: tuple[System, ...]
    """Scaled to the budget."""
    costs: tuple[Cost, ...]
    """Of one run, by system."""
    seeds: tuple[int, ...]
    match: Match
    budget: float
    dataset: Dataset
    deepspeed: DeepSpeedConfig
    batch: BatchPlan
    """Every run is one process."""
    output: Path
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an interrupted comparison has whole replicates."""
        return [self._run(system, seed) for seed in self.seeds for system in self.systems]

    @property
    def total_flops(self) -> float:
        """FLOPs of all runs."""
        return len(self.seeds) * sum(cost.flops for cost in self.costs)

    def runs_of(self, system: System) -> list[Run]:
        """List a system's runs.

        Args:
            system: One of `systems`.

        Returns:
            One run a seed.
        """
        return [run for run in self.runs if run.system is system]

    def command(self, run: Run) -> list[str]:
        """Write the command that trains or resumes a run.

        Args:
            run: One of `runs`.

        Returns:
            Its words, for this interpreter.
        """
        return [
            *(sys.executable, "-m", "pipeline.train", "--config", run.system.source),
            *("--deepspeed_config", self.deepspeed.path, *run.words),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            What would be trained, and what it costs.
        """
        return {
            "match": self.match,
            "budget": self.budget,
            "seeds": self.seeds,
            "systems": [
                {"name": system.name, "words": system.words, **vars(cost)}
                for system, cost in zip(self.systems, self.costs, strict=True)
            ],
            "runs": len(self.runs),
            "total_flops": self.total_flops,
            "notes": self.notes,
        }

    def _run(self, system: System, seed: int) -> Run:
        name = f"{system.name}-seed-{seed}"
        folder = self.output / "runs" / name
        paths = (f"data.path={self.dataset.folder}", f"run.folder={folder}", f"run.seed={seed}")
        words = (*without_keys(system.words, ("run.seed",)), *paths)
        return Run(system, seed, folder, self.output / "logs" / f"{name}.log", words)


def marker_text(plan: Plan) -> str:
    """Write what the output folder belongs to.

    Args:
        plan: The plan.

    Returns:
        Content of OUTPUT/compare.json.
    """
    value = {"made_by": "deberta compare", "dataset_fingerprint": plan.dataset.fingerprint}
    return json.dumps(value, indent=2) + "\n"


def without_keys(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Leave out the `section.key=value` words of some keys.

    Args:
        words: Words.
        keys: Dotted names.

    Returns:
        The others.
    """
    return [word for word in words if word.partition("=")[0] not in keys]
