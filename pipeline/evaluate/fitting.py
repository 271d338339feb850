"""One fine-tuned model: its start, its seed, its training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluate.features import Feature
from pipeline.evaluate.heads import build_model
from pipeline.evaluate.kind import Kind
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.stepping import Strategy
from pipeline.evaluate.training import train


@dataclass(frozen=True)
class Head:
    """What is put on the encoder."""

    name: str
    """As in `Kind.head`."""
    num_outputs: int
    dropout: float | None = None
    """In front of its last layer; the model's own where None."""


@contextmanager
def fine_tuned(
    repository: Path,
    start: str,
    head: Head,
    kind: Kind,
    features: Sequence[Feature],
    plan: TrainingPlan,
    seed: int,
    strategy: Strategy,
) -> Iterator[Any]:
    """Build and train one model; the caller's random numbers are left alone.

    Args:
        repository: Folder with config.json and weights.
        start: "pretrained" or "random".
        head: What to put on the encoder.
        kind: The kind of task.
        features: Training examples.
        plan: How to train.
        seed: Of the new weights, the order of the batches, and dropout.
        strategy: Who takes part, and where.

    Yields:
        The trained model, to predict with inside.

    Raises:
        UserError: The repository cannot be loaded, or training diverged.
    """
    device = strategy.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = build_model(repository, start, head.name, head.num_outputs, head.dropout)
        model.to(device)
        stepper = strategy.start(model, kind, plan)
        # Drawn after the new weights, dropout would follow from how many there are; ranks differ.
        torch.manual_seed(seed + 1_000_003 * strategy.rank)
        try:
            train(stepper, features, plan, seed)
            yield stepper.model
        finally:
            stepper.close()
