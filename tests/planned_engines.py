"""Small engines whose memory and communication a plan must tell, and what they keep and send.

POINTS         preset, words and DeepSpeed JSON of each
train_point    two steps of one of them in this process's world
assert_kept    holds what was kept against the plan
"""

import contextlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.ds_config import DeepSpeedConfig, check_deepspeed_config
from pipeline.plan.parameters import engine_parameters
from pipeline.plan.sharding import Sharding
from pipeline.plan.zero_memory import state_bytes
from tests import engines

RANKS, MICRO_BATCH, BATCH, LENGTH = 2, 2, 8, engines.LENGTH
SMALL = (
    f"data.sequence_length={LENGTH}",
    "schedule.phases=[]",
    "model.vocab_size=701",  # odd, as are some of the sizes below: padding must be counted
    "generator.hidden_size=40",
    "generator.num_attention_heads=2",
    "generator.intermediate_size=77",
    "generator.num_hidden_layers=2",
    "generator.max_position_embeddings=16",
)
POSITIONS = ("generator.position_buckets=6",)
LIKE_GENERATOR = tuple(
    word.replace("generator", "discriminator") for word in (*SMALL[3:], *POSITIONS)
)
RTD = (*SMALL, *POSITIONS, *LIKE_GENERATOR)
MLM = (*SMALL, *POSITIONS)
NARROW = ("generator.embedding_size=24", "discriminator.embedding_size=24")
ELECTRA = (*SMALL, *LIKE_GENERATOR[:-1], *NARROW)
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
FP32 = {"bf16": {"enabled": False}}
SENT_IN_FP32 = {**BF16, "communication_data_type": "fp32"}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

REDUCES = {"use_multi_rank_bucket_allreduce": False}
ROUND_ROBIN = {"round_robin_gradients": True}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A block of a JSON: small buckets, so that there are several."""
    buckets = {"reduce_bucket_size": 30_000, "allgather_bucket_size": 30_000}
    # As in a large model, what is small is a small share; the default would keep everything whole.
    small = {"stage3_param_persistence_threshold": 150} if stage == 3 else {}
    return {"stage": stage, **buckets, **small, **more}


def reach(elements: int) -> dict[str, int]:
    """How far stage 3 looks back and ahead."""
    kept = {"stage3_max_reuse_distance": elements, "stage3_max_live_parameters": elements}
    return {**kept, "stage3_prefetch_bucket_size": 1_900}


# Name -> preset, words, DeepSpeed JSON without its batch. Autocast is last: DeepSpeed remembers in
# the process that it was on.
POINTS = {
    "large, stage 0": ("deberta_v3_large", RTD, FP32, {"stage": 0}),
    "large, stage 1, fp32": ("deberta_v3_large", RTD, FP32, zero(1)),
    "large, stage 1": ("deberta_v3_large", RTD, BF16, zero(1)),
    "large, stage 2, fp32": ("deberta_v3_large", RTD, FP32, zero(2)),
    "large, stage 2": ("deberta_v3_large", RTD, BF16, zero(2, overlap_comm=True)),
    "base, stage 2, reduce": ("deberta_v3_base", RTD, BF16, zero(2, **REDUCES)),
    "base, stage 2, round robin": ("deberta_v3_base", RTD, BF16, zero(2, **ROUND_ROBIN)),
    "small, stage 2, aligned": ("deberta_v3_small", RTD, BF16, zero(2, parameter_alignment=True)),
    "large, stage 3": ("deberta_v3_large", RTD, BF16, zero(3)),
    "v2, stage 3": ("deberta_v2_xlarge", MLM, BF16, zero(3)),
    # Far below the models: what DeepSpeed gathers again in the backward pass.
    "large, stage 3, nothing stays": ("deberta_v3_large", RTD, BF16, zero(3, **reach(20_000))),
    "large, stage 3, half stays": ("deberta_v3_large", RTD, BF16, zero(3, **reach(38_000))),
    "v2, stage 3, nothing stays": ("deberta_v2_xlarge", MLM, BF16, zero(3, **reach(5_000))),
    "v2, stage 1": ("deberta_v2_xlarge", MLM, BF16, {"stage": 1}),
    "bert, stage 2": ("bert_base", SMALL, BF16, zero(2)),
    "electra, stage 1": ("electra_base", ELECTRA, BF16, {"stage": 1}),
    "electra, stage 3": ("electra_base", ELECTRA, BF16, zero(3)),
    "xsmall, fp32 sent": ("deberta_v3_xsmall", RTD, SENT_IN_FP32, {"stage": 1}),
    "xsmall, stage 2, autocast": ("deberta_v3_xsmall", RTD, AUTOCAST, zero(2)),
    "xsmall, stage 3, autocast": ("deberta_v3_xsmall", RTD, AUTOCAST, zero(3)),
}


def point(name: str, ranks: int = RANKS) -> tuple[RunConfig, DeepSpeedConfig]:
    """The run and the DeepSpeed JSON of a point."""
    preset, words, precision, block = POINTS[name]
    document = {
        "train_batch_size": BATCH * ranks // RANKS,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": block,
        **precision,
    }
    return load_run_config(preset, words), check_deepspeed_config(document, name)


class SentBytes(TorchDispatchMode):
    """Adds up what collectives were given: the whole tensor, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            self.bytes[function.overloadpacket.__name__] += max(
                (each.nbytes for each in tensors), default=0
            )
        return function(*args, **(kwargs or {}))


