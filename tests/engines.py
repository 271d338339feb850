"""Real DeepSpeed engines in the test's own process, for tests that look inside of a step.

A process can start one world only: take it from the fixture `world`.
"""

from dataclasses import dataclass

import pytest
import torch

from pipeline.config import ObjectiveSection, OptimizerSection
from pipeline.counter_rng import sample_words
from pipeline.data import SequenceBatch
from pipeline.ds_config import BatchPlan, check_deepspeed_config
from pipeline.engine import Engines, start_engines
from pipeline.step import LearningRates, ObjectiveKeys, RTDStep, StepResult
from tests.reference import small_networks

LAUNCHER = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
LENGTH = 12
RATES = LearningRates(1e-3, 1e-3)


def deepspeed_config(stage=1, precision="fp32", micro=4, train_batch_size=8, clipping=1.0):
    """A checked DeepSpeed JSON for one rank."""
    document = {
        "train_batch_size": train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": clipping,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
    }
    if precision == "bf16":
        document["data_types"] = {"grad_accum_dtype": "fp32"}
    return check_deepspeed_config(document, "test.json")


@dataclass
class Rig:
    """Both networks under DeepSpeed, and the step that trains them."""

    engines: Engines
    plan: BatchPlan
    keys: ObjectiveKeys
    step: RTDStep

    def run(self, step, rates=RATES) -> StepResult:
        """Train on the samples of a step."""
        return self.step(step, sequence_batches(step, self.plan), rates)

    def weights(self, network) -> dict[str, torch.Tensor]:
        """Copies of a network's parameters, as the engine holds them between steps."""
        engine = getattr(self.engines, network)
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def small_pair(**changes):
    """A generator and a discriminator of two layers, every weight random."""
    return small_networks.generator(layers=2, **changes), small_networks.discriminator(
        layers=2, **changes
    )


def rig(world, *, objective=None, networks=None, optimizer=None, **deepspeed) -> Rig:
    """Start engines around two small networks; `networks` replaces them, the rest are settings."""
    generator, discriminator = networks or small_pair()
    config = deepspeed_config(**deepspeed)
    plan = config.batch_plan(1)
    section = OptimizerSection(
        generator_learning_rate=1e-3, discriminator_learning_rate=1e-3, **(optimizer or {})
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHER.items():  # DeepSpeed looks for them
            patch.setenv(name, value)
        # Stage 3 replaces it for good, with one that rounds bf16 differently: not for other tests.
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        engines = start_engines(
            generator, discriminator, optimizer=section, ds=config, plan=plan, world=world
        )
    objective = objective or ObjectiveSection()
    keys = ObjectiveKeys(objective, 3, LENGTH, small_networks.MASK_ID, "train")
    step = RTDStep(engines, objective, keys, seed=3, plan=plan, world=world)
    return Rig(engines, plan, keys, step)


def sequence_batches(step, plan) -> list[SequenceBatch]:
    """The micro batches of a step, sequences of two lengths, each a function of its number."""
    first = step * plan.train_batch_size
    micro = plan.train_micro_batch_size_per_gpu
    return [
        sequence_batch(range(start, start + micro))
        for start in range(first, first + plan.train_batch_size, micro)
    ]


def sequence_batch(samples) -> SequenceBatch:
    """Sequences by their numbers; every third is short."""
    ids = torch.zeros(len(samples), LENGTH, dtype=torch.int64)
    lengths = torch.tensor([LENGTH - 4 if s % 3 == 1 else LENGTH for s in samples])
    for row, sample in enumerate(samples):
        length = int(lengths[row])
        generator = torch.Generator().manual_seed(sample)
        ids[row, :length] = torch.randint(4, small_networks.MASK_ID, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 1, 2
    words = torch.tensor([sample_words(0, sample) for sample in samples])
    return SequenceBatch(ids, lengths, words, is_full=bool((lengths == LENGTH).all()))
