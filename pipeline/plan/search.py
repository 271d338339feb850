"""The settings of a run that fit a cluster and are fastest by the model.

A choice is an attention backend and a compilation, a ZeRO stage, an activation checkpointing and a
micro batch. Every choice is worked out; what the configuration itself names of [model] is kept in
the proposal, the rest is free.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.ds_config import DeepSpeedConfig, check_deepspeed_config
from pipeline.plan.activations import FUSED_HEAD_SIZES
from pipeline.plan.devices import Cluster
from pipeline.plan.measurements import measured_steps
from pipeline.plan.parameters import engine_parameters
from pipeline.plan.planning import Plan, evaluate

CHECKPOINTING = ("none", "attention", "full")
CHOSEN_KEYS = ("attention_backend", "compile", "activation_checkpointing")
"""Keys of [model] that change speed and memory, and no number but by rounding."""
WORTH_SHARDING = 1.05
"""What the model does not know of a stage costs more than less than this."""
REFERENCE = "[reference] of the run"
"""Stands for the name of a JSON that was not given."""
_LARGEST_MICRO_BATCH = 1024
_SAME_SPEED = 1.01
_STAGE3_BLOCKS = ("stage3_", "zero_hpz", "zero_quantized", "offload_param")


@dataclass(frozen=True)
class Alternative:
    """The best micro batch of one choice of everything else, and the next one."""

    config: RunConfig
    stage: int
    best: Plan | None
    """None where not even the smallest micro batch fits."""
    too_large: Plan | None
    """The smallest micro batch that does not fit; None where all do."""

    @property
    def way(self) -> tuple[str, str]:
        """Attention backend and compilation."""
        return self.config.model.attention_backend, self.config.model.compile


def named_keys(config: RunConfig) -> list[str]:
    """List the keys of `CHOSEN_KEYS` that the configuration names, in a file or a word.

    Args:
        config: The run.

    Returns:
        Names without their section.
    """
    return [key for key in CHOSEN_KEYS if key in config.model.model_fields_set]


def default_deepspeed(config: RunConfig, cluster: Cluster) -> DeepSpeedConfig:
    """Make the DeepSpeed JSON of a plan that was given none: the preset's batch.

    Args:
        config: The run.
        cluster: The GPUs, for the precision: bf16, or fp16 where they have none.

    Returns:
        The JSON, checked; its micro batch is 1.

    Raises:
        UserError: The preset does not say how large a batch is.
    """
    reference = config.reference
    if reference.train_batch_size is None:
        raise UserError(
            "the configuration has no reference.train_batch_size; give --deepspeed_config JSON, or"
            " reference.train_batch_size=N"
        )
    document = {
        "train_batch_size": reference.train_batch_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": reference.gradient_clipping or 0.0,
        "bf16" if cluster.gpu.is_ampere else "fp16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 200_000_000,
            "allgather_bucket_size": 200_000_000,
        },
    }
    return check_deepspeed_config(document, REFERENCE)


def propose(config: RunConfig, deepspeed: DeepSpeedConfig, cluster: Cluster) -> list[Alternative]:
    """Work out every choice.

    Args:
        config: The run.
        deepspeed: The DeepSpeed JSON; all but its stage and micro batch is kept.
        cluster: The GPUs.

    Returns:
        One alternative for each way to compute attention, stage and checkpointing, in this order.

    Raises:
        UserError: No micro batch divides the batch over the GPUs.
    """
    micro_batches = _micro_batches(config, deepspeed, cluster)
    jsons = {
        stage: [_with_choice(deepspeed, stage, micro) for micro in micro_batches]
        for stage in _stages(config, deepspeed)
    }
    found = []
    for (backend, compiles), stage, kind in itertools.product(
        _ways(config, cluster), jsons, CHECKPOINTING
    ):
        chosen = dict(zip(CHOSEN_KEYS, (backend, compiles, kind), strict=True))
        model = config.model.model_copy(update={**chosen})
        changed = config.model_copy(update={"model": model})
        best, too_large = _best_micro_batch(changed, jsons[stage], cluster)
        found.append(Alternative(changed, stage, best, too_large))
    return found


def _ways(config: RunConfig, cluster: Cluster) -> list[tuple[str, str]]:
    """Attention backends that could be fastest, and the configuration's, with each compilation."""
    sizes = {network.attention_head_size for network in config.networks.values()}
    serves = cluster.gpu.is_ampere and bool(sizes & {*FUSED_HEAD_SIZES})
    backends = ("triton", "torch") if serves else ("torch",)
    backends = dict.fromkeys([*backends, config.model.attention_backend])
    return [*itertools.product(backends, ("layer", "none"))]


