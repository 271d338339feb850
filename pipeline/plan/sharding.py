"""What each ZeRO stage keeps of an engine's parameters on one rank, element by element.

DeepSpeed 0.19.8 has four layouts, and which one a JSON gets is not only a matter of its stage
(`engine.py`, _do_optimizer_sanity_check):

    replicated    stage 0: parameters, gradients and Adam's averages whole on every rank
    bf16          stage 1 with bf16 weights, fp32 gradient sums and no offload: BF16_Optimizer;
                  flat weights and a flat fp32 gradient whole, masters and averages a part each
    flat          stages 1 and 2 otherwise: DeepSpeedZeroOptimizer; flat weights whole, masters and
                  averages a part each, gradients a part each where the stage is 2
    parameters    stage 3: of every parameter a part, and small ones whole besides

A flat group is padded to a multiple of two elements a rank; at stage 3 every parameter is padded to
a multiple of the ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipeline.ds_config import DeepSpeedConfig
from pipeline.plan.parameters import EngineParameters, Parameter

Layout = Literal["replicated", "bf16", "flat", "parameters"]

FP32_BYTES = 4
STATE_KINDS = 3
"""Weights, first and second averages: what a commit holds of a parameter, in fp32."""
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ALIGNED_ELEMENTS = 2  # "nccl_start_alignment_factor" of DeepSpeed's flat groups
_PARAMETER_ALIGNMENT_BYTES = 16  # zero_optimization.parameter_alignment
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Sharding:
    """How one DeepSpeed JSON lays out parameters on a number of ranks."""

    config: DeepSpeedConfig
    world_size: int

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.config.zero_stage

    @cached_property
    def layout(self) -> Layout:
        """Which of DeepSpeed's optimizers holds the state."""
        if self.stage in (0, 3):
            return "replicated" if self.stage == 0 else "parameters"
        summed_in_fp32 = self.weight_bytes == 2 and self.sum_bytes == FP32_BYTES
        is_bf16 = self.config.precision == "bf16" and summed_in_fp32
        if self.stage == 1 and is_bf16 and not self.config.offload_optimizer:
            return "bf16"
        return "flat"

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the forward pass; autocast keeps fp32 weights."""
        return 2 if self.config.precision in ("bf16", "fp16") else 4

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element of the sum of micro batches' gradients."""
        types = self.config.settings.data_types
        return self.weight_bytes if types is None else _DTYPE_BYTES[types.grad_accum_dtype]

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient on its way between ranks: communication_data_type."""
        sent = self.config.settings.communication_data_type
        return self.weight_bytes if sent is None else _DTYPE_BYTES[sent]

    @property
    def overlaps_communication(self) -> bool:
        """Whether DeepSpeed computes while it communicates: overlap_comm, on at stage 3 alone."""
        chosen = self.config.settings.zero_optimization.overlap_comm
        return self.stage == 3 if chosen is None else chosen

    def sent_bytes(self, parameter: Parameter) -> int:
        """Give the bytes of an element of a parameter's gradient on its way.

        Args:
            parameter: The parameter.

        Returns:
            2 or 4; under autocast ZeRO sends the gradients of Linears' weights in bf16.
        """
        if self.config.precision == "autocast" and self.stage:
            return self.gathered_bytes(parameter)
        return self.gradient_bytes

    def gathered_bytes(self, parameter: Parameter) -> int:
        """Give the bytes of an element of a parameter that stage 3 gathers.

        Args:
            parameter: The parameter.

        Returns:
            2 or 4; under autocast the weights of Linears are rounded to bf16 before they are sent.
        """
        is_cast = self.config.precision == "autocast" and parameter.is_matrix
        return 2 if is_cast else self.weight_bytes

    @property
    def offloads_parameters(self) -> bool:
        """Whether weights lie in CPU memory between their uses (stage 3)."""
        block = self.config.settings.zero_optimization.offload_param
        return block is not None and block.device == "cpu"

    def padded_elements(self, group: Sequence[Parameter]) -> int:
        """Count a group with what DeepSpeed pads it with, over all ranks.

        Args:
            group: One optimizer group.

        Returns:
            Elements: of the flat tensor, or of all parts at stage 3.
        """
        if self.layout == "replicated":
            return sum(parameter.elements for parameter in group)
        if self.layout == "parameters":
            return self.world_size * sum(self.part_elements(each) for each in group)
        return self.partition_elements(group) * self.world_size

    def partition_elements(self, group: Sequence[Parameter]) -> int:
        """Size one rank's part of a flat group (stages 1 and 2).

        Args:
            group: One optimizer group.

        Returns:
            Elements, padding included; the same on all ranks.
        """
        *_, (_, end) = self._offsets(group)
        unit = _ALIGNED_ELEMENTS * self.world_size
        return -(-end // unit) * _ALIGNED_ELEMENTS

    def part_elements(self, parameter: Parameter) -> int:
        """Size one rank's part of a parameter (stage 3).

        Args:
            parameter: The parameter.

        Returns:
            Elements, padding included; the same on all ranks.
        """
        return -(-parameter.elements // self.world_size)

    def owned_elements(self, group: Sequence[Parameter]) -> int:
        """Count the masters of a group that one rank keeps, padding included.

        Args:
            group: One optimizer group.

        Returns:
            Elements.
        """
        if self.layout == "replicated":
            return sum(parameter.elements for parameter in group)
        return self.padded_elements(group) // self.world_size

    def touched(self, engine: EngineParameters) -> int:
        """Size the parameters that reach into a rank's part, whole (stages 1 and 2).

        Args:
            engine: The engine's parameters.

        Returns:
            Elements, of the rank with most.
        """
        by_rank = [0] * self.world_size
        for group in engine.groups:
            part = self.partition_elements(group)
            for start, end in self._offsets(group):
                for rank in range(start // part, (end - 1) // part + 1):
                    by_rank[rank] += end - start
        return max(by_rank)

    def persistent(self, engine: EngineParameters) -> list[Parameter]:
        """List what stage 3 keeps whole on every rank, because it is small.

        Args:
            engine: The engine's parameters.

        Returns:
            The parameters; none at other stages.

        Source:
            DeepSpeed's `parameter_offload.py` (mark_persistent_parameters).
        """
        if self.layout != "parameters":
            return []
        zero = self.config.settings.zero_optimization
        limit = zero.stage3_model_persistence_threshold
        room, kept = _UNLIMITED if limit is None else limit, []
        for parameter in engine.ordered:
            fits = parameter.elements <= min(room, zero.stage3_param_persistence_threshold)
            if fits:
                kept.append(parameter)
                room -= parameter.elements
        return kept

    def state_bytes(self, engine: EngineParameters, rank: int) -> int:
        """Count what a rank writes into a commit: fp32 weights and Adam's averages.

        Args:
            engine: The engine's parameters.
            rank: Data-parallel rank.

        Returns:
            Bytes, without padding, as `pipeline.engine_state.state_bytes` counts them.
        """
        if self.layout == "replicated":
            count = 0 if rank else engine.elements
        elif self.layout == "parameters":
            parts = [(self.part_elements(each), each.elements) for each in engine.ordered]
            count = sum(max(0, min(part, size - rank * part)) for part, size in parts)
        else:
            count = sum(self._owned_without_padding(group, rank) for group in engine.groups)
        return STATE_KINDS * FP32_BYTES * count

    def _owned_without_padding(self, group: Sequence[Parameter], rank: int) -> int:
        """Elements of a flat group's parameters that fall into a rank's part."""
        part = self.partition_elements(group)
        first, last = rank * part, (rank + 1) * part
        return sum(
            max(0, min(end, last) - max(start, first)) for start, end in self._offsets(group)
        )

    def _offsets(self, group: Sequence[Parameter]) -> Iterator[tuple[int, int]]:
        """First element of each parameter in the flat tensor, and the one behind its last."""
        zero = self.config.settings.zero_optimization
        unit = 1
        if zero.parameter_alignment and self.layout == "flat":
            unit = _PARAMETER_ALIGNMENT_BYTES // self.weight_bytes
        ordered, start = list(group), 0
        if zero.round_robin_gradients and self.layout == "flat":
            turns = range(min(self.world_size, len(group)))
            ordered = [each for turn in turns for each in group[turn :: self.world_size]]
        for parameter in ordered:
            start = -(-start // unit) * unit
            yield start, start + parameter.elements
            start += parameter.elements
