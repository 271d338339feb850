"""The two DeepSpeed engines: made from modules, stepped together, read between steps.

The generator and the discriminator each have an engine, so that each keeps its own clipping norm,
learning rate and loss scale, and the generator is updated before the discriminator looks at its
embeddings (arXiv:2111.09543, section 3.3; the released code's decoupled training). This module,
bound to DeepSpeed 0.19.8, knows its habits:

    - it compiles a C++ operation for CPU collectives that training never calls: switched off
    - its own learning-rate schedule is not used: rates are functions of the run's step
    - at ZeRO stage 0 it trains on after a NaN: the optimizer handed to it refuses such a step
    - its fp32 masters begin with rounded weights: they are given the exact ones
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
from pipeline.engine_state import WEIGHT, local_slices, write_weights
from pipeline.optimizer import build_optimizer, parameter_groups
from pipeline.runtime import World


@dataclass(frozen=True)
class Engines:
    """The networks under DeepSpeed."""

    by_name: dict[str, Any]
    """One engine for each of `NetworkPair.trained_modules`, in their order."""

    def train(self, mode: bool = True) -> None:
        """Set all modules to training or evaluation.

        Args:
            mode: Whether to train.
        """
        for engine in self.by_name.values():
            engine.train(mode)


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
    modules: dict[str, nn.Module],
    *,
    optimizer: OptimizerSection,
    ds: DeepSpeedConfig,
    plan: BatchPlan,
    world: World,
) -> Engines:
    """Hand the networks to DeepSpeed.

    Args:
        modules: From `NetworkPair.trained_modules`, with initial or loaded weights, fp32.
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
        engines = {}
        for name, module in modules.items():
            client = build_optimizer(
                _network_groups(name, module, optimizer.weight_decay),
                optimizer,
                learning_rate=optimizer.learning_rate(name),
                device_type=world.device.type,
                zero_stage=ds.zero_stage,
                cpu_offload_class=_cpu_adam() if ds.offload_optimizer else None,
            )
            # DeepSpeed rounds the weights to bf16 or fp16 first and makes its masters from those.
            is_rounded = ds.precision in ("bf16", "fp16")
            exact = {n: p.detach().clone() for n, p in module.named_parameters() if is_rounded}
            engines[name], *_ = deepspeed.initialize(
                model=module,
                optimizer=client,
                config=ds.engine_dict(plan),
                dist_init_required=False,
            )
            if is_rounded:
                write_weights(engines[name], world.rank, exact)
            del exact  # before the next network's copies
            _send_biases_in_fp32(module)
    return Engines(engines)


def _send_biases_in_fp32(module: nn.Module) -> None:
    """Keep DeepSpeed's autocast from rounding the biases of Linears where ranks exchange them.

    Its ZeRO-3 gathers them in bf16 in a process's first step and in fp32 behind it (0.19.8): the
    first step of a resumed run would differ. Weights it may round; so does a Linear by itself.
    """
    parameters: Any = module.parameters()
    for parameter in parameters:
        # ZeRO-3 leaves an empty tensor in its place, and keeps the shape beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 1 and hasattr(parameter, "comm_dtype"):
            del parameter.comm_dtype


def _network_groups(name: str, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups, each with the network whose learning rate it follows."""
    networks = ("generator", "discriminator") if name == "joint" else (name,)
    groups = []
    for network in networks:
        prefix = f"{network}." if name == "joint" else ""
        named = [pair for pair in module.named_parameters() if pair[0].startswith(prefix)]
        groups += [{**g, "network": network} for g in parameter_groups(named, weight_decay)]
    return groups


def _cpu_adam() -> type[torch.optim.Optimizer]:
    """Import DeepSpeed's CPU Adam, which compiles itself on first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam


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
