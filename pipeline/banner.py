"""The block of facts that a run prints before its first step."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import pipeline
from pipeline.config import RunConfig, ScheduleSection
from pipeline.ds_config import DeepSpeedConfig, combine_checks
from pipeline.mixture_sources import describe_mixture
from pipeline.modeling.pair import NetworkPair
from pipeline.resume import Accepted

if TYPE_CHECKING:
    from pipeline.assemble import Assembled
    from pipeline.session import Session

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


def banner_lines(session: "Session", assembled: "Assembled") -> list[str]:
    """Compose the banner.

    Args:
        session: This start.
        assembled: What it is about to run.

    Returns:
        Lines: facts, then what was accepted, warnings and notes.
    """
    config, ds, plan = session.config, session.ds, session.plan
    engines, comparison = assembled.engines.by_name, assembled.comparison
    sizes = {name: count_parameters(engine.module) for name, engine in engines.items()}
    commit = assembled.resumed_from
    start = f"continues {commit.path}" if commit else "new"
    versions = assembled.trainer.identity["environment"].items()
    phases = assembled.schedule.explain()
    return [
        f"run: {config.run.folder}, seed {config.run.seed}, {start}",
        f"program: deberta-pretrain {pipeline.__version__} from {Path(pipeline.__file__).parent}",
        "versions: " + ", ".join(f"{key} {value}" for key, value in versions if value),
        f"data: {assembled.data.describe()}",
        *describe_mixture(
            assembled.data.train, config.data, assembled.schedule.samples_by_length()
        ),
        *([f"phases: {'; '.join(phases)}"] if phases else []),
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()),
        *ds.explain(plan, config.data.sequence_length),
        memory_line(sum(sizes.values()), ds, plan.world_size),
        _checkpoint_line(config, sum(sizes.values())),
        *(f"schedule: {text}" for text in _extensions(config.schedule)),
        *comparison.rates,
        *(line for each in comparison.accepted_so_far for line in _accepted_lines(each)),
        *(f"warning: {text}" for text in combine_checks(config, ds)),
        *(f"note: {text}" for text in assembled.notes),
    ]


def _checkpoint_line(config: RunConfig, parameters: int) -> str:
    """Say how often commits are made, and what they take."""
    keep, every = config.checkpoint.keep_last, config.checkpoint.interval_steps
    commit_gb = parameters * _STATE_BYTES_PER_PARAMETER / 1e9
    return (
        f"checkpoints: every {every:,} steps, the newest {keep} are kept, about {commit_gb:.3g} GB "
        f"each, {commit_gb * (keep + 1):.3g} GB of disk at most"
    )


def _extensions(schedule: ScheduleSection) -> list[str]:
    """Say where the run was extended."""
    ends = [*(row.previous_max_steps for row in schedule.extensions[1:]), schedule.max_steps]
    return [
        f"extended at step {row.from_step:,}, to {end:,} steps instead of"
        f" {row.previous_max_steps:,}"
        for row, end in zip(schedule.extensions, ends, strict=False)
    ]


def _accepted_lines(accepted: Accepted) -> list[str]:
    """Say what somebody accepted, and in which ways the data differ."""
    return [str(accepted), *(f"  {line}" for line in accepted.details)]
