"""Bytes that DeepSpeed 0.19.8 keeps of one engine on each GPU, and what comes on top at times.

Read from its source, layout by layout (`pipeline.plan.sharding`), and held against the tensors of
real engines by tests. All ranks keep the same, padding included.
"""

from dataclasses import dataclass

from pipeline.plan.parameters import EngineParameters
from pipeline.plan.sharding import FP32_BYTES, Sharding

FLATTENED_ELEMENTS = 500_000_000
"""Elements that DeepSpeed copies into one tensor to reduce them (MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True)
class StateBytes:
    """What one engine keeps on a GPU between two micro steps, and what comes on top at times."""

    weights: int
    masters: int
    moments: int
    sums: int
    """fp32 sums of micro batches' gradients."""
    gradients: int
    """`.grad` of parameters, where it stays between micro steps."""
    gathered: int
    """Whole weights that stage 3 keeps from a forward to its backward pass."""
    buckets: int
    """What gradients are collected in before they are sent, and where they arrive."""
    reduction: int
    """Copies that exist while gradients are reduced."""
    update: int
    """Copies that exist while Adam steps."""
    host: int
    """In CPU memory, where the JSON offloads."""
    frees_sums: bool
    """Whether sums and buckets are gone behind the engine's step, as gradients always are."""


def state_bytes(
    sharding: Sharding, engine: EngineParameters, accumulation_steps: int
) -> StateBytes:
    """Count what DeepSpeed keeps of one engine on each rank.

    Args:
        sharding: Layout and ranks.
        engine: The engine's parameters.
        accumulation_steps: Micro steps of a step.

    Returns:
        Bytes; the same on all ranks, padding included.
    """
    owned = sum(sharding.owned_elements(group) for group in engine.groups)
    offloads = sharding.config.offload_optimizer
    # Where ranks share the state, masters are a copy even of fp32 weights.
    masters = 0 if sharding.layout == "replicated" else FP32_BYTES * owned
    moments = 2 * FP32_BYTES * owned
    kinds = {
        "replicated": _replicated,
        "bf16": _bf16,
        "flat": _flat,
        "parameters": _by_parameter,
    }
    rest = kinds[sharding.layout](sharding, engine, owned, accumulation_steps)
    # Beside the state: fp32 gradients, and the narrow weights on their way back.
    host = masters + moments + (FP32_BYTES + sharding.weight_bytes) * owned if offloads else 0
    return StateBytes(
        masters=0 if offloads else masters,
        moments=0 if offloads else moments,
        host=host,
        frees_sums=sharding.layout in ("replicated", "flat"),
        gathered=_gathered(sharding, engine),
        **rest,
    )


