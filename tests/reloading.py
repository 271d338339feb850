"""Engines that are put back to a commit while they run, and replicas that are compared.

    python -m tests.reloading FOLDER RANK RANKS    every case, as one rank of a world

Each rank writes `rank-N.json`: case -> what was seen. `check_reload` also runs in a test's process.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.ds_config import check_deepspeed_config
from tests.micro_steps import loss_sum, optimizer_section, start_engine

MICRO_BATCH, MICRO_STEPS = 2, 2
BEFORE, AFTER = ((0, 1.0), (1, 1.0)), ((2, 1.0), (3, 1.0))
"""Steps before the commit and behind it: their number, and what one rank's loss is scaled by."""
LOST = {
    "a refused step": ((4, 50.0), (5, float("inf"))),
    "an abandoned step": ((6, 1.0), (7, None)),
    "a flipped bit": ((8, 100.0),),
}
"""Steps that are undone, by how they end."""


@dataclass(frozen=True)
class Case:
    """How an engine is set up."""

    stage: int
    precision: str = "fp32"
    offload: bool = False
    bias_correction: bool = True

    def __str__(self):
        return f"stage {self.stage} {self.precision}{' offload' if self.offload else ''}"


CASES = [
    *(Case(stage) for stage in (0, 1, 2, 3)),
    *(Case(stage, "bf16") for stage in (1, 2, 3)),
    *(Case(0, "autocast"), Case(1, "fp16"), Case(3, "fp16")),
    *(Case(2, "fp32", True), Case(3, "bf16", True)),
]


