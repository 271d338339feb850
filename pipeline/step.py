"""One optimizer step of the objective, in the order of the paper.

    1. masks          which slots of every micro batch must be predicted
    2. counts         global numbers of masked slots and of tokens: the losses' denominators
    3. generator      forward, draws, backward for every micro batch; then the generator's step
    4. discriminator  on the corrupted inputs and the *updated* E_G; then the discriminator's step

    DecoupledStep     all of it, with two engines
    JointStep         3 and 4 in one forward pass, one engine, one step for the sum of both losses
    MlmStep           1 to 3

A loss is local sum x world size x accumulation / global count. DeepSpeed divides by the first two,
so that any split of the same samples into ranks and micro batches has the same gradient
(arXiv:2111.09543, sections 3.1 and 3.3; draws come from the forward pass before the update).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import DropoutKey
from pipeline.data import SequenceBatch
from pipeline.ds_config import BatchPlan
from pipeline.engine import Engines
from pipeline.engine_stepping import StepOutcome, backward, step_engine
from pipeline.masking import MaskedBatch
from pipeline.metrics import StepSums
from pipeline.modeling.pair import NetworkPair, PairOutput, shared_rows
from pipeline.objective_keys import ObjectiveKeys
from pipeline.rtd import CorruptedBatch, DrawKey, corrupt
from pipeline.runtime import World


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks."""

    sums: torch.Tensor
    """fp64 vector of global sums in the order of `metrics.FIELDS`, on the device."""
    outcomes: dict[str, StepOutcome]
    """By engine: what its optimizer did."""


@dataclass(frozen=True)
class Scales:
    """What sums of losses are multiplied by before their backward pass; 0-dimensional."""

    per_masked_token: torch.Tensor
    per_token: torch.Tensor


class TrainingStep(ABC):
    """Trains the networks on the micro batches of one optimizer step.

    Args:
        engines: The engines of this objective.
        pair: The networks inside them.
        objective: The discriminator's weight.
        seed: The run's seed, for dropout.
        plan: Batch sizes of this world.
        world: This process's place.
    """

    def __init__(
        self,
        engines: Engines,
        pair: NetworkPair,
        objective: ObjectiveSection,
        *,
        seed: int,
        plan: BatchPlan,
        world: World,
    ) -> None:
        self._engines = engines.by_name
        self._pair = pair
        self._rtd_loss_weight = objective.rtd_loss_weight
        self._seed = seed
        self._world = world
        # DeepSpeed averages over ranks and its constant number of micro steps, however many there
        # are; the losses are sums over a global count.
        self._undo_averaging = plan.world_size * plan.gradient_accumulation_steps

    def __call__(
        self,
        step: int,
        micro_batches: list[SequenceBatch],
        keys: ObjectiveKeys,
        prepare: Callable[[str], None],
    ) -> StepResult:
        """Take one optimizer step of each network.

        Args:
            step: Completed steps before this one; keys the dropout.
            micro_batches: This rank's micro batches.
            keys: The random functions of masks and draws for their sequence length.
            prepare: Called with an engine's name before its step: sets the learning rate.

        Returns:
            Global sums and what each optimizer did.
        """
        batches = [batch.to(self._world.device) for batch in micro_batches]
        slots = [keys.mask(batch) for batch in batches]
        sums = StepSums(self._world.device)
        scales = self._scales(batches, slots)
        draws = [keys.draw(batch) for batch in batches]
        outcomes = self.phases(step, batches, slots, draws, scales, sums, prepare)
        return StepResult(sums.reduce(), outcomes)

    @abstractmethod
    def phases(
        self,
        step: int,
        batches: list[SequenceBatch],
        slots: list[MaskedBatch],
        draws: list[DrawKey | None],
        scales: Scales,
        sums: StepSums,
        prepare: Callable[[str], None],
    ) -> dict[str, StepOutcome]:
        """Do the forward and backward passes and the updates.

        Args:
            step: Completed steps before this one.
            batches: Micro batches on the device.
            slots: Their masked slots.
            draws: What their draws depend on.
            scales: What sums of losses are multiplied by.
            sums: Collects losses and hits.
            prepare: Called with an engine's name before its step.

        Returns:
            By engine: what its optimizer did.
        """

    @abstractmethod
    def predict(self, batch: SequenceBatch, slots: MaskedBatch, draw: DrawKey | None) -> PairOutput:
        """Compute both losses through the engines, without dropout and without a gradient.

        Args:
            batch: On the device.
            slots: Its masked slots.
            draw: What its draws depend on.

        Returns:
            Both networks' outputs.
        """

    def update(self, name: str, prepare: Callable[[str], None]) -> StepOutcome:
        """Set an engine's rates and take its step.

        Args:
            name: Of the engine.
            prepare: Sets the rates.

        Returns:
            What the optimizer did.
        """
        prepare(name)
        return step_engine(self._engines[name])

    def backward(self, name: str, loss: torch.Tensor, micro_step: int, micro_steps: int) -> None:
        """Accumulate one micro step's gradient.

        Args:
            name: Of the engine.
            loss: Scaled loss of the micro batch.
            micro_step: Which one it is.
            micro_steps: How many the step has.
        """
        backward(self._engines[name], loss, is_last=micro_step == micro_steps - 1)

    def dropout(self, network: str, step: int, micro_step: int) -> DropoutKey:
        """Key the dropout of one network in one micro step.

        Args:
            network: "generator" or "discriminator".
            step: Completed steps before this one.
            micro_step: Within the step.

        Returns:
            The key.
        """
        return DropoutKey.derive(
            self._seed, network, step, micro_step, self._world.rank, self._world.device
        )

    def _scales(self, batches: list[SequenceBatch], slots: list[MaskedBatch]) -> Scales:
        """Count masked slots and tokens over all ranks and micro steps."""
        masked_count = torch.stack([each.valid_BK.sum() for each in slots]).sum()
        token_count = torch.stack([batch.lengths_B.sum() for batch in batches]).sum()
        counts = torch.stack([masked_count, token_count])
        if self._world.world_size > 1:
            dist.all_reduce(counts)
        scales = self._undo_averaging / counts.clamp(min=1)
        return Scales(scales[0], scales[1])


