"""What a DeepSpeed engine owns on this rank, as named slices; the canonical form of a checkpoint.

Every ZeRO stage keeps fp32 weights and Adam's averages in its own flat layout. Here they all become
slices of parameters: (name, kind, first element, values), which fit any other world size or stage,
because a reader asks for elements of a parameter and not for the flat buffer of a rank. Their files
are those of `pipeline.rank_files`.

    stage 0      parameters and their Adam state are whole on every rank; rank 0 writes them
    stages 1, 2  each rank's part of every group's flat tensor; stage 1 with bf16 by the links that
                 DeepSpeed keeps at each parameter (`_hp_mapping`)
    stage 3      one contiguous run of every parameter a rank
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.rank_files import MOMENTS, WEIGHT, StateReader, slice_metadata, write_tensors

_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class StateSlice(NamedTuple):
    """Consecutive elements of one parameter that this rank is responsible for."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]
    """kind -> flat view into the optimizer's storage; writing to it changes the engine's state."""


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Find the client optimizer behind DeepSpeed's wrapper.

    Args:
        engine: A DeepSpeed engine.

    Returns:
        The optimizer that was handed to it.
    """
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_partitions(engine: Any) -> list[torch.Tensor]:
    """List the fp32 tensors that the inner optimizer updates on this rank."""
    for attribute in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 with bf16 weights and fp32 accumulation
    ):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    return [p for p in engine.module.parameters() if p.requires_grad]


def _ensure_moments(engine: Any) -> None:
    """Create Adam's state where no step has been taken yet, as the optimizer itself would."""
    inner = inner_optimizer(engine)
    on_device = any(g.get("fused") or g.get("capturable") for g in inner.param_groups)
    for flat in _flat_partitions(engine):
        state = inner.state[flat]
        if "exp_avg" in state:
            continue
        # DeepSpeed's CPU Adam counts in a Python int, torch's Adam in a tensor.
        counts_in_int = hasattr(inner, "ds_opt_adam")
        device = flat.device if on_device else torch.device("cpu")
        state["step"] = 0 if counts_in_int else torch.zeros((), device=device)
        state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def local_slices(engine: Any, rank: int) -> Iterator[StateSlice]:
    """List the state that this rank writes and reads.

    Args:
        engine: A DeepSpeed engine at a step boundary.
        rank: This process's data-parallel rank.

    Yields:
        Slices in parameter order; over all ranks they cover every element exactly once.
    """
    _ensure_moments(engine)
    inner = inner_optimizer(engine)
    places = _flat_places(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            start = rank * parameter.ds_tensor.ds_numel
            count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
            if count > 0:
                yield StateSlice(name, start, _stage3_tensors(engine, parameter, count))
        elif id(parameter) in places:
            group, offset = places[id(parameter)]
            flat = _flat_partitions(engine)[group]
            begin = rank * flat.numel()
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + flat.numel())
            if first < last:
                tensors = _narrowed(inner, flat, first - begin, last - first)
                yield StateSlice(name, first - offset, tensors)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                # Not by DeepSpeed's own links to Adam's state: with two parameter groups it makes
                # them after the first group's first step, when the second has no state yet.
                flat = _flat_partitions(engine)[mapping.param_group_index]
                address = mapping.hp_fragment_address
                tensors = _narrowed(inner, flat, address.start, address.numel)
                yield StateSlice(name, mapping.lp_fragment_address.start, tensors)
        elif rank == 0:
            state = inner.state[parameter]
            tensors = {kind: state[kind].view(-1) for kind in MOMENTS}
            yield StateSlice(name, 0, {WEIGHT: parameter.data.view(-1), **tensors})


def _flat_places(zero: Any) -> dict[int, tuple[int, int]]:
    """Find where stages 1 and 2 put each parameter: group, and first element in its flat tensor.

    Not by DeepSpeed's own links, which 0.19.8 makes as if `round_robin_gradients` were off: with it
    a name would get another parameter's values.
    """
    if not hasattr(zero, "round_robin_bit16_groups"):
        return {}
    groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
    return {
        id(parameter): (group, offset)
        for group, (parameters, offsets) in enumerate(groups)
        for parameter, offset in zip(parameters, offsets, strict=True)
    }


def _stage3_tensors(engine: Any, parameter: Any, count: int) -> dict[str, torch.Tensor]:
    """View one parameter's run in the flat sub-group that holds it, without its padding."""
    zero = engine.optimizer
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    return _narrowed(zero.optimizer, zero.fp32_partitioned_groups_flat[group], offset, count)


def _narrowed(
    inner: torch.optim.Optimizer, flat: torch.Tensor, offset: int, count: int
) -> dict[str, torch.Tensor]:
    """View a run of a flat fp32 tensor and of its averages."""
    sources = {WEIGHT: flat, **{kind: inner.state[flat][kind] for kind in MOMENTS}}
    return {kind: tensor.detach().narrow(0, offset, count) for kind, tensor in sources.items()}