def deepspeed_json(case, ranks):
    zero = {"stage": case.stage, "reduce_bucket_size": 1_000_000}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if case.stage == 3:  # biases stay gathered, matrices do not; several sub-groups
        zero |= {"stage3_param_persistence_threshold": 20, "sub_group_size": 40}
    document = {
        "train_batch_size": MICRO_BATCH * MICRO_STEPS * ranks,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": case.precision == "bf16"},
        "zero_optimization": zero,
    }
    if case.precision == "fp16":
        document["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    if case.precision == "autocast":
        document["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if case.precision in ("bf16", "fp16"):
        document |= {"data_types": {"grad_accum_dtype": "fp32"}}
    return check_deepspeed_config(document, str(case))


def train(engine, case, world, steps):
    """Take steps, each (number, scale of its loss); what the optimizer did in each."""
    from pipeline.engine_stepping import backward, set_learning_rates, step_engine

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision, torch.float32)
    outcomes = []
    for number, scale in steps:
        for micro_step in range(MICRO_STEPS):
            loss = loss_sum(engine, *batch_of(number, micro_step, world.rank), dtype)
            # Only one rank's loss is out of order, in one micro step.
            if scale and (world.rank, micro_step) == (world.world_size - 1, 0):
                loss = loss * scale
            backward(engine, loss, is_last=micro_step == 1)
            if scale is None:  # abandoned
                return outcomes
        set_learning_rates(engine, optimizer_section(case), 1.0)
        outcomes.append(step_engine(engine))
    return outcomes


def batch_of(number, micro_step, rank):
    """Inputs and targets of a micro batch."""
    generator = torch.Generator().manual_seed(1000 * number + 10 * micro_step + rank)
    inputs = torch.randn(MICRO_BATCH, 6, generator=generator)
    return inputs, torch.randn(MICRO_BATCH, 3, generator=generator)


def bits(engine, rank):
    """Copies of everything that this rank holds, as integers: name -> tensor."""
    from pipeline.engine_state import local_slices

    held = {
        f"{kind} of {part.name}": values
        for part in local_slices(engine, rank)
        for kind, values in part.tensors.items()
    }
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            # Behind the last element of a parameter lies padding, which nothing reads.
            count = max(
                0,
                min(
                    parameter.ds_tensor.ds_numel,
                    parameter.ds_numel - rank * parameter.ds_tensor.ds_numel,
                ),
            )
            held[f"partition of {name}"] = parameter.ds_tensor[:count]
        if getattr(parameter, "ds_status", None) is None or parameter.ds_status.name == "AVAILABLE":
            held[name] = parameter
        for kind, values in engine.optimizer.state.get(parameter, {}).items():  # stage 0
            held[f"replica of {kind} of {name}"] = values
    integers = {2: torch.int16, 4: torch.int32}
    return {n: v.detach().clone().view(integers[v.element_size()]) for n, v in held.items()}


def differing(left, right):
    """Names of what is not the same, bit for bit."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    ]


def flip_a_bit(engine):
    """Damage what this rank holds of the module; the name of the parameter, if it holds any."""
    for name, parameter in engine.module.named_parameters():
        if parameter.numel():  # one that is shared out has no elements between steps
            parameter.detach().view(-1).view(torch.uint8)[0] ^= 1
            return name
    return None


def check_reload(case, world, group, folder):
    """Train, commit, train on into an infinite loss, reload and go on; what is wrong after that."""
    from pipeline.engine_reload import reload_state
    from pipeline.engine_state import scalar_state, snapshot, write_snapshot
    from pipeline.rank_files import StateReader
    from pipeline.replicas import differing_ranks

    config = deepspeed_json(case, world.world_size)
    undisturbed, engine = (start_engine(case, config, world) for _ in range(2))
    for each in (undisturbed, engine):
        train(each, case, world, BEFORE)
    committed, scalars = bits(engine, world.rank), scalar_state(engine)
    folder.mkdir(parents=True, exist_ok=True)
    write_snapshot(snapshot(engine, world.rank), folder / f"rank-{world.rank:05d}.safetensors")
    wait_for_all(group)
    straight = train(undisturbed, case, world, AFTER), bits(undisturbed, world.rank)
    seen = {"optimizer": type(engine.optimizer).__name__}
    for name, steps in LOST.items():
        lost = train(engine, case, world, steps)
        replicas = [len(differing_ranks(engines_of(engine), 0, group))]
        if name == "a flipped bit" and world.rank == world.world_size - 1:
            flip_a_bit(engine)
        for finding in differing_ranks(engines_of(engine), 0, group):
            replicas.append([finding.engine, finding.names, finding.ranks, finding.world_size])
        lost_scalars, lost_bits = scalar_state(engine), bits(engine, world.rank)
        reload_state(engine, world.rank, StateReader(folder), scalars)
        seen[name] = {
            "applied": [outcome.applied for outcome in lost],
            "replicas": replicas,
            "changed": len(differing(committed, lost_bits)) > 0,
            "scalars changed": scalars != lost_scalars,
            "differs": differing(committed, bits(engine, world.rank)),
            "same scalars": scalars == scalar_state(engine),
            "replicas after the reload": len(differing_ranks(engines_of(engine), 0, group)),
            "same outcomes": train(engine, case, world, AFTER) == straight[0],
            "differs at the end": differing(straight[1], bits(engine, world.rank)),
            "same scalars at the end": scalar_state(undisturbed) == scalar_state(engine),
        }
    return seen


def wait_for_all(group):
    """Until every rank has written its file."""
    if group is not None:
        torch.distributed.barrier(group=group)


def engines_of(engine):
    """One engine, as the pipeline knows several."""
    from pipeline.engine import Engines

    return Engines({"generator": engine})


def prepare_process():
    """Let fp16 run on a CPU, and stage 3 leave torch's functions alone; how to undo it."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    assert deepspeed is not None
    kind, linear = type(get_accelerator()), torch.nn.functional.linear
    is_supported = kind.is_fp16_supported
    kind.is_fp16_supported = lambda self: True

    def undo():
        kind.is_fp16_supported = is_supported
        torch.nn.functional.linear = linear

    return undo


def main(folder, rank, ranks):
    """One rank of a world that finds itself by a file."""
    rank, ranks, folder = int(rank), int(ranks), Path(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    prepare_process()
    import torch.distributed as dist

    from pipeline.runtime import World
    from pipeline.train import leave

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    world, group = World(rank, rank, ranks, torch.device("cpu")), dist.group.WORLD
    seen = {str(case): check_reload(case, world, group, folder / str(case)) for case in CASES}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