def _best_micro_batch(
    config: RunConfig, jsons: Sequence[DeepSpeedConfig], cluster: Cluster
) -> tuple[Plan | None, Plan | None]:
    """The micro batch that is fastest, and the smallest one that does not fit."""
    measured, engines, fitting = measured_steps(), engine_parameters(config), []
    for deepspeed in jsons:
        plan = evaluate(config, deepspeed, cluster, engines=engines, measured=measured)
        if not plan.fits:
            return _leanest(fitting), plan
        fitting.append(plan)
    return _leanest(fitting), None


def _leanest(plans: list[Plan]) -> Plan | None:
    """Of the fastest plans that with least memory."""
    if not plans:
        return None
    limit = _SAME_SPEED * min(plan.run_seconds for plan in plans)
    as_fast = [plan for plan in plans if plan.run_seconds <= limit]
    return min(as_fast, key=lambda plan: plan.peak.total)


def fastest(alternatives: Sequence[Alternative], config: RunConfig | None = None) -> Plan | None:
    """Choose among alternatives.

    Args:
        alternatives: From `propose`.
        config: The run whose named keys bind; None where nothing does.

    Returns:
        The fastest plan that fits, at the lowest stage where that costs less than a twentieth; None
        where nothing fits.
    """
    bound = {} if config is None else {k: getattr(config.model, k) for k in named_keys(config)}
    plans = [
        each.best
        for each in alternatives
        if each.best is not None
        and all(getattr(each.config.model, key) == value for key, value in bound.items())
    ]
    if not plans:
        return None
    limit = WORTH_SHARDING * min(plan.run_seconds for plan in plans)
    as_fast = [plan for plan in plans if plan.run_seconds <= limit]
    return min(as_fast, key=lambda plan: (plan.sharding.stage, plan.run_seconds))


def _stages(config: RunConfig, deepspeed: DeepSpeedConfig) -> range:
    """Stages that the JSON's precision and offloading allow, and that can be planned."""
    is_low = deepspeed.precision in ("bf16", "fp16")
    # Two networks in one engine at stage 3 are planned only where a JSON asks for it.
    is_joint = "joint" in engine_parameters(config) and deepspeed.zero_stage != 3
    return range(1 if is_low or deepspeed.offload_optimizer else 0, 3 if is_joint else 4)


def _micro_batches(config: RunConfig, deepspeed: DeepSpeedConfig, cluster: Cluster) -> list[int]:
    """Micro batches that divide the batches of all phases, smallest first."""
    batch, gpus = deepspeed.train_batch_size, cluster.num_gpus
    if batch % gpus:
        above = batch + gpus - batch % gpus
        cure = f"train_batch_size {above} in the JSON"
        if deepspeed.path == REFERENCE:
            cure = f"reference.train_batch_size={above}"
        raise UserError(
            f"{deepspeed.path}: train_batch_size {batch} cannot be split over {gpus} GPUs; take"
            f" --gpus {_nearest_counts(batch, cluster)}, or {cure}"
        )
    phases = [phase.train_batch_size or batch for phase in config.schedule.phases]
    each = math.gcd(batch, *phases) // gpus
    # Where a phase's batch is too small for the GPUs, evaluating 1 says so.
    return [n for n in range(1, min(each, _LARGEST_MICRO_BATCH) + 1) if each % n == 0] or [1]


def _nearest_counts(batch: int, cluster: Cluster) -> str:
    """Numbers of GPUs in full nodes that divide a batch: the next lower one and the next higher."""
    node, wanted = 1 if cluster.num_nodes == 1 else cluster.gpus_per_node, cluster.num_gpus
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and (n < node or n % node == 0)]
    near = [*[n for n in fitting if n < wanted][-1:], *[n for n in fitting if n > wanted][:1]]
    return " or ".join(map(str, near))


def _with_choice(deepspeed: DeepSpeedConfig, stage: int, micro_batch: int) -> DeepSpeedConfig:
    """The JSON with another stage and micro batch, without keys that the stage does not have."""
    chosen = copy.deepcopy(deepspeed.raw)
    chosen["train_micro_batch_size_per_gpu"] = micro_batch
    zero = chosen["zero_optimization"]
    if stage != 3:
        zero = {key: zero[key] for key in zero if not key.startswith(_STAGE3_BLOCKS)}
    if deepspeed.path == REFERENCE and stage > 1:
        zero["overlap_comm"] = True
    chosen["zero_optimization"] = {**zero, "stage": stage}
    return check_deepspeed_config(chosen, deepspeed.path)
