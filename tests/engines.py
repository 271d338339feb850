"""Real DeepSpeed engines in the test's own process, for tests that look inside of a step.

A process can start one world only: take it from the fixture `world`.
"""

from dataclasses import dataclass

import pytest
import torch

from pipeline.config import ObjectiveSection, OptimizerSection, RunConfig, ScheduleSection
from pipeline.counter_rng import sample_words
from pipeline.ds_config import BatchPlan, check_deepspeed_config
from pipeline.engine import Engines, start_engines
from pipeline.masking import MaskingVocabulary
from pipeline.modeling.pair import NetworkPair
from pipeline.objective_keys import ObjectiveKeys
from pipeline.sequences import SequenceBatch
from pipeline.step import build_step
from pipeline.training_step import StepHooks, StepResult, TrainingStep
from tests.reference import small_networks

LAUNCHER = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
LENGTH = 12
RATE = 1e-3
NO_HOOKS = StepHooks()
SUMMED_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
PRECISION_BLOCKS = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}, **SUMMED_IN_FP32},
    "fp16": {
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8},
        **SUMMED_IN_FP32,
    },
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
VOCABULARY = MaskingVocabulary(small_networks.MASK_ID)


def deepspeed_config(stage=1, precision="fp32", micro=4, train_batch_size=8, clipping=1.0):
    """A checked DeepSpeed JSON for one rank."""
    document = {
        "train_batch_size": train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": clipping,
        **PRECISION_BLOCKS[precision],
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
    }
    return check_deepspeed_config(document, "test.json")


@dataclass
class Rig:
    """The networks under DeepSpeed, and the step that trains them."""

    engines: Engines
    plan: BatchPlan
    keys: ObjectiveKeys
    step: TrainingStep

    def run(self, step, **rates) -> StepResult:
        """Train on the samples of a step; rates by engine replace RATE."""
        return self.step(step, sequence_batches(step, self.plan), self.keys, self.prepare(**rates))

    def prepare(self, **rates):
        """What sets an engine's learning rate before its step."""

        def prepare(name):
            for group in self.engines.by_name[name].optimizer.param_groups:
                group["lr"] = rates.get(name, RATE)

        return prepare

    def module(self, name):
        """The module inside an engine."""
        return self.engines.by_name[name].module

    def weights(self, name) -> dict[str, torch.Tensor]:
        """Copies of an engine's parameters, as it holds them between steps."""
        return {key: p.detach().clone() for key, p in self.module(name).named_parameters()}


def small_config(objective=None, optimizer=None, layers=2, **changes) -> RunConfig:
    """A run of small networks; `changes` are of both networks' sections."""
    objective = objective or ObjectiveSection()
    section = small_networks.network_section(layers, **changes)
    return RunConfig(
        model=small_networks.model_section(),
        generator=section,
        discriminator=section if objective.task == "rtd" else None,
        objective=objective,
        optimizer=OptimizerSection(generator_learning_rate=RATE, **(optimizer or {})),
        schedule=ScheduleSection(max_steps=100, warmup_steps=0),
        data={"sequence_length": LENGTH},
    )


def small_pair(objective=None, config=None, **changes) -> NetworkPair:
    """Networks of two layers, every weight random."""
    pair = NetworkPair(config or small_config(objective, **changes))
    small_networks.scramble(pair.generator, 1)
    if pair.discriminator is not None:
        small_networks.scramble(pair.discriminator, 2)
    return pair


def rig(world, *, objective=None, pair=None, optimizer=None, hooks=NO_HOOKS, **deepspeed) -> Rig:
    """Start engines around small networks; `pair` replaces them, the rest are settings."""
    objective = objective or ObjectiveSection()
    pair = pair or small_pair(objective)
    config = deepspeed_config(**deepspeed)
    plan = config.batch_plan(1)
    section = OptimizerSection(generator_learning_rate=RATE, **(optimizer or {}))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHER.items():  # DeepSpeed looks for them
            patch.setenv(name, value)
        # Stage 3 replaces it for good, with one that rounds bf16 differently: not for other tests.
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        engines = start_engines(
            pair.trained_modules(), optimizer=section, ds=config, plan=plan, world=world
        )
    keys = ObjectiveKeys(objective, 3, LENGTH, VOCABULARY, "train")
    step = build_step(engines, pair, objective, seed=3, plan=plan, world=world, hooks=hooks)
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
