"""One optimizer step of replaced token detection, in the order of the paper.

    1. masks      which slots of every micro batch the generator must predict
    2. counts     global numbers of masked slots and of tokens: the denominators of both losses
    3. generator  forward, draws, backward for every micro batch; then the generator's step
    4. discriminator  on the corrupted inputs and the *updated* E_G; then the discriminator's step

A loss is local sum x world size x accumulation / global count. DeepSpeed divides by the first two,
so that any split of the same samples into ranks and micro batches has the same gradient
(arXiv:2111.09543, sections 3.1 and 3.3; draws come from the forward pass before the update).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import DropoutKey, Key, stream_key
from pipeline.data import CLS_ID, PAD_ID, SEP_ID, UNK_ID, SequenceBatch
from pipeline.ds_config import BatchPlan
from pipeline.engine import Engines, StepOutcome, set_learning_rate, step_engine
from pipeline.masking import MaskedBatch, choose_masks
from pipeline.metrics import StepSums
from pipeline.rtd import CorruptedBatch, DrawKey, corrupt
from pipeline.runtime import World


class LearningRates(NamedTuple):
    """Learning rates of one step."""

    generator: float
    discriminator: float


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks."""

    sums: torch.Tensor
    """fp64 vector of global sums in the order of `metrics.FIELDS`, on the device."""
    generator: StepOutcome
    discriminator: StepOutcome


class ObjectiveKeys:
    """The random functions of the objective for one run and sequence length."""

    def __init__(
        self, objective: ObjectiveSection, seed: int, sequence_length: int, mask_id: int, split: str
    ) -> None:
        """Derive the streams.

        Args:
            objective: Masking law, share and temperature.
            seed: The run's seed.
            sequence_length: L.
            mask_id: Id of [MASK].
            split: "train" or "heldout": separate streams.
        """
        self._objective = objective
        self._mask_id = mask_id
        self._mask_key: Key = stream_key(seed, f"mask/{split}", sequence_length)
        self._draw_key: Key = stream_key(seed, f"draw/{split}", sequence_length)

    def mask(self, batch: SequenceBatch) -> MaskedBatch:
        """Choose the masked slots of a micro batch.

        Args:
            batch: On the device.

        Returns:
            The masked batch.
        """
        return choose_masks(
            batch.input_ids_BL,
            batch.lengths_B,
            batch.sample_words_B2,
            key=self._mask_key,
            mask_prob=self._objective.mask_prob,
            law=self._objective.masking_law,
            special_ids=(PAD_ID, CLS_ID, SEP_ID, UNK_ID, self._mask_id),
            mask_id=self._mask_id,
        )

    def draw(self, batch: SequenceBatch) -> DrawKey:
        """Name the noise of a micro batch's draws.

        Args:
            batch: On the device.

        Returns:
            The key.
        """
        return DrawKey(self._draw_key, batch.sample_words_B2, self._objective.sampling_temperature)


