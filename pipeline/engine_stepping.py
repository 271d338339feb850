"""One optimizer step of a DeepSpeed engine: backward passes, learning rates, the update.

    for each micro batch:   backward(engine, loss, is_last=...)
    set_learning_rates(engine, optimizer, factor)
    outcome = step_engine(engine)

The number of micro steps may differ from step to step, as in phases with smaller batches. DeepSpeed
0.19.8 counts micro steps modulo the JSON's gradient_accumulation_steps to know when an update is
due; here every backward pass says so itself (`set_gradient_accumulation_boundary`), which its
optimizers of all stages, of bf16, fp16 and in CPU memory follow: they reset their sums at the
update and nowhere else. `engine.backward` still divides by the JSON's constant, whatever the number
of micro steps is, so a loss is always

    local sum x world size x the plan's gradient_accumulation_steps / global count
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.config import OptimizerSection
from pipeline.engine_state import inner_optimizer
from pipeline.optimizer import FiniteGuardAdamW


def backward(engine: Any, loss: torch.Tensor, *, is_last: bool) -> None:
    """Add a micro batch's gradient to those of its step.

    Args:
        engine: A DeepSpeed engine.
        loss: 0-dimensional, scaled as above.
        is_last: Whether `step_engine` follows; gradients are summed over the ranks here at the
            latest.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss)
    if not is_last:
        engine.step()  # updates nothing: it ends the micro step in DeepSpeed's timers and counters


def set_learning_rates(engine: Any, optimizer: OptimizerSection, factor: float) -> None:
    """Write the learning rates of the next step.

    Args:
        engine: A DeepSpeed engine; every parameter group names its `network`.
        optimizer: Peak rates.
        factor: Of the schedule at this step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = optimizer.learning_rate(group["network"]) * factor


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step of one network did; the same on all ranks."""

    applied: bool
    """False where a non-finite gradient kept the weights as they were."""
    grad_norm: float
    """Global norm before clipping."""


def step_engine(engine: Any) -> StepOutcome:
    """Take the optimizer step behind the last micro step's backward pass.

    Args:
        engine: A DeepSpeed engine whose newest `backward` was the last of its step.

    Returns:
        Whether the step was applied, and the gradient norm.
    """
    if engine.zero_optimization_stage() == 0:
        norm = float(_replicated_grad_norm(engine.module))
        engine.step()
        guard = inner_optimizer(engine)
        assert isinstance(guard, FiniteGuardAdamW)
        return StepOutcome(not guard.last_step_skipped, norm)
    if engine.fp16_enabled():
        _step_with_one_loss_scale(engine)
    else:
        engine.step()
    norm = engine.get_global_grad_norm()
    applied = bool(engine.was_step_applied())
    if not applied and engine.zero_optimization_stage() < 3:
        _forget_refused_gradients(engine.optimizer)
    return StepOutcome(applied, float("nan") if norm is None else float(norm))


def _step_with_one_loss_scale(engine: Any) -> None:
    """Step, and change the scale of the loss behind the step.

    DeepSpeed 0.19.8 doubles it between the backward passes and the division by it: gradients that
    are not clipped would be half as large in that step, as would the norm that stage 3 reports.
    """
    zero, overflows = engine.optimizer, []
    zero._update_scale = overflows.append
    try:
        engine.step()
    finally:
        del zero._update_scale
    for overflow in overflows:
        zero._update_scale(overflow)


def _forget_refused_gradients(zero: Any) -> None:
    """Drop the sum of a step that was refused.

    DeepSpeed 0.19.8 forgets this where its stages 1 and 2 keep an fp32 sum for optimizer state in
    CPU memory: the next gradients are added to what is not finite, and every later step is refused.
    """
    sums = getattr(zero, "averaged_gradients", {})
    for group in sums:
        sums[group] = None


def _replicated_grad_norm(module: nn.Module) -> torch.Tensor:
    """Norm of gradients that are already averaged and whole on every rank (stage 0)."""
    norms = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm()