def _gathered(sharding: Sharding, engine: EngineParameters) -> int:
    """All that one micro step has gathered, as far as DeepSpeed keeps it for the backward pass."""
    if sharding.layout != "parameters" or sharding.world_size == 1:
        return 0
    zero = sharding.config.settings.zero_optimization
    small = sum(parameter.elements for parameter in sharding.persistent(engine))
    reach = max(zero.stage3_max_reuse_distance, zero.stage3_prefetch_bucket_size)
    return sharding.weight_bytes * min(engine.elements - small, max(reach // 2, 1))


def _bucket_element_bytes(sharding: Sharding, single: int, several: int) -> int:
    """Bytes of an element in all buckets: under autocast there is one for each type to send."""
    return several if sharding.config.precision == "autocast" else single


def _flattened(elements: list[int]) -> int:
    """Largest number of elements that DeepSpeed copies into one tensor to reduce them."""
    largest = bucket = count = 0
    for size in elements:
        bucket, count = bucket + size, count + 1
        if bucket > FLATTENED_ELEMENTS:
            largest = max(largest, bucket if count > 1 else 0)
            bucket = count = 0
    return max(largest, bucket if count > 1 else 0)


def _replicated(
    sharding: Sharding, engine: EngineParameters, owned: int, _accumulation_steps: int
) -> dict[str, int]:
    """Stage 0."""
    copied = _flattened([parameter.elements for parameter in engine.ordered])
    # With a narrower type to send, the copy is made again in that type.
    sent = sharding.gradient_bytes if sharding.gradient_bytes != FP32_BYTES else 0
    return {
        "weights": FP32_BYTES * owned,
        "sums": 0,
        "gradients": FP32_BYTES * owned,
        "buckets": 0,
        "reduction": (FP32_BYTES + sent) * copied,
        "update": 0,
    }


def _bf16(
    sharding: Sharding, engine: EngineParameters, _owned: int, _accumulation_steps: int
) -> dict[str, int]:
    """Stage 1 with bf16 weights and fp32 sums."""
    groups = [sharding.padded_elements(group) for group in engine.groups]
    padded = sum(groups)
    sent = sharding.gradient_bytes if sharding.gradient_bytes != FP32_BYTES else 0
    largest = max(groups)
    return {
        "weights": sharding.weight_bytes * padded,
        "sums": FP32_BYTES * padded,
        "gradients": sharding.weight_bytes * engine.elements,
        "buckets": 0,
        "reduction": max(FP32_BYTES * _flattened(groups) + sent * padded, sent * largest),
        "update": 0,
    }


def _flat(
    sharding: Sharding, engine: EngineParameters, owned: int, accumulation_steps: int
) -> dict[str, int]:
    """Stages 1 and 2 otherwise."""
    zero = sharding.config.settings.zero_optimization
    padded = sum(sharding.padded_elements(group) for group in engine.groups)
    largest = max(parameter.elements for parameter in engine.ordered)
    is_wide = sharding.sum_bytes != sharding.weight_bytes
    # fp32 sums of narrow gradients are one flat tensor; else they are whole parameters.
    part = FP32_BYTES * owned if is_wide else sharding.weight_bytes * sharding.touched(engine)
    copied = 0 if is_wide else FP32_BYTES * max(map(sharding.owned_elements, engine.groups))
    offload_buffer = sharding.weight_bytes * largest if sharding.config.offload_optimizer else 0
    whole = sharding.stage == 1
    buffers = 2 if sharding.overlaps_communication else 1
    bucket_bytes = sharding.sum_bytes if whole else sharding.weight_bytes
    bucket = min(zero.reduce_bucket_size, engine.elements)
    bucket_bytes = _bucket_element_bytes(sharding, bucket_bytes, 2 * FP32_BYTES)
    arriving = part if accumulation_steps > 1 and not is_wide and not whole else 0
    return {
        "weights": sharding.weight_bytes * padded + offload_buffer,
        # Stage 1 has whole gradients until the last micro step reduces them. Stage 2 adds what a
        # micro step has reduced to what is there.
        "sums": 0 if whole else part,
        "gradients": sharding.sum_bytes * engine.elements if whole else 0,
        "buckets": arriving
        + bucket_bytes * buffers * zero.reduce_bucket_size * zero.contiguous_gradients,
        "reduction": bucket_bytes * max(bucket, largest) + (part if whole else 0),
        "update": copied + (part if whole else 0),
    }


def _by_parameter(
    sharding: Sharding, engine: EngineParameters, owned: int, _accumulation_steps: int
) -> dict[str, int]:
    """Stage 3."""
    zero = sharding.config.settings.zero_optimization
    small = 0
    if sharding.world_size > 1:  # one rank's parts are whole parameters
        small = sum(parameter.elements for parameter in sharding.persistent(engine))
    parts = 0 if sharding.offloads_parameters else owned
    bucket = min(zero.reduce_bucket_size, engine.elements)
    largest = max(parameter.elements for parameter in engine.ordered)
    buffer = zero.reduce_bucket_size if zero.contiguous_gradients else 0
    offloads = sharding.config.offload_optimizer
    several = FP32_BYTES + sharding.weight_bytes // 2
    return {
        "weights": sharding.weight_bytes * (parts + small),
        "sums": 0 if offloads else sharding.sum_bytes * owned,
        "gradients": 0,
        "buckets": _bucket_element_bytes(sharding, sharding.gradient_bytes, several) * buffer,
        "reduction": sharding.gradient_bytes * max(bucket, largest),
        "update": 0 if offloads else FP32_BYTES * owned,
    }