class MlmStep(TrainingStep):
    """Trains one network to predict masked tokens."""

    def phases(self, step, batches, slots, draws, scales, sums, prepare):
        """See `TrainingStep.phases`."""
        self.generator_phase(step, batches, slots, draws, scales.per_masked_token, sums)
        return {"generator": self.update("generator", prepare)}

    def generator_phase(
        self,
        step: int,
        batches: list[SequenceBatch],
        slots: list[MaskedBatch],
        draws: list[DrawKey | None],
        loss_scale: torch.Tensor,
        sums: StepSums,
    ) -> list[CorruptedBatch]:
        """Predict the masked slots, and draw replacements from the same forward pass.

        Args:
            step: Completed steps before this one.
            batches: Micro batches on the device.
            slots: Their masked slots.
            draws: What their draws depend on.
            loss_scale: 0-dimensional: what a loss sum is multiplied by.
            sums: Collects losses and hits.

        Returns:
            What the discriminator reads; nothing with objective.task=mlm.
        """
        corrupted = []
        for micro_step, (batch, masked, draw) in enumerate(zip(batches, slots, draws, strict=True)):
            dropout = self.dropout("generator", step, micro_step)
            output = _generate(self._engines["generator"], batch, masked, draw, dropout)
            sums.add_generator(output, masked.valid_BK)
            if output.drawn_BK is not None:
                corrupted.append(_corrupted(batch, masked, output.drawn_BK))
            self.backward("generator", output.loss_sum * loss_scale, micro_step, len(batches))
        return corrupted

    def predict(self, batch, slots, draw):
        """See `TrainingStep.predict`."""
        return PairOutput(_generate(self._engines["generator"], batch, slots, draw), None, None)


