"""How optimizer steps are computed: alone by torch, or by all ranks of a world under DeepSpeed.

`AloneStrategy` is the one of a single process; `engine_stepping.DeepSpeedStrategy` is the other.
Both take the same batches with the same learning rates.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from pipeline.evaluate.features import Batch, Feature, collate
from pipeline.evaluate.kind import Kind
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.sift import Sift

T = TypeVar("T")

WEIGHT_DECAY = 0.01
"""Of matrices, as DeBERTa's authors fine-tune."""
_CLIP_NORM = 1.0


class Stepper(Protocol):
    """A model at training."""

    model: Any
    """What the kinds call."""

    def step(self, chosen: Sequence[Feature], factor: float) -> float:
        """Take one optimizer step.

        Args:
            chosen: The batch of all ranks.
            factor: Of the peak learning rate.

        Returns:
            The loss; where it is not finite, the weights are as before.
        """
        ...

    def close(self) -> None:
        """Give back what the training alone needed."""
        ...


class Strategy(Protocol):
    """Who takes part in a training."""

    rank: int
    world_size: int
    device: torch.device

    def start(self, model: nn.Module, kind: Kind, plan: TrainingPlan) -> Stepper:
        """Make a model ready for training."""
        ...

    def agree(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 and give its result, or its UserError, to all."""
        ...

    def exchange(self, value: T) -> list[T]:
        """Give the values of all ranks to all."""
        ...


class AloneStrategy:
    """One process.

    Args:
        device: Where to compute.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device):
        self.device = device

    def start(self, model: nn.Module, kind: Kind, plan: TrainingPlan) -> Stepper:
        """Make a model ready for training."""
        return _AloneStepper(model, kind, plan, self.device)

    def agree(self, action: Callable[[], T]) -> T:
        """Do it."""
        return action()

    def exchange(self, value: T) -> list[T]:
        """Give the value."""
        return [value]


def batch_loss(kind: Kind, model: Any, batch: Batch, sift: Sift | None) -> torch.Tensor:
    """Compute the loss of one batch, that of SiFT included.

    Args:
        kind: The kind of task.
        model: Of the kind.
        batch: On the model's device.
        sift: Adversarial perturbation, entered; None for none.

    Returns:
        A scalar.
    """
    logits = kind.logits(model, batch)
    loss = kind.loss(logits, batch)
    return loss if sift is None else loss + sift.loss(kind, batch, logits)


def autocast(is_on: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in bf16 where that is asked for and torch holds it safe.

    Args:
        is_on: Whether it is.
        device: Where.

    Returns:
        What to enter around forward passes.
    """
    return torch.autocast(device.type, torch.bfloat16) if is_on else nullcontext()


class _AloneStepper:
    """torch's AdamW, gradients clipped at norm 1."""

    def __init__(self, model: nn.Module, kind: Kind, plan: TrainingPlan, device: torch.device):
        self.model: Any = model
        self._kind, self._plan, self._device = kind, plan, device
        self._optimizer = torch.optim.AdamW(_parameter_groups(model), lr=plan.learning_rate)
        self._sift = Sift(model, plan.sift).attach() if plan.sift else None

    def step(self, chosen: Sequence[Feature], factor: float) -> float:
        """Take one optimizer step."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.learning_rate * factor
        batch = collate(chosen, self._device, self._kind.label_dtype)
        with autocast(self._plan.bf16, self._device):
            loss = batch_loss(self._kind, self.model, batch, self._sift)
        if not torch.isfinite(loss):
            return loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def close(self) -> None:
        """Remove the perturbation."""
        if self._sift is not None:
            self._sift.detach()


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay matrices, but no bias and no LayerNorm weight."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
