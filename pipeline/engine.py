"""The two DeepSpeed engines: made from modules, stepped together, read between steps.

The generator and the discriminator each have an engine, so that each keeps its own clipping norm,
learning rate and loss scale, and the generator is updated before the discriminator looks at its
embeddings (arXiv:2111.09543, section 3.3; the released code's decoupled training). This module,
bound to DeepSpeed 0.19.8, knows its habits:

    - it compiles a C++ operation for CPU collectives that training never calls: switched off
    - its own learning-rate schedule is not used: rates are functions of the run's step
    - at ZeRO stage 0 it trains on after a NaN: the optimizer handed to it refuses such a step
"""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import OptimizerSection
from pipeline.ds_config import BatchPlan, DeepSpeedConfig
from pipeline.engine_state import WEIGHT, inner_optimizer, local_slices
from pipeline.optimizer import FiniteGuardAdamW, build_optimizer, parameter_groups
from pipeline.runtime import World


@dataclass
class Engines:
    """Both networks under DeepSpeed."""

    generator: Any
    discriminator: Any

    def items(self) -> dict[str, Any]:
        """Name them as checkpoints do.

        Returns:
            network name -> engine.
        """
        return {"generator": self.generator, "discriminator": self.discriminator}


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Keep DeepSpeed's start-up chatter out of the user's terminal; errors still pass."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Its bf16 optimizer prints a dozen lines about memory by itself.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def start_engines(
    generator: nn.Module,
    discriminator: nn.Module,
    *,
    optimizer: OptimizerSection,
    ds: DeepSpeedConfig,
    plan: BatchPlan,
    world: World,
) -> Engines:
    """Hand both networks to DeepSpeed.

    Args:
        generator: The generator with its initial or loaded weights, fp32.
        discriminator: The discriminator, likewise.
        optimizer: AdamW's settings.
        ds: The checked DeepSpeed JSON.
        plan: Batch sizes for this world.
        world: This process's place.

    Returns:
        The engines, at step 0.
    """
    with _quiet_deepspeed():
        # Imported here: it costs seconds and must see the accelerator that start_world chose.
        import deepspeed
        from deepspeed import ops

        if world.device.type == "cpu":
            ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        rates = (optimizer.generator_learning_rate, optimizer.discriminator_learning_rate)
        engines = []
        for module, rate in zip((generator, discriminator), rates, strict=True):
            groups = parameter_groups(module.named_parameters(), optimizer.weight_decay)
            client = build_optimizer(
                groups,
                optimizer,
                learning_rate=rate,
                device_type=world.device.type,
                zero_stage=ds.zero_stage,
                cpu_offload_class=_cpu_adam() if ds.offload_optimizer else None,
            )
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=client,
                config=ds.engine_dict(plan),
                dist_init_required=False,
            )
            engines.append(engine)
    return Engines(*engines)


def _cpu_adam() -> type[torch.optim.Optimizer]:
    """Import DeepSpeed's CPU Adam, which compiles itself on first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Write the learning rate of the next step.

    Args:
        engine: A DeepSpeed engine.
        learning_rate: For all parameter groups.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


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
        engine: A DeepSpeed engine at an accumulation boundary.

    Returns:
        Whether the step was applied, and the gradient norm.
    """
    if engine.zero_optimization_stage() == 0:
        norm = float(_replicated_grad_norm(engine.module))
        engine.step()
        guard = inner_optimizer(engine)
        assert isinstance(guard, FiniteGuardAdamW)
        return StepOutcome(not guard.last_step_skipped, norm)
    engine.step()
    norm = engine.get_global_grad_norm()
    return StepOutcome(
        bool(engine.was_step_applied()), float("nan") if norm is None else float(norm)
    )


def _replicated_grad_norm(module: nn.Module) -> torch.Tensor:
    """Norm of gradients that are already averaged and whole on every rank (stage 0)."""
    norms = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm()


def parameter_norm(engine: Any, name: str, world: World) -> float:
    """Compute the norm of one parameter from the fp32 slices of all ranks; a collective.

    Args:
        engine: A DeepSpeed engine at a step boundary.
        name: Parameter.
        world: This process's place.

    Returns:
        The Euclidean norm.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for part in local_slices(engine, world.rank):
        if part.name == name:
            total += part.tensors[WEIGHT].double().square().sum().to(world.device)
    if world.world_size > 1:
        dist.all_reduce(total)
    return float(total.sqrt())