def storages(*groups) -> dict[int, int]:
    """Storage -> bytes of some tensors, each once."""
    tensors = [each for group in groups for each in group if isinstance(each, torch.Tensor)]
    found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return {place: count for place, count in found.items() if count}


class Kept:
    """What an engine keeps, by the names of `StateBytes`; call `watch` before a step."""

    def __init__(self, engine):
        self._engine = engine
        self.parts = {"buckets": 0}

    def watch(self):
        """Look into the buckets each time before they are released."""
        zero = self._engine.optimizer
        if not hasattr(zero, "_release_ipg_buffers"):
            return
        release = zero._release_ipg_buffers

        def look():
            found = sum(sum(storages(b.buffer).values()) for b in zero.ipg_buckets.values())
            self.parts["buckets"] = max(self.parts["buckets"], found)
            release()

        zero._release_ipg_buffers = look

    def between_micro_steps(self):
        """Look for gradients that wait for those of the next micro step."""
        parameters = list(self._engine.module.parameters())
        waiting = [getattr(each, "grad_accum", None) for each in parameters]
        self.parts["gradients"] = sum(storages([p.grad for p in parameters], waiting).values())

    def before_update(self):
        """Look between the last backward pass and the optimizer's step."""
        zero = self._engine.optimizer
        sums = storages(
            getattr(zero, "fp32_groups_gradients_flat", []),
            [getattr(zero, "grad_partitions_flat_buffer", None)],
            *(
                [getattr(group, "flat_partition", None), *(group or [])]
                for group in getattr(zero, "averaged_gradients", {}).values()
            ),
        )
        self.parts["sums"] = sum(sums.values())
        if not hasattr(zero, "_release_ipg_buffers"):
            buckets = getattr(zero, "ipg_buckets", {}).values()
            self.parts["buckets"] = sum(storages([each.buffer for each in buckets]).values())

    def after_step(self):
        """Look at what is left between two steps."""
        from pipeline.engine_state import _flat_partitions, inner_optimizer

        parameters = list(self._engine.module.parameters())
        weights = storages(parameters, [getattr(each, "ds_tensor", None) for each in parameters])
        flats = _flat_partitions(self._engine)
        masters = storages(flats)
        state = inner_optimizer(self._engine).state
        self.parts["weights"] = sum(weights.values())
        self.parts["masters"] = sum(masters[place] for place in masters.keys() - weights.keys())
        self.parts["moments"] = sum(
            state[flat][kind].untyped_storage().nbytes()
            for flat in flats
            for kind in ("exp_avg", "exp_avg_sq")
        )


