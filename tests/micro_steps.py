"""Steps of different numbers of micro steps: a DeepSpeed engine against plain torch.

    python -m tests.micro_steps FOLDER    every case, in the world of the launcher

Each rank writes `rank-N.json`: case -> figures. A case trains a small network with the same micro
batches twice, once under an engine, once on a sum of plain gradients.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from pipeline.config import OptimizerSection
from pipeline.ds_config import DeepSpeedConfig, check_deepspeed_config
from pipeline.optimizer import UncorrectedAdamW
from tests.reference.plain_adamw import PlainAdamW

MICRO_BATCH = 2
JSON_MICRO_STEPS = 4
# (micro steps, whether every gradient is finite): fewer than the JSON says, and a skipped step.
STEPS = ((4, True), (2, True), (1, True), (3, False), (4, True), (1, True), (3, True))
RATE = 1e-2
CLIPPING = 0.5


@dataclass(frozen=True)
class Case:
    """How an engine is set up."""

    stage: int
    precision: str = "fp32"
    bias_correction: bool = True
    offload: bool = False

    def __str__(self):
        words = [f"stage {self.stage}", self.precision]
        words += ["uncorrected"] * (not self.bias_correction) + ["offload"] * self.offload
        return " ".join(words)


CASES = [
    *(Case(stage) for stage in (0, 1, 2, 3)),
    *(Case(stage, "bf16") for stage in (1, 2, 3)),
    *(Case(stage, bias_correction=False) for stage in (0, 1, 2, 3)),
    Case(1, "bf16", bias_correction=False),
    *(
        Case(stage, precision, offload=True)
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    ),
]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def micro_batch(step, micro_step, rank):
    """Inputs and targets; in a step that must be skipped, one input of a micro step is infinite."""
    count, is_finite = STEPS[step]
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    inputs = torch.randn(MICRO_BATCH, 6, generator=generator)
    targets = torch.randn(MICRO_BATCH, 3, generator=generator)
    if not is_finite and micro_step == count - 2:
        inputs[0, 0] = float("inf")
    return inputs, targets


def loss_sum(module, inputs, targets, dtype):
    return (module(inputs.to(dtype)).float() - targets).square().sum()


def optimizer_section(case):
    return OptimizerSection(generator_learning_rate=RATE, bias_correction=case.bias_correction)


def deepspeed_json(case, ranks):
    zero = {"stage": case.stage, "reduce_bucket_size": 1_000_000}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    document = {
        "train_batch_size": MICRO_BATCH * JSON_MICRO_STEPS * ranks,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": CLIPPING,
        "bf16": {"enabled": case.precision == "bf16"},
        "zero_optimization": zero,
    }
    if case.precision == "bf16":
        # Without the latter, stage 1 rounds a step's sum to bf16 once more, to add up the ranks'.
        document |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return check_deepspeed_config(document, str(case))


def cpu_adam(groups, *, adamw_mode, bias_correction, **constants):
    """Stands in for DeepSpeed's CPU Adam, which takes a minute to compile."""
    assert adamw_mode
    return (torch.optim.AdamW if bias_correction else UncorrectedAdamW)(groups, **constants)


def start_engine(case, config, world):
    """An engine around the network, by the pipeline's own function."""
    from pipeline import engine

    overlay = DeepSpeedConfig.overlay
    with (
        mock.patch.object(engine, "_cpu_adam", return_value=cpu_adam),
        mock.patch.object(
            DeepSpeedConfig,
            "overlay",
            lambda *given: overlay(*given) | {"zero_force_ds_cpu_optimizer": False},
        ),
    ):
        engines = engine.start_engines(
            {"generator": network()},
            optimizer=optimizer_section(case),
            ds=config,
            plan=config.batch_plan(world.world_size),
            world=world,
        )
    return engines.by_name["generator"]


def train_engine(case, world):
    """The engine after all steps, and what each step did."""
    from pipeline.engine_stepping import backward, set_learning_rates, step_engine

    config = deepspeed_json(case, world.world_size)
    plan = config.batch_plan(world.world_size)
    linear = nn.functional.linear  # stage 3 replaces it for good
    engine, outcomes = start_engine(case, config, world), []
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    for step, (micro_steps, _) in enumerate(STEPS):
        sequences = MICRO_BATCH * micro_steps * world.world_size
        for micro_step in range(micro_steps):
            loss = loss_sum(engine, *micro_batch(step, micro_step, world.rank), dtype)
            scale = plan.world_size * plan.gradient_accumulation_steps / sequences
            backward(engine, loss * scale, is_last=micro_step == micro_steps - 1)
        set_learning_rates(engine, optimizer_section(case), 1.0)
        outcomes.append(step_engine(engine))
    nn.functional.linear = linear
    return engine, outcomes


def train_plain(case, ranks):
    """Weights after all steps, and the norm of each step, None where it was left out."""
    module = network()
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    masters = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.to(dtype)
    adam, norms = PlainAdamW(masters, optimizer_section(case), CLIPPING), []
    for step, (micro_steps, is_finite) in enumerate(STEPS):
        if not is_finite:
            norms.append(None)
            continue
        gradients = {name: torch.zeros_like(w) for name, w in masters.items()}
        for micro_step in range(micro_steps):
            for rank in range(ranks):
                module.zero_grad()
                loss = loss_sum(module, *micro_batch(step, micro_step, rank), dtype)
                # DeepSpeed's two factors, so that bf16 rounds the same numbers.
                (loss * (1 / (MICRO_BATCH * micro_steps))).backward()
                for name, parameter in module.named_parameters():
                    gradients[name] += parameter.grad.float() / ranks
        norms.append(adam.step(gradients, dict.fromkeys(masters, RATE)))
        for name, parameter in module.named_parameters():
            parameter.data.copy_(masters[name])
    return masters, norms


def compare(case, world):
    """Largest difference of a weight, of a norm (relative), and Adam's counter."""
    from pipeline.engine_state import WEIGHT, local_slices, scalar_state

    engine, outcomes = train_engine(case, world)
    weights, norms = train_plain(case, world.world_size)
    assert [outcome.applied for outcome in outcomes] == [norm is not None for norm in norms], (
        outcomes
    )
    errors = [0.0]
    for part in local_slices(engine, world.rank):
        ours = part.tensors[WEIGHT]
        theirs = weights[part.name].flatten()[part.start : part.start + ours.numel()]
        errors.append(float((ours - theirs).abs().max()))
    return {
        "weight": max(errors),
        "norm": max(
            abs(ours.grad_norm - theirs) / theirs
            for ours, theirs in zip(outcomes, norms, strict=True)
            if theirs is not None
        ),
        "adam_step": scalar_state(engine)["adam_step"],
        "optimizer": type(engine.optimizer).__name__,
    }


def main(folder):
    import deepspeed  # noqa: F401  before the world: it looks for the launcher itself
    import torch.distributed as dist

    from pipeline.runtime import World, start_world
    from pipeline.train import leave

    world = World.from_environment()
    start_world(world)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)  # DeepSpeed looks for them
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    seen = {str(case): compare(case, world) for case in CASES}
    (Path(folder) / f"rank-{world.rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
