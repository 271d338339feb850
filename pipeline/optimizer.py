"""AdamW for one network: what decays, how it is built, and what torch's AdamW does not do.

    parameter_groups        which parameters decay
    build_optimizer         the class that suits device, sharding and bias correction
    FiniteGuardAdamW        leaves non-finite steps out, for ZeRO stage 0
    UncorrectedAdamW        Adam as in the released code, without bias correction

This layer does not name DeepSpeed: where the JSON offloads the state, the engine passes in the
class of DeepSpeed's CPU Adam.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from pipeline.config import OptimizerSection

NO_DECAY_NAMES = ("bias", "LayerNorm.weight")
_UNCORRECTED_KEYS = ("lr", "eps", "weight_decay")


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
        section: Betas, epsilon and bias correction.
        learning_rate: Peak rate of this network; the trainer scales it at every step.
        device_type: "cpu" or "cuda"; on CUDA the step is one fused kernel.
        zero_stage: ZeRO stage, 0 to 3; at 0 the optimizer itself refuses non-finite steps.
        cpu_offload_class: DeepSpeed's CPU Adam, where the JSON keeps the state in CPU memory.

    Returns:
        The optimizer.
    """
    constants = {"lr": learning_rate, "betas": section.betas, "eps": section.eps}
    if cpu_offload_class is not None:
        correction = section.bias_correction
        return cpu_offload_class(
            list(groups), adamw_mode=True, bias_correction=correction, **constants
        )
    if zero_stage == 0:
        adamw = FiniteGuardAdamW if section.bias_correction else _FiniteGuardUncorrectedAdamW
    else:
        adamw = AdamW if section.bias_correction else UncorrectedAdamW
    return adamw(list(groups), fused=device_type == "cuda", **constants)


class FiniteGuardAdamW(AdamW):
    """AdamW that leaves a step out when any gradient is infinite or NaN.

    DeepSpeed checks this itself at ZeRO stages 1 to 3, but at stage 0 it clips and steps whatever
    the gradients are. They are all-reduced before the step, so every rank decides alike.

    Attributes:
        gradients_are_finite: What somebody has found out who has read the gradients anyway, for the
            next step alone; None to look at them there, for which the host waits.
        skipped_steps: Steps left out since construction; not part of the state dict.
        last_step_skipped: Whether the newest step was left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients_are_finite: bool | None = None
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
        told, self.gradients_are_finite = self.gradients_are_finite, None
        self.last_step_skipped = not (self._finds_finite_gradients() if told is None else told)
        if self.last_step_skipped:
            self.skipped_steps += 1
            return None
        return super().step()

    def _finds_finite_gradients(self) -> bool:
        gradients = [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # The largest magnitude is infinite or NaN exactly if some gradient is; a 2-norm could
        # overflow although every gradient is finite.
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        return bool(torch.isfinite(largest))


class UncorrectedAdamW(AdamW):
    """AdamW whose averages are used as they are: not divided by 1 - beta^t.

    So its first step is (1 - beta1) / sqrt(1 - beta2) learning rates long (0.7 with the paper's
    betas, 3.2 with the released code's), where a corrected one is 1 long.

    Source:
        DeBERTa/optims/xadam.py.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By group's first parameter: its counter, what torch calls the tensor's version, its value.
        self._known: dict[torch.Tensor, tuple[torch.Tensor, int, int]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step.

        torch's kernels, fused or not, always correct. With m and v Adam's averages, c1 = 1 -
        beta1^t, c2 = sqrt(1 - beta2^t), rate r, epsilon e and decay d, they subtract
        r m / c1 / (sqrt(v) / c2 + e) + r d w from a weight w. With r c1 / c2, e / c2 and d c2 / c1
        instead, that is r m / (sqrt(v) + e) + r d w: the uncorrected step. DeepSpeed hands over one
        group or sub-group at a time, so each has the t of its own state.

        Args:
            closure: Must be None; a closure would take part in the changed groups.

        Returns:
            None.
        """
        assert closure is None, "the step is a function of gradients that are already there"
        written = [{key: group[key] for key in _UNCORRECTED_KEYS} for group in self.param_groups]
        adam_steps = [self._completed_steps(group["params"]) + 1 for group in self.param_groups]
        for group, adam_step in zip(self.param_groups, adam_steps, strict=True):
            beta1, beta2 = group["betas"]
            c1, c2 = 1 - beta1**adam_step, math.sqrt(1 - beta2**adam_step)
            group["lr"] *= c1 / c2
            group["eps"] /= c2
            group["weight_decay"] *= c2 / c1
        try:
            super().step()
        finally:
            for group, values in zip(self.param_groups, written, strict=True):
                group.update(values)
        for group, adam_step in zip(self.param_groups, adam_steps, strict=True):
            counter = self._counter(group["params"])
            if counter is not None:
                self._known[group["params"][0]] = (counter, counter._version, adam_step)
        return None

    def _completed_steps(self, parameters: Sequence[torch.Tensor]) -> int:
        """Adam's counter of parameters that always step together; 0 before their first step.

        The fused kernel keeps it on the device: it is read only where somebody else has written it.
        """
        counter = self._counter(parameters)
        if counter is None:
            return 0
        known, version, steps = self._known.get(parameters[0], (None, 0, 0))
        is_ours = known is counter and counter._version == version
        return steps if is_ours else int(counter)

    def _counter(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
        counters = (self.state[p]["step"] for p in parameters if "step" in self.state.get(p, ()))
        return next(counters, None)


class _FiniteGuardUncorrectedAdamW(FiniteGuardAdamW, UncorrectedAdamW):
    """Both: the guard decides, then the step is the uncorrected one."""
