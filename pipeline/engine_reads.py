"""What the host reads from the device in an optimizer step: one copy for each engine.

DeepSpeed 0.19.8 asks the device again and again: whether a gradient overflowed, whether the norm is
finite, once more for each parameter group, whether it is longer than the clipping length; between
these it copies constants to the device. Each time the host waits until the device has done all
that was asked of it before, and the device then waits for the host. Here the norm is computed
without a copy and comes to the host once, with whatever else is wanted there (`HostRead`); what
DeepSpeed asks afterwards it asks of a number on the host. The formulas are DeepSpeed's own:

    stage 0         root of the sum of squares of the parameters' fp32 norms; clipped here
    stage 1, bf16   the same (`BF16_Optimizer`)
    stages 1, 2     for each parameter group, of fp64 norms, summed over the ranks in fp32
    stage 3         for each sub-group, of fp64 norms, summed over the ranks in fp64

Where the JSON offloads Adam's state, gradients go to CPU memory anyway, and DeepSpeed's own code
reads a norm for each parameter.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeline.engine_state import inner_optimizer
from pipeline.optimizer import FiniteGuardAdamW


class HostRead:
    """The copy from the device to the host in an engine's step."""

    def __init__(self, passengers: torch.Tensor | None = None) -> None:
        """Say what comes along.

        Args:
            passengers: fp64 [N] on the device, known before the step; None for nothing.
        """
        self._passengers = passengers
        self._brought: torch.Tensor | None = None

    def bring(self, values: torch.Tensor) -> torch.Tensor:
        """Copy values to the host, and the passengers with them; the host waits.

        Args:
            values: fp32 or fp64 [M] on the device.

        Returns:
            The same on the host.
        """
        wide = [values.double()]
        if self._passengers is not None:
            wide.append(self._passengers)
        numbers = torch.cat(wide).tolist()
        if self._passengers is not None:
            self._brought = torch.tensor(numbers[len(values) :], dtype=torch.float64)
        return torch.tensor(numbers[: len(values)], dtype=values.dtype)

    @property
    def passengers(self) -> torch.Tensor:
        """The passengers on the host, fp64 [N]; where no step brought them, they are read now."""
        if self._brought is None:
            assert self._passengers is not None
            self._brought = torch.tensor(self._passengers.tolist(), dtype=torch.float64)
        return self._brought


@contextlib.contextmanager
def reading_once(engine: Any, read: HostRead) -> Iterator[None]:
    """Let an engine's step read its gradient's norm through one copy, and nothing else.

    Args:
        engine: A DeepSpeed engine of ZeRO stage 1 to 3, before its step.
        read: The copy.

    Yields:
        Once; the engine's step belongs inside.
    """
    zero = engine.optimizer
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        yield
    elif hasattr(zero, "fp32_groups_gradients"):
        from deepspeed.runtime import bf16_optimizer

        def norm_of_all(*, input_tensors: Sequence[torch.Tensor], **_: Any) -> torch.Tensor:
            return read.bring(_norm_of_norms(input_tensors)[None])[0]

        with replaced(bf16_optimizer, get_global_norm_of_tensors=norm_of_all):
            yield
    elif engine.zero_optimization_stage() == 3:

        def norms_on_host() -> list[torch.Tensor]:
            return list(read.bring(_group_norms(zero, zero.fp16_groups, torch.float64)))

        with replaced(zero, _get_norm_groups=norms_on_host, check_overflow=_is_seen_in_the_norm):
            yield
    else:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        def norm_on_host() -> torch.Tensor:
            norms = _group_norms(zero, zero.params_in_partition, torch.float32)
            return combine_grad_norm_groups(read.bring(norms))

        with replaced(zero, scaled_global_norm=norm_on_host, check_overflow=_is_seen_in_the_norm):
            yield


def _is_seen_in_the_norm(**_: Any) -> None:
    """Do not look for overflows before the norm, which is not finite where a gradient is not."""


def _group_norms(zero: Any, groups: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """Norm of each group's gradient over all ranks: [groups], not finite where a gradient is not.

    Args:
        zero: DeepSpeed's optimizer, of stage 1 to 3.
        groups: This rank's parameters of each group.
        dtype: Of the sums over the ranks.
    """
    squares = []
    for index, parameters in enumerate(groups):
        gradients = [
            g for g in zero.averaged_gradients[index] if not getattr(g, "_zero_padding", False)
        ]
        norms = [
            torch.linalg.vector_norm(gradient.detach().double())
            for gradient, _ in zip(gradients, parameters, strict=False)
        ]
        norms = norms or [torch.zeros((), dtype=torch.float64, device=zero.device)]
        squares.append(torch.stack(norms).square().sum())
    sums = torch.stack(squares).to(dtype)
    dist.all_reduce(sums, group=zero.dp_process_group)
    return sums.sqrt()


def step_replicated(engine: Any, read: HostRead) -> tuple[bool, float]:
    """Take an engine's step at ZeRO stage 0, where every rank holds all gradients.

    Args:
        engine: A DeepSpeed engine with a `FiniteGuardAdamW`, before its step.
        read: The copy.

    Returns:
        Whether the step was applied, and the gradient's global norm before clipping.
    """
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    # The norm may overflow although every gradient is finite.
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    norm, largest = read.bring(torch.stack([_norm_of_norms(gradients), largest])).unbind()
    guard = inner_optimizer(engine)
    assert isinstance(guard, FiniteGuardAdamW)
    guard.gradients_are_finite = bool(largest.isfinite())

    def clip() -> None:
        factor = torch.tensor(engine.gradient_clipping()) / (norm + 1e-6)
        for gradient in gradients:
            gradient.mul_(float(factor.clamp(max=1.0)))

    with replaced(engine, clip_fp32_gradients=clip):
        engine.step()
    return not guard.last_step_skipped, float(norm)


def _norm_of_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norm of tensors that are whole on every rank: fp32, 0-dimensional."""
    return torch.stack([t.detach().float().norm() for t in tensors]).square().sum().sqrt()


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give an object or a module other attributes for a while.

    Args:
        owner: Whose.
        **attributes: Name -> what stands there inside.

    Yields:
        Once.
    """
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
