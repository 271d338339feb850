"""One run on one cluster, and the settings that fit it and are fastest by the model.

evaluate     memory, speed, communication and storage of given settings
propose      the same for every micro batch, ZeRO stage and checkpointing that could be chosen
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from data_prep.errors import UserError
from pipeline.config import ModelSection, RunConfig
from pipeline.ds_config import BatchPlan, DeepSpeedConfig, check_deepspeed_config
from pipeline.flops import training_flops_per_token
from pipeline.phases import TrainSchedule, train_schedule
from pipeline.plan.communication import Collective, step_collectives
from pipeline.plan.devices import Cluster
from pipeline.plan.measurements import MeasuredStep, find_measurement, measured_steps
from pipeline.plan.memory import Peak, peak_memory, with_overhead
from pipeline.plan.parameters import EngineParameters, engine_parameters
from pipeline.plan.sharding import Sharding
from pipeline.plan.speed import StepSeconds, micro_step_seconds, step_seconds
from pipeline.plan.storage import Storage, plan_storage

CHECKPOINTING = ("none", "attention", "full")
_LARGEST_MICRO_BATCH = 1024
_STAGE3_BLOCKS = ("stage3_", "zero_hpz", "zero_quantized", "offload_param")
_SAME_SPEED = 1.01
_WORTH_SHARDING = 1.05  # what the model does not know of a stage costs more than less than this


@dataclass(frozen=True)
class Plan:
    """One run with one choice of settings."""

    config: RunConfig
    cluster: Cluster
    sharding: Sharding
    batch: BatchPlan
    engines: dict[str, EngineParameters]
    peak: Peak
    step: StepSeconds
    """Of the run's last phase."""
    collectives: list[Collective]
    schedule: TrainSchedule
    run_seconds: float
    """All steps; without start, evaluations, commits and failures."""
    storage: Storage
    measurement: MeasuredStep | None
    """What the speed comes from; None where it is modelled."""

    @property
    def fits(self) -> bool:
        """Whether a GPU has room."""
        return self.peak.total <= self.cluster.gpu.memory_bytes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step of the last phase."""
        return self.batch.train_batch_size * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens_per_step / self.step.total

    @property
    def flops_per_token(self) -> float:
        """Of the minimal exact algorithm."""
        return training_flops_per_token(self.config)

    @property
    def mfu(self) -> float:
        """Share of the GPUs' dense bf16 rate."""
        peak = self.cluster.gpu.bf16_flops * self.cluster.num_gpus
        return self.tokens_per_second * self.flops_per_token / peak

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours."""
        return self.run_seconds * self.cluster.num_gpus / 3600

    @property
    def settings(self) -> str:
        """The choice in words."""
        return (
            f"micro batch {self.batch.train_micro_batch_size_per_gpu}, ZeRO stage"
            f" {self.sharding.stage}, checkpointing {self.config.model.activation_checkpointing}"
        )


@dataclass(frozen=True)
class Alternative:
    """The best micro batch at one ZeRO stage and checkpointing, and the next one."""

    stage: int
    checkpointing: str
    best: Plan | None
    """None where not even the smallest micro batch fits."""
    too_large: Plan | None
    """The smallest micro batch that does not fit; None where all do."""


def evaluate(
    config: RunConfig,
    deepspeed: DeepSpeedConfig,
    cluster: Cluster,
    measured: list[MeasuredStep] | None = None,
) -> Plan:
    """Work out one choice of settings.

    Args:
        config: The run.
        deepspeed: The DeepSpeed JSON.
        cluster: The GPUs; one rank each.
        measured: Measured steps; the package's where not given.

    Returns:
        The plan.

    Raises:
        UserError: The batch, or that of a phase, cannot be split over the GPUs; or the JSON has a
            key whose effect on memory and communication is not known here.
    """
    _require_known(deepspeed)
    batch = deepspeed.batch_plan(cluster.num_gpus)
    sharding = Sharding(deepspeed, cluster.num_gpus)
    engines = engine_parameters(config)
    schedule = train_schedule(config, batch)
    rows = measured_steps() if measured is None else measured
    micro, collectives = batch.train_micro_batch_size_per_gpu, []
    run_seconds, step, found = 0.0, None, None
    for phase in schedule.phases:
        length = phase.sequence_length
        micro_steps = phase.train_batch_size // (micro * cluster.num_gpus)
        found = find_measurement(rows, config, cluster.gpu, micro, length)
        seconds = micro_step_seconds(
            config, cluster.gpu, sharding, micro_batch=micro, length=length
        )
        if found is not None:
            seconds = micro * length / found.tokens_per_second
        collectives = step_collectives(config, sharding, engines, micro_steps)
        step = step_seconds(
            sharding,
            engines,
            cluster,
            micro_seconds=seconds,
            accumulation_steps=micro_steps,
            sent=_sent(collectives, cluster.num_gpus),
        )
        run_seconds += (phase.end_step - phase.first_step) * step.total
    assert step is not None, "a run without a phase"
    peak = peak_memory(
        config,
        sharding,
        engines,
        micro_batch=micro,
        accumulation_steps=batch.gradient_accumulation_steps,
        length=max(config.sequence_lengths),
    )
    return Plan(
        config=config,
        cluster=cluster,
        sharding=sharding,
        batch=batch,
        engines=engines,
        peak=with_overhead(peak, cluster.num_gpus),
        step=step,
        collectives=collectives,
        schedule=schedule,
        run_seconds=run_seconds,
        storage=plan_storage(config, engines, schedule, cluster.num_gpus),
        measurement=found,
    )


def _require_known(deepspeed: DeepSpeedConfig) -> None:
    """Refuse keys whose effect on memory and communication is not known here."""
    zero = deepspeed.settings.zero_optimization
    unknown = {
        "zero_hpz_partition_size": zero.zero_hpz_partition_size > 1,
        "zero_quantized_weights": zero.zero_quantized_weights,
        "zero_quantized_gradients": zero.zero_quantized_gradients,
        "stage3_use_all_reduce_for_fetch_params": zero.stage3_use_all_reduce_for_fetch_params,
    }
    if keys := [key for key, is_used in unknown.items() if is_used]:
        raise UserError(
            f"{deepspeed.path}: zero_optimization.{keys[0]} cannot be planned: what it stores and"
            " sends is not modelled; plan without it"
        )


def _sent(collectives: list[Collective], world_size: int) -> dict[bool, float]:
    """Bytes that a rank sends, by whether DeepSpeed computes meanwhile."""
    sent = {True: 0.0, False: 0.0}
    for each in collectives:
        sent[each.is_overlapped] += each.sent_bytes(world_size)
    return sent


def default_deepspeed(config: RunConfig) -> DeepSpeedConfig:
    """Make the DeepSpeed JSON of a plan that was given none: bf16 at the preset's batch.

    Args:
        config: The run.

    Returns:
        The JSON, checked; its micro batch is 1.

    Raises:
        UserError: The preset does not say how large a batch is.
    """
    reference = config.reference
    if reference.train_batch_size is None:
        raise UserError(
            "the preset has no reference.train_batch_size; give --deepspeed_config JSON, or"
            " reference.train_batch_size=N"
        )
    document = {
        "train_batch_size": reference.train_batch_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": reference.gradient_clipping or 0.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 200_000_000,
            "allgather_bucket_size": 200_000_000,
        },
    }
    return check_deepspeed_config(document, "[reference] of the preset")


def propose(config: RunConfig, deepspeed: DeepSpeedConfig, cluster: Cluster) -> list[Alternative]:
    """Try every micro batch, ZeRO stage and activation checkpointing.

    Args:
        config: The run.
        deepspeed: The DeepSpeed JSON; all but its stage and micro batch is kept.
        cluster: The GPUs.

    Returns:
        One alternative for each stage and checkpointing, stages first.

    Raises:
        UserError: No micro batch divides the batch over the GPUs.
    """
    found = []
    for stage in _stages(deepspeed):
        for checkpointing in CHECKPOINTING:
            changed = _with_model(config, {"activation_checkpointing": checkpointing})
            best, too_large = _best_micro_batch(changed, deepspeed, cluster, stage)
            found.append(Alternative(stage, checkpointing, best, too_large))
    return found


def other_backends(plan: Plan) -> list[Plan]:
    """Try every attention backend and compilation with a plan's stage and checkpointing.

    Args:
        plan: The plan.

    Returns:
        The best plan of each that fits, in the order of the configuration.
    """
    fields = ModelSection.model_fields
    choices = [get_args(fields["attention_backend"].annotation)]
    choices.append(get_args(fields["compile"].annotation) if "compile" in fields else (None,))
    found = []
    for backend, compiles in itertools.product(*choices):
        update = {"attention_backend": backend}
        changed = update if compiles is None else {**update, "compile": compiles}
        config = _with_model(plan.config, changed)
        chosen, stage = plan.sharding.config, plan.sharding.stage
        best, _ = _best_micro_batch(config, chosen, plan.cluster, stage)
        if best is not None:
            found.append(best)
    return found


def _with_model(config: RunConfig, update: dict[str, Any]) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=update)})


def _best_micro_batch(
    config: RunConfig, deepspeed: DeepSpeedConfig, cluster: Cluster, stage: int
) -> tuple[Plan | None, Plan | None]:
    """The micro batch that is fastest, and the smallest one that does not fit."""
    measured, fitting = measured_steps(), []
    for micro_batch in _micro_batches(config, deepspeed, cluster.num_gpus):
        chosen = check_deepspeed_config(
            _with_choice(deepspeed.raw, stage, micro_batch), deepspeed.path
        )
        plan = evaluate(config, chosen, cluster, measured)
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


def fastest(alternatives: list[Alternative]) -> Plan | None:
    """Choose among alternatives.

    Args:
        alternatives: From `propose`.

    Returns:
        The fastest plan that fits, at the lowest stage where that costs less than a twentieth; None
        where nothing fits.
    """
    plans = [each.best for each in alternatives if each.best is not None]
    if not plans:
        return None
    limit = _WORTH_SHARDING * min(plan.run_seconds for plan in plans)
    as_fast = [plan for plan in plans if plan.run_seconds <= limit]
    return min(as_fast, key=lambda plan: (plan.sharding.stage, plan.run_seconds))


def _stages(deepspeed: DeepSpeedConfig) -> Iterator[int]:
    """Stages that the JSON's precision and offloading allow."""
    is_low = deepspeed.precision in ("bf16", "fp16")
    yield from range(1 if is_low or deepspeed.offload_optimizer else 0, 4)


