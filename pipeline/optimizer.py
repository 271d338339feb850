"""AdamW for one network: what decays, how it is built, and a guard for ZeRO stage 0.

This layer does not name DeepSpeed: where the JSON offloads the state, the engine passes in the
class of DeepSpeed's CPU Adam.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from pipeline.config import OptimizerSection

NO_DECAY_NAMES = ("bias", "LayerNorm.weight")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not.

    As in the original, a name that contains "bias" or "LayerNorm.weight" does not decay; all else
    does: matrices, word and position embeddings, the relative table, and Delta, whose decay pulls
    the discriminator's embeddings towards the generator's.

    Args:
        named_parameters: As from `nn.Module.named_parameters()`; frozen ones are left out.
        weight_decay: Decoupled decay of the first group.

    Returns:
        The groups "decay" and "no_decay", in this order and in the order of the names given; a
        group without parameters is left out.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            exempt = any(part in name for part in NO_DECAY_NAMES)
            (no_decay if exempt else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    section: OptimizerSection,
    *,
    learning_rate: float,
    device_type: str,
    zero_stage: int,
    cpu_offload_class: Callable[..., Optimizer] | None = None,
) -> Optimizer:
    """Build the AdamW that suits the device and the sharding.

    Args:
        groups: From `parameter_groups`.
        section: Betas and epsilon.
        learning_rate: Peak rate of this network; the trainer scales it at every step.
        device_type: "cpu" or "cuda"; on CUDA the step is one fused kernel.
        zero_stage: ZeRO stage, 0 to 3; at 0 the optimizer itself refuses non-finite steps.
        cpu_offload_class: DeepSpeed's CPU Adam, where the JSON keeps the state in CPU memory.

    Returns:
        The optimizer.
    """
    constants = {"lr": learning_rate, "betas": section.betas, "eps": section.eps}
    if cpu_offload_class is not None:
        return cpu_offload_class(list(groups), adamw_mode=True, **constants)
    adamw = FiniteGuardAdamW if zero_stage == 0 else AdamW
    return adamw(list(groups), fused=device_type == "cuda", **constants)


class FiniteGuardAdamW(AdamW):
    """AdamW that leaves a step out when any gradient is infinite or NaN.

    DeepSpeed checks this itself at ZeRO stages 1 to 3, but at stage 0 it clips and steps whatever
    the gradients are. They are all-reduced before the step, so every rank decides alike.

    Attributes:
        skipped_steps: Steps left out since construction; not part of the state dict.
        last_step_skipped: Whether the newest step was left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped_steps = 0
        self.last_step_skipped = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step, or none at all: weights, averages and Adam's counter stay as they are.

        Args:
            closure: Must be None; a closure would compute gradients after the check.

        Returns:
            None.
        """
        assert closure is None, "the guard has to see the gradients before the step"
        gradients = [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # The largest magnitude is infinite or NaN exactly if some gradient is; a 2-norm could
        # overflow although every gradient is finite.
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        self.last_step_skipped = not bool(torch.isfinite(largest))
        if self.last_step_skipped:
            self.skipped_steps += 1
            return None
        return super().step()