class RTDStep:
    """Trains both networks on the micro batches of one optimizer step."""

    def __init__(
        self,
        engines: Engines,
        objective: ObjectiveSection,
        keys: ObjectiveKeys,
        *,
        seed: int,
        plan: BatchPlan,
        world: World,
    ) -> None:
        """Keep what does not change between steps.

        Args:
            engines: Both networks.
            objective: The discriminator's weight.
            keys: The random functions of masks and draws.
            seed: The run's seed, for dropout.
            plan: Batch sizes of this world.
            world: This process's place.
        """
        self._engines = engines
        self._rtd_loss_weight = objective.rtd_loss_weight
        self._keys = keys
        self._seed = seed
        self._world = world
        # DeepSpeed averages over ranks and accumulation; the losses are sums over a global count.
        self._undo_averaging = plan.world_size * plan.gradient_accumulation_steps

    def __call__(
        self, step: int, micro_batches: list[SequenceBatch], rates: LearningRates
    ) -> StepResult:
        """Take one optimizer step of each network.

        Args:
            step: Completed steps before this one; keys the dropout.
            micro_batches: This rank's micro batches.
            rates: Learning rates of this step.

        Returns:
            Global sums and what each optimizer did.
        """
        batches = [batch.to(self._world.device) for batch in micro_batches]
        masked = [self._keys.mask(batch) for batch in batches]
        masked_count, token_count = self._global_counts(batches, masked)
        sums = StepSums(self._world.device)
        corrupted, generator = self.generator_phase(
            step, batches, masked, self._undo_averaging / masked_count, rates.generator, sums
        )
        discriminator = self.discriminator_phase(
            step, batches, corrupted, self._undo_averaging / token_count, rates.discriminator, sums
        )
        return StepResult(sums.reduce(), generator, discriminator)

    def generator_phase(
        self,
        step: int,
        batches: list[SequenceBatch],
        masked: list[MaskedBatch],
        loss_scale: torch.Tensor,
        learning_rate: float,
        sums: StepSums,
    ) -> tuple[list[CorruptedBatch], StepOutcome]:
        """Predict the masked slots, draw replacements from the same forward pass, update.

        Args:
            step: Completed steps before this one.
            batches: Micro batches on the device.
            masked: Their masked slots.
            loss_scale: 0-dimensional: what a loss sum is multiplied by.
            learning_rate: Of this step.
            sums: Collects losses and hits.

        Returns:
            What the discriminator reads, and what the optimizer did.
        """
        engine = self._engines.generator
        corrupted = []
        for micro_step, (batch, slots) in enumerate(zip(batches, masked, strict=True)):
            output = engine(
                slots.masked_ids_BL,
                batch.attention_mask(),
                slots.positions_BK,
                slots.valid_BK,
                slots.targets_BK,
                self._keys.draw(batch),
                self._dropout("generator", step, micro_step),
            )
            sums.add(
                mlm_loss_sum=output.loss_sum,
                mlm_correct=output.correct_sum,
                masked_tokens=slots.valid_BK.sum(),
            )
            corrupted.append(
                corrupt(batch.input_ids_BL, slots.positions_BK, slots.valid_BK, output.drawn_BK)
            )
            engine.backward(output.loss_sum * loss_scale)
            if micro_step < len(batches) - 1:
                engine.step()  # only counts the micro step; the update is at the boundary
        set_learning_rate(engine, learning_rate)
        return corrupted, step_engine(engine)

    def discriminator_phase(
        self,
        step: int,
        batches: list[SequenceBatch],
        corrupted: list[CorruptedBatch],
        loss_scale: torch.Tensor,
        learning_rate: float,
        sums: StepSums,
    ) -> StepOutcome:
        """Tell replaced tokens from original ones on top of the updated E_G, update.

        Args:
            step: Completed steps before this one.
            batches: Micro batches on the device, for their padding.
            corrupted: Their corrupted inputs and labels.
            loss_scale: 0-dimensional: what a loss sum is multiplied by, without lambda.
            learning_rate: Of this step.
            sums: Collects losses and hits.

        Returns:
            What the optimizer did.
        """
        engine = self._engines.discriminator
        for micro_step, (batch, (ids_BL, is_replaced_BL)) in enumerate(
            zip(batches, corrupted, strict=True)
        ):
            with torch.no_grad():
                base_BLD = self._engines.generator.module.token_embeddings(ids_BL)
            mask_BL = batch.attention_mask()
            output = engine(
                ids_BL,
                base_BLD,
                mask_BL,
                is_replaced_BL.float(),
                self._dropout("discriminator", step, micro_step),
            )
            is_token_BL = torch.ones_like(is_replaced_BL) if mask_BL is None else mask_BL
            sums.add(rtd_loss_sum=output.loss_sum)
            sums.add_discriminator(output.logits_BL, is_replaced_BL, is_token_BL)
            engine.backward(output.loss_sum * loss_scale * self._rtd_loss_weight)
            if micro_step < len(batches) - 1:
                engine.step()
        set_learning_rate(engine, learning_rate)
        return step_engine(engine)

    def _global_counts(
        self, batches: list[SequenceBatch], masked: list[MaskedBatch]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count masked slots and tokens over all ranks and micro steps."""
        masked_count = torch.stack([slots.valid_BK.sum() for slots in masked]).sum()
        token_count = torch.stack([batch.lengths_B.sum() for batch in batches]).sum()
        counts = torch.stack([masked_count, token_count])
        if self._world.world_size > 1:
            dist.all_reduce(counts)
        return counts[0].clamp(min=1), counts[1]

    def _dropout(self, network: str, step: int, micro_step: int) -> DropoutKey:
        return DropoutKey.derive(
            self._seed, network, step, micro_step, self._world.rank, self._world.device
        )
