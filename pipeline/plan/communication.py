"""Bytes that ranks exchange in one optimizer step, collective by collective, as DeepSpeed 0.19.8.

    stage 0    all-reduce of the gradients, once a step
    stage 1    the same, then all-gather of the updated weights
    stage 2    all-reduce of the gradients in every micro step (its reduce_scatter setting is an
               all-reduce as well, of which each rank keeps its part), then all-gather
    stage 3    all-gather of weights before their use and reduce-scatter of gradients in every micro
               step, all-gather of the small parameters behind the step, and of E_G for each of the
               discriminator's micro steps

At stage 3 DeepSpeed learns from one micro step in which order modules are used, and keeps weights
from the forward to the backward pass from then on: the plan is of the steps behind that. Tests
compare all of this with the collectives of real steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config import RunConfig
from pipeline.plan.gathering import gathered_times
from pipeline.plan.parameters import EngineParameters, Parameter
from pipeline.plan.sharding import Sharding

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce"]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind and purpose in a step."""

    engine: str
    purpose: str
    """What is sent: "gradients", "weights", "small weights" or "rows of E_G"."""
    operation: Operation
    payload_bytes: int
    """Of the whole tensor: what is reduced, or what has been gathered."""
    is_overlapped: bool = False
    """Whether DeepSpeed computes meanwhile."""

    def sent_bytes(self, world_size: int) -> float:
        """Count what a rank sends, which is what it receives, on a ring.

        Args:
            world_size: Ranks.

        Returns:
            Bytes.

        Source:
            NCCL's `PERFORMANCE.md` (nccl-tests): bus bandwidth of each collective.
        """
        share = (world_size - 1) / world_size
        return self.payload_bytes * share * (2 if self.operation == "all_reduce" else 1)


def step_collectives(
    config: RunConfig,
    sharding: Sharding,
    engines: dict[str, EngineParameters],
    accumulation_steps: int,
) -> list[Collective]:
    """List what one optimizer step of all engines sends; a few counters and norms are left out.

    Args:
        config: The run.
        sharding: Layout and ranks.
        engines: From `engine_parameters`.
        accumulation_steps: Micro steps of a step.

    Returns:
        Collectives with a payload.
    """
    if sharding.world_size == 1:
        return []
    found = []
    for name, engine in engines.items():
        if sharding.layout == "parameters":
            found += _by_parameter(config, sharding, name, engine, accumulation_steps)
        else:
            found += _by_group(sharding, name, engine, accumulation_steps)
    return found


def _by_group(
    sharding: Sharding, name: str, engine: EngineParameters, micro_steps: int
) -> Iterator[Collective]:
    """Stages 0 to 2."""
    zero = sharding.config.settings.zero_optimization
    padded = sum(sharding.padded_elements(group) for group in engine.groups)
    gradients = sum(each.elements * sharding.sent_bytes(each) for each in engine.ordered)
    if sharding.layout == "bf16":
        gradients = padded * sharding.gradient_bytes  # its flat tensors, padding included
    is_split = zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce
    operation = "reduce" if sharding.layout == "flat" and is_split else "all_reduce"
    repeats = micro_steps if sharding.stage == 2 else 1
    overlaps = sharding.stage == 2 and bool(zero.overlap_comm)
    yield Collective(name, "gradients", operation, repeats * gradients, overlaps)
    if sharding.layout != "replicated":
        yield Collective(name, "weights", "all_gather", padded * sharding.weight_bytes)


def _by_parameter(
    config: RunConfig, sharding: Sharding, name: str, engine: EngineParameters, micro_steps: int
) -> Iterator[Collective]:
    """Stage 3."""
    small = set(sharding.persistent(engine))
    large = [each for each in engine.ordered if each not in small]
    overlaps = sharding.overlaps_communication
    gathered = sum(
        times * _gathered_bytes(sharding, [each])
        for each, times in zip(
            engine.ordered, gathered_times(config, sharding, engine, name), strict=True
        )
    )
    yield Collective(name, "weights", "all_gather", micro_steps * gathered, overlaps)
    reduced = sum(
        sharding.world_size * sharding.part_elements(each) * sharding.sent_bytes(each)
        for each in engine.ordered
    )
    yield Collective(name, "gradients", "reduce_scatter", micro_steps * reduced, overlaps)
    # Small parameters are gathered in the weights' own type, whatever autocast would send.
    kept = sum(sharding.world_size * sharding.part_elements(each) for each in small)
    yield Collective(name, "small weights", "all_gather", kept * sharding.weight_bytes)
    if name == "generator" and _reads_generator_outside(config):
        rows = [each for each in large if _is_shared_table(config, each)]
        payload = micro_steps * _gathered_bytes(sharding, rows)
        yield Collective(name, "rows of E_G", "all_gather", payload)


def _reads_generator_outside(config: RunConfig) -> bool:
    """Whether the discriminator's phase reads a table of the generator's engine."""
    objective = config.objective
    apart = config.discriminator is not None and objective.update == "decoupled"
    return apart and objective.embedding_sharing != "nes"


def _is_shared_table(config: RunConfig, parameter: Parameter) -> bool:
    if "word_embeddings" in parameter.name:
        return True
    biased = config.discriminator is not None and config.discriminator.position_biased_input
    return biased and "position_embeddings" in parameter.name


def _gathered_bytes(sharding: Sharding, parameters: list[Parameter]) -> int:
    """One gather of some parameters, padding included."""
    return sum(
        sharding.world_size * sharding.part_elements(each) * sharding.gathered_bytes(each)
        for each in parameters
    )
