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

from typing import Any, TypeVar

import torch

from pipeline import faults
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import DropoutKey
from pipeline.engine import Engines
from pipeline.engine_stepping import between_forwards
from pipeline.masking import MaskedBatch
from pipeline.metrics import StepSums
from pipeline.modeling.networks import RtdOutput
from pipeline.modeling.pair import NetworkPair, PairOutput, shared_rows
from pipeline.modeling.vocabulary_head import MlmOutput
from pipeline.rtd import CorruptedBatch, DrawKey, corrupt
from pipeline.sequences import SequenceBatch
from pipeline.training_step import TrainingStep

OutputT = TypeVar("OutputT", MlmOutput, RtdOutput)


class MlmStep(TrainingStep):
    """Trains one network to predict masked tokens."""

    def phases(self, step, batches, slots, draws, scales, sums, prepare):
        """See `TrainingStep.phases`."""
        self.generator_phase(step, batches, slots, draws, scales.per_masked_token, sums)
        return {"generator": self.update("generator", step, prepare, sums)}

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
            self.begin_micro_step("generator", step, micro_step)
            dropout = self.dropout("generator", step, micro_step)
            with self.forward_timer.running():
                faults.reach("step.forward", step)
                output = _generate(self._engines["generator"], batch, masked, draw, dropout)
            output = _poisoned("step.generator_loss", step, output)
            sums.add_generator(output, masked.valid_BK)
            if output.drawn_BK is not None:
                corrupted.append(_corrupted(batch, masked, output.drawn_BK))
            loss = output.loss_sum * loss_scale
            self.backward("generator", loss, step, micro_step, len(batches))
        return corrupted

    def predict(self, batch, slots, draw):
        """See `TrainingStep.predict`."""
        return PairOutput(_generate(self._engines["generator"], batch, slots, draw), None, None)


class DecoupledStep(MlmStep):
    """Trains the generator, then the discriminator on top of the updated E_G."""

    def phases(self, step, batches, slots, draws, scales, sums, prepare):
        """See `TrainingStep.phases`."""
        corrupted = self.generator_phase(step, batches, slots, draws, scales.per_masked_token, sums)
        generator = self.update("generator", step, prepare)
        self.discriminator_phase(step, batches, corrupted, scales.per_token, sums)
        return {
            "generator": generator,
            "discriminator": self.update("discriminator", step, prepare, sums),
        }

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
            self._hooks.mark(f"discriminator forward {micro_step}", step)
            dropout = self.dropout("discriminator", step, micro_step)
            with self.forward_timer.running():
                faults.reach("step.forward", step)
                output = self._detect(batch, inputs, dropout)
            output = _poisoned("step.discriminator_loss", step, output)
            sums.add_discriminator(output, inputs.is_replaced_BL, batch.attention_mask())
            loss = output.loss_sum * loss_scale * self._rtd_loss_weight
            self.backward("discriminator", loss, step, micro_step, len(batches))

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
        with between_forwards(self._engines["generator"]):
            rows_BLE = shared_rows(
                self._pair.generator, self._pair.discriminator, inputs.input_ids_BL
            )
        return self._engines["discriminator"](
            inputs.input_ids_BL,
            rows_BLE,
            batch.attention_mask(),
            inputs.is_replaced_BL.float(),
            dropout,
        )


class JointStep(TrainingStep):
    """Trains both networks on L_MLM + lambda L_RTD at once; the way ELECTRA and ES are trained."""

    def phases(self, step, batches, slots, draws, scales, sums, prepare):
        """See `TrainingStep.phases`."""
        for micro_step, (batch, masked, draw) in enumerate(zip(batches, slots, draws, strict=True)):
            self.begin_micro_step("joint", step, micro_step)
            dropouts = (
                self.dropout("generator", step, micro_step),
                self.dropout("discriminator", step, micro_step),
            )
            with self.forward_timer.running():
                faults.reach("step.forward", step)
                mlm, rtd, corrupted = self._forward(batch, masked, draw, *dropouts)
            assert rtd is not None
            assert corrupted is not None
            mlm = _poisoned("step.generator_loss", step, mlm)
            rtd = _poisoned("step.discriminator_loss", step, rtd)
            sums.add_generator(mlm, masked.valid_BK)
            sums.add_discriminator(rtd, corrupted.is_replaced_BL, batch.attention_mask())
            loss = mlm.loss_sum * scales.per_masked_token
            loss = loss + rtd.loss_sum * scales.per_token * self._rtd_loss_weight
            self.backward("joint", loss, step, micro_step, len(batches))
        return {"joint": self.update("joint", step, prepare, sums)}

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
        **places: seed, plan, world and hooks, as in `TrainingStep`.

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


def _poisoned(point: str, step: int, output: OutputT) -> OutputT:
    """Pass an output on; with a damaged loss where a test asks for it."""
    return output._replace(loss_sum=faults.poison(point, step, output.loss_sum))
