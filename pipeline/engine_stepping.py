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

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import OptimizerSection
from pipeline.engine_reads import HostRead, reading_once, replaced, step_replicated


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


@contextlib.contextmanager
def between_forwards(engine: Any) -> Iterator[None]:
    """Let single modules of an engine be called outside of its forward passes.

    Under ZeRO-3 DeepSpeed 0.19.8 traces which modules follow which from one forward pass of the
    engine to its next, to gather weights ahead. A call that is not part of the trace makes it begin
    anew: no weight is gathered ahead in that micro step, and the ranks compare their traces on the
    host. Such calls gather what they need and are kept out of the trace.

    Args:
        engine: A DeepSpeed engine.

    Yields:
        Once; the calls belong inside.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        yield
        return
    kept_out = {
        "trace_prologue": lambda _module: None,
        "is_record_trace": lambda: False,
        "is_complete_trace": lambda: False,
    }
    with replaced(offload.get_param_coordinator(), **kept_out):
        yield


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
    """Global norm before clipping; not finite where a gradient was not."""


def step_engine(engine: Any, read: HostRead | None = None) -> StepOutcome:
    """Take the optimizer step behind the last micro step's backward pass.

    Args:
        engine: A DeepSpeed engine whose newest `backward` was the last of its step.
        read: What comes to the host together with the gradient's norm; nothing else where None.

    Returns:
        Whether the step was applied, and the gradient norm.
    """
    read = read or HostRead()
    if engine.zero_optimization_stage() == 0:
        return StepOutcome(*step_replicated(engine, read))
    with reading_once(engine, read):
        if engine.fp16_enabled():
            _step_with_one_loss_scale(engine)
        else:
            engine.step()
    applied = bool(engine.was_step_applied())
    if not applied and engine.zero_optimization_stage() < 3:
        _forget_refused_gradients(engine.optimizer)
    return StepOutcome(applied, float(engine.get_global_grad_norm()))


def _step_with_one_loss_scale(engine: Any) -> None:
    """Step, and change the scale of the loss behind the step.

    DeepSpeed 0.19.8 doubles it between the backward passes and the division by it: gradients that
    are not clipped would be half as large in that step, as would the norm that stage 3 reports.
    """
    overflows: list[bool] = []
    with replaced(engine.optimizer, _update_scale=overflows.append):
        engine.step()
    for overflow in overflows:
        engine.optimizer._update_scale(overflow)


def _forget_refused_gradients(zero: Any) -> None:
    """Drop the sum of a step that was refused.

    DeepSpeed 0.19.8 forgets this where its stages 1 and 2 keep an fp32 sum for optimizer state in
    CPU memory: the next gradients are added to what is not finite, and every later step is refused.
    """
    sums = getattr(zero, "averaged_gradients", {})
    for group in sums:
        sums[group] = None
