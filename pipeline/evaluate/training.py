"""The training loop that all fine-tuning shares, and prediction.

AdamW, linear warm-up and decay, as DeBERTa's authors fine-tune. The batches are a function of the
seed alone; nothing is looked at but the training examples.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_prep.errors import UserError
from pipeline.evaluate.features import Feature, collate
from pipeline.evaluate.kind import Kind
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.stepping import Stepper, Strategy, autocast


def train(stepper: Stepper, features: Sequence[Feature], plan: TrainingPlan, seed: int) -> None:
    """Train a model in place.

    Args:
        stepper: The model, ready for training.
        features: Training examples.
        plan: How to train.
        seed: Of the order of the batches.

    Raises:
        UserError: The loss became infinite or no number.
    """
    num_steps = plan.epochs * math.ceil(len(features) / plan.batch_size)
    warmup = plan.num_warmup_steps(num_steps)
    order = torch.Generator().manual_seed(seed)
    stepper.model.train()
    step = 0
    for _ in range(plan.epochs):
        shuffled = torch.randperm(len(features), generator=order).tolist()
        for first in range(0, len(features), plan.batch_size):
            chosen = [features[i] for i in shuffled[first : first + plan.batch_size]]
            factor = min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
            if not math.isfinite(stepper.step(chosen, factor)):
                raise UserError(
                    f"fine-tuning diverged in step {step + 1}: give a lower --learning-rate than "
                    f"{plan.learning_rate:.2g}"
                )
            step += 1


@torch.no_grad()
def outputs(
    model: Any,
    kind: Kind,
    features: Sequence[Feature],
    batch_size: int,
    strategy: Strategy,
    *,
    bf16: bool = False,
) -> list[np.ndarray]:
    """Compute the outputs of a model for every feature; a collective of all ranks.

    Args:
        model: Of the kind, on the device.
        kind: The kind of task.
        features: Inputs.
        batch_size: Inputs in a pass of one rank.
        strategy: Who takes part.
        bf16: Whether to compute in bf16.

    Returns:
        fp32 logits of each feature, in order; those of a sequence may be padded.
    """
    model.eval()
    # Neighbours of one length waste no padding.
    lengths = [max(len(ids) for ids in feature.sequences) for feature in features]
    order = sorted(range(len(features)), key=lengths.__getitem__)
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: dict[int, np.ndarray] = {}
    # Every rank makes as many passes: ZeRO-3 gathers weights in each.
    for turn in range(math.ceil(len(groups) / strategy.world_size)):
        group = groups[min(turn * strategy.world_size + strategy.rank, len(groups) - 1)]
        batch = collate([features[i] for i in group], strategy.device, kind.label_dtype)
        with autocast(bf16, strategy.device):
            logits = kind.logits(model, batch)
        found |= zip(group, logits.float().cpu().numpy(), strict=True)
    everywhere: dict[int, np.ndarray] = {}
    for part in strategy.exchange(found):
        everywhere |= part
    return [everywhere[i] for i in range(len(features))]