def _micro_batches(config: RunConfig, deepspeed: DeepSpeedConfig, num_gpus: int) -> list[int]:
    """Micro batches that divide the batches of all phases, smallest first."""
    batch = deepspeed.train_batch_size
    if batch % num_gpus:
        # Its message names the numbers of GPUs and the batches that fit.
        smallest = {**deepspeed.raw, "train_micro_batch_size_per_gpu": 1}
        check_deepspeed_config(smallest, deepspeed.path).batch_plan(num_gpus)
    phases = [phase.train_batch_size or batch for phase in config.schedule.phases]
    each = math.gcd(batch, *phases) // num_gpus
    # Where a phase's batch is too small for the GPUs, evaluating 1 says so.
    return [n for n in range(1, min(each, _LARGEST_MICRO_BATCH) + 1) if each % n == 0] or [1]


def _with_choice(document: dict[str, Any], stage: int, micro_batch: int) -> dict[str, Any]:
    """The JSON with another stage and micro batch, without keys that the stage does not have."""
    chosen = copy.deepcopy(document)
    chosen["train_micro_batch_size_per_gpu"] = micro_batch
    zero = chosen["zero_optimization"]
    if stage != 3:
        zero = {key: zero[key] for key in zero if not key.startswith(_STAGE3_BLOCKS)}
    chosen["zero_optimization"] = {**zero, "stage": stage}
    return chosen