class DecoupledStep(MlmStep):
    """Trains the generator, then the discriminator on top of the updated E_G."""

    def phases(self, step, batches, slots, draws, scales, sums, prepare):
        """See `TrainingStep.phases`."""
        corrupted = self.generator_phase(step, batches, slots, draws, scales.per_masked_token, sums)
        generator = self.update("generator", prepare)
        self.discriminator_phase(step, batches, corrupted, scales.per_token, sums)
        return {"generator": generator, "discriminator": self.update("discriminator", prepare)}

    def discriminator_phase(
        self,
        step: int,
        batches: list[SequenceBatch],
        corrupted: list[CorruptedBatch],
        loss_scale: torch.Tensor,
        sums: StepSums,
    ) -> None:
        """Tell replaced tokens from original ones.

        Args:
            step: Completed steps before this one.
            batches: Micro batches on the device, for their padding.
            corrupted: Their corrupted inputs and labels.
            loss_scale: 0-dimensional: what a loss sum is multiplied by, without lambda.
            sums: Collects losses and hits.
        """
        for micro_step, (batch, inputs) in enumerate(zip(batches, corrupted, strict=True)):
            output = self._detect(batch, inputs, self.dropout("discriminator", step, micro_step))
            sums.add_discriminator(output, inputs.is_replaced_BL, batch.attention_mask())
            loss = output.loss_sum * loss_scale * self._rtd_loss_weight
            self.backward("discriminator", loss, micro_step, len(batches))

    def predict(self, batch, slots, draw):
        """See `TrainingStep.predict`."""
        mlm = _generate(self._engines["generator"], batch, slots, draw)
        assert mlm.drawn_BK is not None, "replaced token detection without draws"
        inputs = _corrupted(batch, slots, mlm.drawn_BK)
        return PairOutput(mlm, self._detect(batch, inputs, None), inputs)

    def _detect(
        self, batch: SequenceBatch, inputs: CorruptedBatch, dropout: DropoutKey | None
    ) -> Any:
        """Run the discriminator's engine on rows of E_G as they are now."""
        assert self._pair.discriminator is not None, "replaced token detection without detector"
        return self._engines["discriminator"](
            inputs.input_ids_BL,
            shared_rows(self._pair.generator, self._pair.discriminator, inputs.input_ids_BL),
            batch.attention_mask(),
            inputs.is_replaced_BL.float(),
            dropout,
        )


class JointStep(TrainingStep):
    """Trains both networks on L_MLM + lambda L_RTD at once; the way ELECTRA and ES are trained."""

    def phases(self, step, batches, slots, draws, scales, sums, prepare):
        """See `TrainingStep.phases`."""
        for micro_step, (batch, masked, draw) in enumerate(zip(batches, slots, draws, strict=True)):
            dropouts = (
                self.dropout("generator", step, micro_step),
                self.dropout("discriminator", step, micro_step),
            )
            mlm, rtd, corrupted = self._forward(batch, masked, draw, *dropouts)
            assert rtd is not None
            assert corrupted is not None
            sums.add_generator(mlm, masked.valid_BK)
            sums.add_discriminator(rtd, corrupted.is_replaced_BL, batch.attention_mask())
            loss = mlm.loss_sum * scales.per_masked_token
            loss = loss + rtd.loss_sum * scales.per_token * self._rtd_loss_weight
            self.backward("joint", loss, micro_step, len(batches))
        return {"joint": self.update("joint", prepare)}

    def predict(self, batch, slots, draw):
        """See `TrainingStep.predict`."""
        return self._forward(batch, slots, draw, None, None)

    def _forward(
        self,
        batch: SequenceBatch,
        slots: MaskedBatch,
        draw: DrawKey | None,
        generator_dropout: DropoutKey | None,
        discriminator_dropout: DropoutKey | None,
    ) -> PairOutput:
        return self._engines["joint"](
            batch.input_ids_BL,
            batch.attention_mask(),
            slots,
            draw,
            generator_dropout,
            discriminator_dropout,
        )


def build_step(
    engines: Engines, pair: NetworkPair, objective: ObjectiveSection, **places: Any
) -> TrainingStep:
    """Choose the step of an objective.

    Args:
        engines: Its engines.
        pair: The networks inside them.
        objective: [objective].
        **places: seed, plan and world, as in `TrainingStep`.

    Returns:
        The step.
    """
    if objective.task == "mlm":
        return MlmStep(engines, pair, objective, **places)
    kind = JointStep if objective.update == "joint" else DecoupledStep
    return kind(engines, pair, objective, **places)


def _generate(
    engine: Any,
    batch: SequenceBatch,
    slots: MaskedBatch,
    draw: DrawKey | None,
    dropout: DropoutKey | None = None,
) -> Any:
    """Run the generator's engine on a masked micro batch."""
    return engine(
        slots.masked_ids_BL,
        batch.attention_mask(),
        slots.positions_BK,
        slots.valid_BK,
        slots.targets_BK,
        draw,
        dropout,
    )


def _corrupted(batch: SequenceBatch, slots: MaskedBatch, drawn_BK: torch.Tensor) -> CorruptedBatch:
    return corrupt(batch.input_ids_BL, slots.positions_BK, slots.valid_BK, drawn_BK)