def train_point(name: str, world, steps: int = 2) -> dict:
    """Train a point's steps on this rank; what the last one sent, and what its engines keep."""
    from pipeline.engine import start_engines
    from pipeline.engine_state import state_bytes as measured_state_bytes
    from pipeline.modeling.pair import NetworkPair
    from pipeline.objective_keys import ObjectiveKeys
    from pipeline.step import build_step
    from pipeline.training_step import StepHooks

    config, deepspeed = point(name, world.world_size)
    plan = deepspeed.batch_plan(world.world_size)
    pair = NetworkPair(config)
    pair.init_weights(1)
    modules = pair.trained_modules()
    started = start_engines(
        modules, optimizer=config.optimizer, ds=deepspeed, plan=plan, world=world
    )
    kept = {each: Kept(engine) for each, engine in started.by_name.items()}

    def mark(phase, _step):
        if phase.endswith(" update"):
            kept[phase.removesuffix(" update")].before_update()
        if phase.endswith(" forward 1"):
            kept[phase.removesuffix(" forward 1")].between_micro_steps()

    vocabulary = engines.VOCABULARY
    if config.objective.whole_word_masking:
        starts = torch.ones(config.model.vocab_size, dtype=torch.bool)
        vocabulary = replace(vocabulary, is_word_start_V=starts)
    keys = ObjectiveKeys(config.objective, 3, LENGTH, vocabulary, "train")
    hooks = StepHooks(mark=mark)
    step = build_step(started, pair, config.objective, seed=3, plan=plan, world=world, hooks=hooks)
    for each in kept.values():
        each.watch()
    sent = SentBytes()
    share = plan.train_batch_size // world.world_size
    for number in range(steps):
        first = number * plan.train_batch_size + world.rank * share
        batches = [
            engines.sequence_batch(range(start, start + MICRO_BATCH))
            for start in range(first, first + share, MICRO_BATCH)
        ]
        with sent if number == steps - 1 else contextlib.nullcontext():
            step(number, batches, keys, lambda _name: None)
    for each in kept.values():
        each.after_step()
    result = {
        "sent": dict(sent.bytes),
        "kept": {each: dict(found.parts) for each, found in kept.items()},
        "state_bytes": {
            each: measured_state_bytes(engine, world.rank)
            for each, engine in started.by_name.items()
        },
    }
    for engine in started.by_name.values():
        engine.destroy()
    return result


def assert_kept(name: str, ranks: int, by_rank: list[dict]) -> None:
    """Hold what the ranks' engines keep against the plan."""
    config, deepspeed = point(name, ranks)
    sharding = Sharding(deepspeed, ranks)
    steps = deepspeed.batch_plan(ranks).gradient_accumulation_steps
    for engine, parameters in engine_parameters(config).items():
        planned = state_bytes(sharding, parameters, steps)
        for rank, found in enumerate(by_rank):
            assert sharding.state_bytes(parameters, rank) == found["state_bytes"][engine]
        most = {
            part: max(found["kept"][engine][part] for found in by_rank)
            for part in by_rank[0]["kept"][engine]
        }
        for part in ("weights", "masters", "moments", "gradients"):
            assert getattr(planned, part) == pytest.approx(most[part], rel=0.01), (engine, part)
        # At stage 1 sums are made from whole gradients in the last micro step alone.
        sums = planned.sums or min(planned.update, most["sums"])
        assert sums == pytest.approx(most["sums"], rel=0.01), engine
        arriving = most["sums"] if planned.buckets > most["buckets"] else 0
        assert planned.buckets == pytest.approx(most["buckets"] + arriving, rel=0.01), engine