def scalar_state(engine: Any) -> dict[str, Any]:
    """Collect what is not a slice: Adam's step and the loss scaler of fp16.

    Args:
        engine: A DeepSpeed engine at a step boundary.

    Returns:
        JSON-ready values, equal on all ranks.
    """
    _ensure_moments(engine)
    inner = inner_optimizer(engine)
    steps = {int(inner.state[flat]["step"]) for flat in _flat_partitions(engine)}
    assert len(steps) <= 1, f"parameters disagree about Adam's step: {sorted(steps)}"
    scaler = engine.optimizer.loss_scaler if engine.fp16_enabled() else None
    fields = {k: getattr(scaler, k) for k in _LOSS_SCALER_FIELDS if hasattr(scaler, k)}
    return {"adam_step": steps.pop() if steps else 0, "loss_scaler": fields}


class Snapshot(NamedTuple):
    """This rank's slices of one network, copied to host memory: training may go on."""

    tensors: dict[str, torch.Tensor]
    """KIND/PARAMETER -> fp32 [count]."""
    metadata: dict[str, str]
    """What the file says beside them: the first element of every slice."""


def snapshot(engine: Any, rank: int) -> Snapshot:
    """Copy this rank's slices to host memory.

    Args:
        engine: A DeepSpeed engine at a step boundary.
        rank: This process's data-parallel rank.

    Returns:
        Copies that later steps do not change.
    """
    tensors, starts = {}, {}
    for part in local_slices(engine, rank):
        starts[part.name] = part.start
        for kind, values in part.tensors.items():
            tensors[f"{kind}/{part.name}"] = values.detach().to("cpu", copy=True)
    return Snapshot(tensors, slice_metadata(starts))


def write_snapshot(
    taken: Snapshot, file: Path, progress: Callable[[], None] = lambda: None
) -> None:
    """Write a snapshot to one safetensors file.

    Args:
        taken: What `snapshot` returned.
        file: Where to; its folder exists.
        progress: Called again and again while it is written.
    """
    shapes = {key: tuple(values.shape) for key, values in taken.tensors.items()}
    write_tensors(file, taken.metadata, shapes, taken.tensors.__getitem__, progress)


def state_bytes(engine: Any, rank: int) -> int:
    """Count what a snapshot of this rank takes, in memory and, but for a header, on disk.

    Args:
        engine: A DeepSpeed engine at a step boundary.
        rank: This process's data-parallel rank.

    Returns:
        Bytes.
    """
    parts = local_slices(engine, rank)
    return sum(values.nbytes for part in parts for values in part.tensors.values())


def restore_state(engine: Any, rank: int, reader: StateReader, scalars: dict[str, Any]) -> None:
    """Put a network's optimizer state back, whatever layout it was written from.

    The module's own weights must have been loaded before the engine was made; here the fp32
    masters behind them, Adam's averages and counters and the loss scaler follow.

    Args:
        engine: A DeepSpeed engine that has taken no step.
        rank: This process's data-parallel rank.
        reader: The network's state.
        scalars: What `scalar_state` returned.
    """
    for part in local_slices(engine, rank):
        for kind, values in part.tensors.items():
            values.copy_(reader.read(part.name, kind, part.start, values.numel()))
    if _is_replicated(engine) and rank != 0:
        _restore_replica(engine, reader)
    inner = inner_optimizer(engine)
    for flat in _flat_partitions(engine):
        state = inner.state[flat]
        if torch.is_tensor(state["step"]):
            state["step"].fill_(scalars["adam_step"])
        else:
            state["step"] = scalars["adam_step"]
    if engine.fp16_enabled():  # another precision has no scale to continue with
        for field, value in scalars["loss_scaler"].items():
            setattr(engine.optimizer.loss_scaler, field, value)


def write_weights(engine: Any, rank: int, weights: dict[str, torch.Tensor]) -> None:
    """Set this rank's fp32 weights; the module's own, in its precision, stay as they are.

    Args:
        engine: A DeepSpeed engine that has taken no step.
        rank: This process's data-parallel rank.
        weights: Parameter -> whole fp32 tensor, equal on all ranks.
    """
    for part in local_slices(engine, rank):
        values = part.tensors[WEIGHT]
        values.copy_(weights[part.name].view(-1).narrow(0, part.start, values.numel()))


def _is_replicated(engine: Any) -> bool:
    """Whether every rank holds the whole state (stage 0)."""
    return engine.zero_optimization_stage() == 0


def _restore_replica(engine: Any, reader: StateReader) -> None:
    """Fill the state of a rank that writes none but holds all."""
    inner = inner_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        for kind in MOMENTS:
            values = reader.read(name, kind, 0, parameter.numel())
            inner.state[parameter][kind].copy_(values.view(parameter.shape))
        parameter.data.copy_(reader.read(name, WEIGHT, 0, parameter.numel()).view(parameter.shape))
