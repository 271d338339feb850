"""What every kind of training step shares: scales, hooks, micro steps and updates.

`pipeline.step` has the kinds. Between micro steps, while no weight has changed yet, somebody may
ask to stop: the step is then left out as if it had never begun (`StepAbandoned`), because
everything in it is a function of its number.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline import faults
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import DropoutKey
from pipeline.ds_config import BatchPlan
from pipeline.engine import Engines
from pipeline.engine_reads import HostRead
from pipeline.engine_stepping import StepOutcome, backward, step_engine
from pipeline.masking import MaskedBatch
from pipeline.metrics import StepSums
from pipeline.modeling.pair import NetworkPair, PairOutput
from pipeline.objective_keys import ObjectiveKeys
from pipeline.rtd import DrawKey
from pipeline.runtime import World
from pipeline.sequences import SequenceBatch
from pipeline.throughput import ForwardTimer


@dataclass(frozen=True)
class StepResult:
    """What a step did, on the host; sums and outcomes are equal on all ranks."""

    sums: torch.Tensor
    """fp64 vector of global sums in the order of `metrics.FIELDS`."""
    outcomes: dict[str, StepOutcome]
    """By engine: what its optimizer did."""
    forward_seconds: float
    """What this rank's forward passes took."""


class StepAbandoned(Exception):
    """A request to stop came before any weight had changed; on all ranks."""


@dataclass(frozen=True)
class StepHooks:
    """What a step tells and asks while it runs."""

    should_stop: Callable[[], bool] = lambda: False
    """Asked between micro steps; the same answer on all ranks."""
    mark: Callable[[str, int], None] = lambda _phase, _step: None
    """Told what the step does now, and its number: a sign of progress."""


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
        hooks: Who listens.
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
        hooks: StepHooks = StepHooks(),
    ) -> None:
        self._engines = engines.by_name
        self._pair = pair
        self._rtd_loss_weight = objective.rtd_loss_weight
        self._seed = seed
        self._world = world
        self._hooks = hooks
        self.forward_timer = ForwardTimer(world.device)
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

        Raises:
            StepAbandoned: Somebody asked to stop before any weight had changed.
        """
        faults.reach("step.begin", step)
        self._hooks.mark("masks", step)
        batches = [batch.to(self._world.device) for batch in micro_batches]
        slots = [keys.mask(batch) for batch in batches]
        sums = StepSums(self._world.device)
        scales = self._scales(batches, slots)
        draws = [keys.draw(batch) for batch in batches]
        outcomes = self.phases(step, batches, slots, draws, scales, sums, prepare)
        faults.reach("step.end", step)
        return StepResult(sums.totals, outcomes, self.forward_timer.take_seconds())

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
            sums: Collects losses and hits; goes to the last `update`.
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

    def update(
        self,
        name: str,
        step: int,
        prepare: Callable[[str], None],
        sums: StepSums | None = None,
    ) -> StepOutcome:
        """Set an engine's rates and take its step.

        Args:
            name: Of the engine.
            step: Completed steps before this one.
            prepare: Sets the rates.
            sums: Those of the step where this is its last update: they are added over the ranks,
                and come to the host together with the gradient's norm.

        Returns:
            What the optimizer did.
        """
        read = HostRead()
        if sums is not None:
            self._hooks.mark("sums", step)
            read = HostRead(sums.reduce())
        network = "generator" if name == "generator" else "discriminator"
        faults.reach(f"step.{network}_update", step)
        self._hooks.mark(f"{name} update", step)
        prepare(name)
        outcome = step_engine(self._engines[name], read)
        if sums is not None:
            sums.totals = read.passengers
        return outcome

    def backward(
        self, name: str, loss: torch.Tensor, step: int, micro_step: int, micro_steps: int
    ) -> None:
        """Accumulate one micro step's gradient.

        Args:
            name: Of the engine.
            loss: Scaled loss of the micro batch.
            step: Completed steps before this one.
            micro_step: Which one it is.
            micro_steps: How many the step has.
        """
        self._hooks.mark(f"{name} backward {micro_step}", step)
        backward(self._engines[name], loss, is_last=micro_step == micro_steps - 1)

    def begin_micro_step(self, name: str, step: int, micro_step: int) -> None:
        """Show progress before a forward pass, and give a request to stop its chance.

        Args:
            name: Of the engine, none of whose weights has changed in this step.
            step: Completed steps before this one.
            micro_step: Which one begins; before the first the step's own boundary has just asked.

        Raises:
            StepAbandoned: Somebody asked to stop.
        """
        if micro_step and self._hooks.should_stop():
            raise StepAbandoned
        self._hooks.mark(f"{name} forward {micro_step}", step)

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
