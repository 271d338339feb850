"""The block of facts that a run prints before its first step."""

from pathlib import Path

import torch
from torch import nn

import pipeline
from pipeline.config import RunConfig
from pipeline.ds_config import BatchPlan, DeepSpeedConfig
from pipeline.engine import Engines
from pipeline.modeling.pair import NetworkPair

_STATE_BYTES_PER_PARAMETER = 12
"""fp32 weight and two averages of Adam: what a commit stores."""


def count_parameters(module: nn.Module) -> int:
    """Count trainable parameters, whole ones also where ZeRO-3 has partitioned them.

    Args:
        module: A network.

    Returns:
        Elements.
    """
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)


def parameter_counts(config: RunConfig) -> dict[str, int]:
    """Count the trainable parameters of a run without making them.

    Args:
        config: The run.

    Returns:
        Network -> parameters; tables that both networks use count in the generator.
    """
    with torch.device("meta"):
        pair = NetworkPair(config)
    return {name: count_parameters(pair.get_submodule(name)) for name in config.networks}


def memory_line(parameters: int, ds: DeepSpeedConfig, world_size: int) -> str:
    """Estimate the memory of weights, gradients and optimizer state on one rank.

    Args:
        parameters: Trainable parameters of both networks.
        ds: The DeepSpeed JSON.
        world_size: Ranks.

    Returns:
        One line; activations come on top.
    """
    wide = ds.precision in ("fp32", "autocast")
    weight = 4 if wide else 2
    gradient = 4  # accumulated in fp32 by default
    master_and_averages = 8 if wide else 12
    weight /= world_size if ds.zero_stage >= 3 else 1
    gradient /= world_size if ds.zero_stage >= 2 else 1
    master_and_averages /= world_size if ds.zero_stage >= 1 else 1
    gib = parameters * (weight + gradient + master_and_averages) / 2**30
    return f"memory: about {gib:.2f} GiB a rank for weights, gradients and Adam, plus activations"


def banner_lines(
    config: RunConfig,
    ds: DeepSpeedConfig,
    plan: BatchPlan,
    engines: Engines,
    facts: dict[str, str],
    start: str,
) -> list[str]:
    """Compose the banner.

    Args:
        config: The run.
        ds: The DeepSpeed JSON.
        plan: Batch sizes of this world.
        engines: Both networks.
        facts: Versions, hardware and data, name -> value.
        start: Where the run begins.

    Returns:
        Lines.
    """
    sizes = {name: count_parameters(engine.module) for name, engine in engines.by_name.items()}
    total = sum(sizes.values())
    keep, every = config.checkpoint.keep_last, config.checkpoint.interval_steps
    commit_gb = total * _STATE_BYTES_PER_PARAMETER / 1e9
    return [
        f"run: {config.run.folder}, seed {config.run.seed}, {start}",
        f"program: deberta-pretrain {pipeline.__version__} from {Path(pipeline.__file__).parent}",
        *(f"{name}: {value}" for name, value in facts.items()),
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()),
        *ds.explain(plan, config.data.sequence_length),
        memory_line(total, ds, plan.world_size),
        f"checkpoints: every {every:,} steps, the newest {keep} are kept, about {commit_gb:.3g} GB "
        f"each, {commit_gb * (keep + 1):.3g} GB of disk at most",
    ]
