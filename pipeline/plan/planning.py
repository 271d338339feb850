"""One run on one cluster with given settings: memory, speed, communication and storage."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.ds_config import BatchPlan, DeepSpeedConfig
from pipeline.flops import training_flops_per_token
from pipeline.phases import TrainSchedule, train_schedule
from pipeline.plan.communication import Collective, step_collectives
from pipeline.plan.devices import Cluster, Gpu
from pipeline.plan.measurements import (
    PRECISION,
    MeasuredStep,
    find_measurement,
    measured_steps,
)
from pipeline.plan.memory import Peak, peak_memory, with_overhead
from pipeline.plan.parameters import EngineParameters, engine_parameters
from pipeline.plan.sharding import Sharding
from pipeline.plan.speed import StepSeconds, micro_step_seconds, step_seconds
from pipeline.plan.storage import Storage, plan_storage


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
    """What the speed of the last phase comes from; None where it is modelled."""

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
        """Share of the dense rate of the GPUs' tensor cores, whatever the run's precision."""
        peak = self.cluster.gpu.half_flops * self.cluster.num_gpus
        return self.tokens_per_second * self.flops_per_token / peak

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours."""
        return self.run_seconds * self.cluster.num_gpus / 3600

    @property
    def tokens_per_gpu_second(self) -> float:
        """Of one GPU."""
        return self.tokens_per_second / self.cluster.num_gpus

    @property
    def is_measured(self) -> bool:
        """Whether the speed was measured with this micro batch, not only with another one."""
        row = self.measurement
        return row is not None and row.sequences == self.batch.train_micro_batch_size_per_gpu

    @property
    def settings(self) -> str:
        """The choice in words."""
        model = self.config.model
        return (
            f"micro batch {self.batch.train_micro_batch_size_per_gpu}, ZeRO stage"
            f" {self.sharding.stage}, checkpointing {model.activation_checkpointing},"
            f" attention backend {model.attention_backend}, compile {model.compile}"
        )


def evaluate(
    config: RunConfig,
    deepspeed: DeepSpeedConfig,
    cluster: Cluster,
    *,
    engines: dict[str, EngineParameters] | None = None,
    measured: Sequence[MeasuredStep] | None = None,
) -> Plan:
    """Work out one choice of settings.

    Args:
        config: The run.
        deepspeed: The DeepSpeed JSON.
        cluster: The GPUs; one rank each.
        engines: Of the run, where they are known; they do not depend on the other settings.
        measured: Measured steps; the package's where not given.

    Returns:
        The plan.

    Raises:
        UserError: The batch, or that of a phase, cannot be split over the GPUs; the JSON has a key
            whose effect on memory and communication is not known here; or the GPUs cannot compute
            so.
    """
    engines = engine_parameters(config) if engines is None else engines
    _require_known(deepspeed)
    _require_gathered_once(deepspeed, engines)
    _require_capable(config, deepspeed, cluster)
    batch = deepspeed.batch_plan(cluster.num_gpus)
    sharding = Sharding(deepspeed, cluster.num_gpus)
    schedule = train_schedule(config, batch)
    rows = measured_steps() if measured is None else measured
    micro, collectives = batch.train_micro_batch_size_per_gpu, []
    run_seconds, step, found = 0.0, None, None
    for phase in schedule.phases:
        length = phase.sequence_length
        micro_steps = phase.train_batch_size // (micro * cluster.num_gpus)
        seconds, found = _micro_step(config, deepspeed, cluster.gpu, micro, length, rows)
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


def _micro_step(
    config: RunConfig,
    deepspeed: DeepSpeedConfig,
    gpu: Gpu,
    micro_batch: int,
    length: int,
    rows: Sequence[MeasuredStep],
) -> tuple[float, MeasuredStep | None]:
    """Seconds of forward and backward passes, and the measurement that they come from."""
    precision = deepspeed.precision
    seconds = micro_step_seconds(config, gpu, precision, micro_batch=micro_batch, length=length)
    found = None
    if precision == PRECISION:
        found = find_measurement(rows, config, gpu, micro_batch, length)
    if found is None:
        return seconds, None
    # The model knows that small micro batches are slower; the measurement, by how much it is off.
    there = micro_step_seconds(config, gpu, precision, micro_batch=found.sequences, length=length)
    return seconds * found.seconds / there, found


def _require_known(deepspeed: DeepSpeedConfig) -> None:
    """Refuse keys whose effect on memory and communication is not known here."""
    zero = deepspeed.settings.zero_optimization
    unknown = {
        "zero_hpz_partition_size": zero.zero_hpz_partition_size > 1,
        "zero_quantized_weights": zero.zero_quantized_weights,
        "zero_quantized_gradients": zero.zero_quantized_gradients,
        "stage3_use_all_reduce_for_fetch_params": zero.stage3_use_all_reduce_for_fetch_params,
        "stage3_max_reuse_distance=0": zero.stage3_max_reuse_distance == 0,
    }
    if keys := [key for key, is_used in unknown.items() if is_used]:
        raise UserError(
            f"{deepspeed.path}: zero_optimization.{keys[0]} cannot be planned: what it stores and"
            " sends is not modelled; plan without it"
        )


def _require_gathered_once(
    deepspeed: DeepSpeedConfig, engines: dict[str, EngineParameters]
) -> None:
    """Refuse a joint engine at stage 3 whose weights DeepSpeed may gather again.

    Of other engines `pipeline.plan.gathering` counts that; two networks in one engine are gathered
    more often than it says.
    """
    if deepspeed.zero_stage != 3 or "joint" not in engines:
        return
    zero, elements = deepspeed.settings.zero_optimization, engines["joint"].elements
    keys = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
    for key in keys:
        if getattr(zero, key) < elements:
            raise UserError(
                f"{deepspeed.path}: stage 3 cannot be planned for two networks in one engine with"
                f" zero_optimization.{key}={getattr(zero, key)}, below their {elements} parameters:"
                " how often weights are gathered is not known then; plan stage 1 or 2, or a larger"
                f" {key}"
            )


def _require_capable(config: RunConfig, deepspeed: DeepSpeedConfig, cluster: Cluster) -> None:
    """Refuse what GPUs older than Ampere cannot compute."""
    if cluster.gpu.is_ampere:
        return
    where, backend = f"--gpu {cluster.gpu.key}", config.model.attention_backend
    if deepspeed.precision in ("bf16", "autocast"):
        raise UserError(
            f"{where} has no bf16, which {deepspeed.path} asks for; plan with fp16, as in"
            " ds_configs/zero2_fp16.json"
        )
    if backend not in ("eager", "torch"):
        raise UserError(
            f"{where} cannot run model.attention_backend={backend}, which needs Ampere or newer;"
            " plan with model.attention_backend=torch"
        )


def _sent(collectives: list[Collective], world_size: int) -> dict[bool, float]:
    """Bytes that a rank sends, by whether DeepSpeed computes meanwhile."""
    sent = {True: 0.0, False: 0.0}
    for each in collectives:
        sent[each.is_overlapped] += each.sent_bytes(world_size)
    return sent
