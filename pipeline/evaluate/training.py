"""The training loop that all fine-tuning shares, and prediction.

AdamW, linear warm-up and decay, gradients clipped at norm 1, as DeBERTa's authors fine-tune. The
batches are a function of the seed alone; nothing is looked at but the training examples.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.errors import UserError
from pipeline.evaluate.features import Batch, Feature, batches
from pipeline.evaluate.kind import Kind
from pipeline.evaluate.sift import Sift, SiftOptions

_WARMUP_SHARE = 0.1
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    """How to fine-tune one model."""

    epochs: int
    """Passes over the training examples."""
    learning_rate: float
    """Peak."""
    batch_size: int
    """Examples in a step."""
    warmup_steps: int | None = None
    """At most a tenth of all steps; a tenth where None."""
    bf16: bool = False
    """Whether to compute in bf16 where torch's autocast holds that safe; weights stay fp32."""
    sift: SiftOptions | None = None
    """Adversarial perturbation of the embeddings, if any."""


def num_warmup_steps(plan: TrainingPlan, num_steps: int) -> int:
    """Bound the warm-up for a small training set.

    Args:
        plan: Asks for a number.
        num_steps: Steps of the training.

    Returns:
        Steps of warm-up, at least 1.
    """
    share = max(1, round(_WARMUP_SHARE * num_steps))
    return share if plan.warmup_steps is None else max(1, min(plan.warmup_steps, share))


def train(
    model: Any,
    kind: Kind,
    features: Sequence[Feature],
    plan: TrainingPlan,
    seed: int,
    device: torch.device,
) -> None:
    """Train a model in place.

    Args:
        model: Of the kind, fp32, on the device.
        kind: The kind of task.
        features: Training examples.
        plan: How to train.
        seed: Of the order of the batches.
        device: Where the model is.

    Raises:
        UserError: The loss became infinite or no number.
    """
    with Sift(model, plan.sift) if plan.sift else nullcontext() as sift:
        _steps(model, kind, features, plan, seed, device, sift)


def _steps(
    model: Any,
    kind: Kind,
    features: Sequence[Feature],
    plan: TrainingPlan,
    seed: int,
    device: torch.device,
    sift: Sift | None,
) -> None:
    """Take all optimizer steps."""
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=plan.learning_rate)
    num_steps = plan.epochs * math.ceil(len(features) / plan.batch_size)
    warmup = num_warmup_steps(plan, num_steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for _ in range(plan.epochs):
        shuffled = torch.randperm(len(features), generator=order).tolist()
        epoch = [features[i] for i in shuffled]
        for batch in batches(epoch, plan.batch_size, device, kind.label_dtype):
            factor = min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * factor
            loss = _loss(model, kind, batch, plan, sift)
            if not torch.isfinite(loss):
                raise UserError(
                    f"fine-tuning diverged in step {step + 1}: give a lower --learning-rate than "
                    f"{plan.learning_rate:.2g}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def _loss(
    model: Any, kind: Kind, batch: Batch, plan: TrainingPlan, sift: Sift | None
) -> torch.Tensor:
    """Compute the loss of one batch."""
    with _autocast(plan.bf16, batch.mask.device):
        logits = kind.logits(model, batch)
        loss = kind.loss(logits, batch)
        return loss if sift is None else loss + sift.loss(kind, batch, logits)


def _autocast(is_on: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in bf16 where that is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


def _parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Decay matrices, but no bias and no LayerNorm weight."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def outputs(
    model: Any,
    kind: Kind,
    features: Sequence[Feature],
    batch_size: int,
    device: torch.device,
    *,
    bf16: bool = False,
) -> list[np.ndarray]:
    """Compute the outputs of a model for every feature.

    Args:
        model: Of the kind, on the device.
        kind: The kind of task.
        features: Inputs.
        batch_size: Inputs in a pass.
        device: Where the model is.
        bf16: Whether to compute in bf16.

    Returns:
        fp32 logits of each feature, in order; those of a sequence may be padded.
    """
    model.eval()
    # Neighbours of one length waste no padding.
    lengths = [max(len(ids) for ids in feature.sequences) for feature in features]
    order = sorted(range(len(features)), key=lengths.__getitem__)
    found: list[np.ndarray] = [np.empty(0)] * len(features)
    sorted_features = [features[i] for i in order]
    place = 0
    for batch in batches(sorted_features, batch_size, device, kind.label_dtype):
        with _autocast(bf16, device):
            logits = kind.logits(model, batch)
        for row in logits.float().cpu().numpy():
            found[order[place]] = row
            place += 1
    return found
