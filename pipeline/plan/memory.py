"""The peak memory of one GPU, by part, in the phases of a step.

    generator        weights and state, the generator's activations, the workspace of one layer or
                     of a chunk of logits
    discriminator    the same with its activations, and the rows of E_G that it reads
    joint            both networks' activations at once (objective.update=joint)
    reduction        behind a backward pass: gradients, and DeepSpeed's copies of them for sending
    update           a flat copy of the gradients for Adam

What DeepSpeed 0.19.8 keeps is counted from its source and held against real engines by tests, and
so are activations. Workspaces are modelled from the operations that have the largest ones.
"""

from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.plan.activations import Activations, masked_slots
from pipeline.plan.parameters import EngineParameters
from pipeline.plan.sharding import FP32_BYTES, Sharding
from pipeline.plan.workspaces import layer_workspace, logits_workspace
from pipeline.plan.zero_memory import state_bytes

CONTEXT_BYTES = 750 << 20
"""Assumed: CUDA context with its kernels, and cuBLAS workspaces."""
NCCL_BYTES = 512 << 20
"""Assumed: NCCL's channels, where there is more than one rank."""
FRAGMENTATION = 0.04
"""Assumed: share of all else that torch's caching allocator cannot use."""
_INT64 = 8


@dataclass(frozen=True)
class Peak:
    """One GPU's memory in the phase that needs most."""

    phase: str
    parts: dict[str, int]
    """Part -> bytes."""
    phases: dict[str, int]
    """Phase -> bytes."""
    host: int
    """Bytes in CPU memory, a rank."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def peak_memory(
    config: RunConfig,
    sharding: Sharding,
    engines: dict[str, EngineParameters],
    *,
    micro_batch: int,
    accumulation_steps: int,
    length: int,
) -> Peak:
    """Find the phase of a step that needs most memory.

    Args:
        config: The run.
        sharding: Layout and ranks.
        engines: From `engine_parameters`.
        micro_batch: Sequences of one forward pass.
        accumulation_steps: Micro steps of a step.
        length: Tokens in a sequence.

    Returns:
        The peak; on a CPU the parts "CUDA context" and "allocator" do not exist.
    """
    states = {
        name: state_bytes(sharding, engine, accumulation_steps) for name, engine in engines.items()
    }
    always = {
        "weights": sum(each.weights for each in states.values()),
        "fp32 masters": sum(each.masters for each in states.values()),
        "Adam's averages": sum(each.moments for each in states.values()),
        "batches": _batch_bytes(config, micro_batch * accumulation_steps, length),
    }
    phases = {}
    computing = computing_bytes(config, sharding.weight_bytes, micro_batch, length)
    for name, state in states.items():
        there = [each for each in states.values() if each is state or not each.frees_sums]
        resident = {
            **always,
            "gradient sums": sum(each.sums for each in there),
            "gradients": state.gradients,
            "ZeRO buckets": sum(each.buckets for each in there),
        }
        gathered = {"gathered weights": state.gathered}
        phases[name] = {**resident, **gathered, **computing[name]}
        phases[f"{name}, reduction"] = {**resident, "flat copies of gradients": state.reduction}
        if state.frees_sums:
            resident = {**resident, "gradients": 0, "ZeRO buckets": 0}
        phases[f"{name}, update"] = {**resident, "flat copies of gradients": state.update}
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    parts = {name: count for name, count in phases[phase].items() if count}
    return Peak(phase, parts, totals, sum(each.host for each in states.values()))


def with_overhead(peak: Peak, world_size: int) -> Peak:
    """Add what a GPU has besides tensors.

    Args:
        peak: Of tensors.
        world_size: Ranks.

    Returns:
        The peak with the assumed parts.
    """
    overhead = {
        "CUDA context, cuBLAS, NCCL": CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0),
        "allocator": round(FRAGMENTATION * peak.total),
    }
    added = sum(overhead.values())
    phases = {name: count + added for name, count in peak.phases.items()}
    return Peak(peak.phase, peak.parts | overhead, phases, peak.host)


def _batch_bytes(config: RunConfig, sequences: int, length: int) -> int:
    """Ids, masked ids, slots and corrupted ids of a whole step, which the GPU holds at once."""
    slots = masked_slots(length, config.objective)
    each = 2 * _INT64 * length + slots * (2 * _INT64 + 1)
    if config.discriminator is not None:
        each += length * (_INT64 + 1)
    return sequences * each


def computing_bytes(
    config: RunConfig, weight_bytes: int, micro_batch: int, length: int
) -> dict[str, dict[str, int]]:
    """Size what a forward and backward pass needs besides weights, gradients and state.

    Args:
        config: The run.
        weight_bytes: Bytes of a weight in the forward pass: 2 or 4.
        micro_batch: Sequences.
        length: Tokens in a sequence.

    Returns:
        Engine -> part -> bytes at the turn from its forward to its backward pass.
    """
    phases = {}
    for name, network in config.networks.items():
        kept = Activations(config, network, micro_batch, length, weight_bytes)
        tables = kept.relative_table_bytes(is_decoder=name == "generator")
        total = kept.generator_bytes() if name == "generator" else kept.discriminator_bytes()
        phases[name] = {f"activations of the {name}": total - tables, "relative tables": tables}
        layer = layer_workspace(kept, is_generator=name == "generator")
        if name == "generator":
            # The word table's gradient waits from the head's backward pass to the embeddings'.
            table = config.model.vocab_size * network.word_embedding_size * weight_bytes
            phases[name]["gradient of E_G"] = table
            # The head is behind the layers: its workspace and theirs do not exist together.
            logits = logits_workspace(config, micro_batch, length, weight_bytes)
            layer, chunk = (layer, 0) if layer > logits else (0, logits)
            phases[name]["logits of a chunk"] = chunk
        phases[name]["workspace of a layer"] = layer
        if name == "discriminator" and config.objective.embedding_sharing != "nes":
            rows = micro_batch * length * network.word_embedding_size
            phases[name]["rows of E_G"] = rows * FP32_BYTES
    if len(phases) > 1 and config.objective.update == "joint":
        return {"joint": _together(phases)}
    return phases


def _together(phases: dict[str, dict[str, int]]) -> dict[str, int]:
    """One forward pass of both networks: what is kept adds up, workspaces follow each other."""
    joint: dict[str, int] = {}
    for parts in phases.values():
        for name, count in parts.items():
            is_work = name in ("workspace of a layer", "logits of a chunk")
            joint[name] = max(joint.get(name, 0), count) if is_work else joint.get(name, 0) + count
    return joint
