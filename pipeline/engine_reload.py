"""Putting a running engine back to a commit, in place: what a roll-back does to each network.

    1. gradients   what a refused or abandoned step has left behind is dropped
    2. state       fp32 weights, Adam's averages and counter, loss scale (`pipeline.engine_state`)
    3. module      its own weights, on every rank, from the fp32 weights of the ranks that own them

The engine then goes on bit for bit as one that a new process starts from the same commit. Where
DeepSpeed 0.19.8 keeps what must be dropped or refreshed depends on its optimizer:

    stage 0         plain AdamW: the module's weights are the fp32 weights
    stage 1, bf16   BF16_Optimizer: fp32 sums of gradients
    stages 1, 2     DeepSpeedZeroOptimizer: sums by parameter, by partition, and in CPU memory
    stage 3         partitions; small weights stay gathered on every rank
"""

from typing import Any

import torch

from pipeline.engine_state import restore_state
from pipeline.rank_files import StateReader

# What stages 1, 2 and 3 count before the first backward pass of a step.
_FIRST_MICRO_STEP = {1: -1, 2: -1, 3: 0}


@torch.no_grad()
def reload_state(engine: Any, rank: int, reader: StateReader, scalars: dict[str, Any]) -> None:
    """Put an engine back to a commit; a collective of its data-parallel group.

    Args:
        engine: A DeepSpeed engine between two steps, however many it has taken or refused.
        rank: This process's data-parallel rank.
        reader: The network's state in the commit.
        scalars: What `scalar_state` returned for it.
    """
    _forget_gradients(engine)
    restore_state(engine, rank, reader, scalars)
    _refresh_module(engine)


def _forget_gradients(engine: Any) -> None:
    """Drop gradients, their sums, and what an optimizer remembers about a step."""
    for parameter in engine.module.parameters():
        parameter.grad = None
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return
    zero.zero_grad(set_to_none=True)
    zero.overflow = False
    zero.clear_backward_seen_flag()
    if hasattr(zero, "averaged_gradients"):
        zero.averaged_gradients.clear()
        getattr(zero, "all_grad_tensors", {}).clear()
        zero.micro_step_id = _FIRST_MICRO_STEP[stage]
    if hasattr(zero, "norm_for_param_grads"):  # optimizer state in CPU memory
        zero.reset_cpu_buffers()


def _refresh_module(engine: Any) -> None:
    """Give the module the fp32 weights, rounded to its own type, gathered from their owners."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    if stage == 3:
        zero.checkpoint_event_prologue()  # lets go of every gathered weight
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # gathers those that stay gathered
