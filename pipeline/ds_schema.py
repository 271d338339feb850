"""The DeepSpeed JSON that this program accepts: names, types and bounds, as of DeepSpeed 0.19.8.

DeepSpeed ignores top-level keys that it does not know and fills in what is missing, so the keys
are decided here, one by one: `DeepSpeedJson` and its blocks hold what may be written, `REFUSED`
names what DeepSpeed would read but this program does not allow, each with the cure. A test asks
DeepSpeed itself for the complete list. Rules that join several keys are in `pipeline.ds_config`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    """Let 5e8 stand for 500000000, as DeepSpeed's documentation writes element counts."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


PositiveInt = Annotated[int, Field(gt=0)]
Elements = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Norm = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Dtype = Literal["fp32", "bf16", "fp16"]


class Block(BaseModel):
    """Base of all blocks: strict types, no unknown names, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Bf16(Block):
    """bf16 weights with fp32 master copies."""

    enabled: bool
    immediate_grad_update: bool = False


class Fp16(Block):
    """fp16 weights with fp32 master copies and loss scaling (0 = dynamic)."""

    enabled: bool
    loss_scale: Norm = 0.0
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    loss_scale_window: PositiveInt = 1000
    hysteresis: PositiveInt = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: PositiveInt = 1


class TorchAutocast(Block):
    """fp32 weights; matrix products in bf16. fp16 has a block of its own."""

    enabled: bool
    dtype: Literal["bfloat16", "bf16"] | None = None
    lower_precision_safe_modules: list[str] | None = None


class DataTypes(Block):
    """In which type the gradients of micro batches are added up."""

    grad_accum_dtype: Dtype


class OffloadOptimizer(Block):
    """Optimizer state and step in CPU memory."""

    device: Literal["none", "cpu"]
    pin_memory: bool = True


class OffloadParam(Block):
    """Weights in CPU memory (stage 3)."""

    device: Literal["none", "cpu"]
    pin_memory: bool = True
    buffer_count: PositiveInt = 5
    buffer_size: Elements = 100_000_000
    max_in_cpu: Elements = 1_000_000_000


class ZeroOptimization(Block):
    """What the ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""

    stage: Annotated[int, Field(ge=0, le=3)]
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[int, BeforeValidator(_whole), Field(gt=0)] = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Elements = 500_000_000
    overlap_comm: bool | None = None
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    offload_optimizer: OffloadOptimizer | None = None
    offload_param: OffloadParam | None = None
    sub_group_size: Elements = 1_000_000_000
    stage3_prefetch_bucket_size: Elements = 50_000_000
    stage3_param_persistence_threshold: Elements = 100_000
    stage3_model_persistence_threshold: Elements | None = None
    stage3_max_live_parameters: Elements = 1_000_000_000
    stage3_max_reuse_distance: Elements = 1_000_000_000
    stage3_module_granularity_threshold: Elements = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    zero_hpz_partition_size: PositiveInt = 1
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


class FlopsProfiler(Block):
    """DeepSpeed's profile of one step, for people who tune."""

    enabled: bool
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None
    recompute_fwd_factor: Norm = 0.0


class CommsLogger(Block):
    """DeepSpeed's log of collectives, for people who tune."""

    enabled: bool
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class DeepSpeedJson(Block):
    """The file as a whole. Batch, clipping, precision and ZeRO stage have no silent default."""

    train_batch_size: PositiveInt
    train_micro_batch_size_per_gpu: PositiveInt
    gradient_clipping: Norm
    zero_optimization: ZeroOptimization
    bf16: Bf16 | None = None
    fp16: Fp16 | None = None
    torch_autocast: TorchAutocast | None = None
    data_types: DataTypes | None = None
    communication_data_type: Dtype | None = None
    steps_per_print: PositiveInt | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: str | None = None
    flops_profiler: FlopsProfiler | None = None
    comms_logger: CommsLogger | None = None


_OWNED = "is set by the program, which prints it; remove it"
_LOSS = "would break the program's own division of the losses; remove it"
_METRICS = "remove it: metrics.jsonl and TensorBoard are written by the program, section [logging]"
_ABSENT = "is no part of this program; remove it"
_REMOVED = "was removed from DeepSpeed; remove it"
_DEPRECATED = "is deprecated in DeepSpeed"
_FP32_STATE = "would give up the fp32 master state that checkpoints hold; remove it"

REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "is derived: train_batch_size / (train_micro_batch_size_per_gpu"
    " x world size); remove it",
    "optimizer": "belongs in the run configuration, section [optimizer]; remove it",
    "scheduler": "belongs in the run configuration, section [schedule]; remove it",
    "activation_checkpointing": "belongs in the run configuration: model.activation_checkpointing"
    " = none, attention or full; remove it",
    "checkpoint": _OWNED + " (checkpoints: section [checkpoint] of the run configuration)",
    "zero_allow_untested_optimizer": _OWNED,
    "zero_force_ds_cpu_optimizer": _OWNED,
    "managed_gradient_accumulation": _OWNED,
    "bfloat16": "is the old name; write 'bf16'",
    "prescale_gradients": _LOSS,
    "gradient_predivide_factor": _LOSS,
    "gradient_allreduce_op": _LOSS,
    "tensorboard": _METRICS,
    "wandb": _METRICS,
    "comet": _METRICS,
    "csv_monitor": _METRICS,
    "dataloader_drop_last": "has no effect: sequences come from the program's own data order",
    "data_efficiency": "needs DeepSpeed's data loader, which this program does not use; remove it",
    "compile": "(DeepCompile) is not supported; remove it",
    "disable_allgather": "has no effect in DeepSpeed 0.19.8; remove it",
    "vocabulary_size": "belongs in the run configuration: model.vocab_size; remove it",
    "seq_parallel_communication_data_type": _ABSENT,
    "sequence_parallel_size": _ABSENT,
    "tensor_parallel": _ABSENT,
    "expert_parallel": _ABSENT,
    "use_data_before_expert_parallelism": _ABSENT,
    "pipeline": _ABSENT,
    "hybrid_engine": _ABSENT,
    "autotuning": _ABSENT,
    "weight_quantization": _ABSENT,
    "datastates_ckpt": _ABSENT,
    "timers": _ABSENT,
    "aio": "serves NVMe offload, whose state lies outside the checkpoints; remove it",
    "elasticity": _REMOVED + " and give each world size a JSON of its own, or one batch that all"
    " of them divide",
    "curriculum_learning": _REMOVED,
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "amp": _REMOVED + " and write a bf16, fp16 or torch_autocast block",
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "graph_harvesting": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "bf16.check_grad_overflow": "is always on: steps that are not finite are skipped and counted;"
    " remove it",
    "bf16.bf16_master_weights_and_grads": _FP32_STATE,
    "bf16.bf16_optimizer_states": _FP32_STATE,
    "fp16.auto_cast": "would round the fp32 embeddings that the discriminator takes; remove it",
    "fp16.fp16_master_weights_and_grads": _FP32_STATE,
    "data_types.param_dtype": "repeats the precision block; remove it",
    "data_types.buffer_dtype": _OWNED,
    "data_types.keep_in_fp32_modules": _OWNED,
    "zero_optimization.compute_grad_norm": "is always on, for metrics.jsonl; remove it",
    "zero_optimization.load_from_fp32_weights": _OWNED,
    "zero_optimization.elastic_checkpoint": _OWNED + "; another world size loads by itself",
    "zero_optimization.ignore_unused_parameters": _OWNED + ": no parameter is ever unused",
    "zero_optimization.zenflow": _ABSENT,
    "zero_optimization.leaf_module": _ABSENT,
    "zero_optimization.memory_efficient_linear": _ABSENT,
    "zero_optimization.override_module_apply": _ABSENT,
    "zero_optimization.pipeline_loading_checkpoint": _ABSENT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _ABSENT,
    "zero_optimization.zero_quantized_nontrainable_weights": _ABSENT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "has no effect: `deberta export`"
    " gathers the weights; remove it",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "has no effect: `deberta export`"
    " gathers the weights; remove it",
    "zero_optimization.legacy_stage1": _DEPRECATED + "; remove it",
    "zero_optimization.cpu_offload": _DEPRECATED + '; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": _DEPRECATED
    + '; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": _DEPRECATED
    + "; write pin_memory in the offload block",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
} | {
    f"zero_optimization.{block}.{key}": "serves NVMe or partial offload, which is not supported;"
    " remove it"
    for block, keys in {
        "offload_optimizer": (
            "nvme_path",
            "buffer_count",
            "pipeline_read",
            "pipeline_write",
            "fast_init",
            "ratio",
            "super_offload",
            "cpuadam_cores_perc",
        ),
        "offload_param": ("nvme_path",),
    }.items()
    for key in keys
}
