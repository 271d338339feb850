"""Fine-tuning under DeepSpeed, by all ranks that a launcher started, with one JSON.

The JSON says how a step is computed: precision, clipping, ZeRO, offload, and the largest micro
batch. How many examples a step has is the recipe's. Each rank takes every n-th example of a batch;
the gradient is that of the mean over the batch, as in one process (tags and entities, whose number
differs between examples, are averaged within a micro batch first).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import UserError
from pipeline.config import OptimizerSection
from pipeline.ds_config import BatchPlan, DeepSpeedConfig, check_deepspeed_config
from pipeline.engine import start_engines
from pipeline.engine_stepping import backward, set_learning_rates, step_engine
from pipeline.evaluate.features import Feature, collate
from pipeline.evaluate.kind import Kind
from pipeline.evaluate.plan import TrainingPlan
from pipeline.evaluate.sift import Sift
from pipeline.evaluate.stepping import WEIGHT_DECAY, Stepper, batch_loss
from pipeline.runtime import World

T = TypeVar("T")

_NETWORK = "discriminator"
"""What `pipeline.engine` calls a network with a learning rate of its own."""


class DeepSpeedStrategy:
    """All ranks of a world.

    Args:
        ds: The checked JSON.
        world: This process's place, in a group that was started.
        group: Control group of all ranks.
    """

    def __init__(self, ds: DeepSpeedConfig, world: World, group: dist.ProcessGroup):
        self._ds, self._world, self._group = ds, world, group
        self.rank, self.world_size, self.device = world.rank, world.world_size, world.device

    def start(self, model: nn.Module, kind: Kind, plan: TrainingPlan) -> Stepper:
        """Make a model ready for training."""
        if plan.sift is not None and self._ds.zero_stage == 3:
            # Its passes beside the engine's own would gather and release weights out of order.
            raise UserError(
                f"--sift with {self._ds.path}: its passes need whole weights, and ZeRO-3 divides "
                "them; give a JSON with stage 0, 1 or 2"
            )
        if plan.sift is not None and self._ds.precision == "autocast":
            raise UserError(
                f"--sift with {self._ds.path}: torch_autocast does not reach the passes "
                "of the perturbation; give a JSON with bf16, fp16 or neither"
            )
        if plan.bf16:
            raise UserError(
                f"--bf16 with --deepspeed_config: the precision is {self._ds.path}'s "
                f"({self._ds.precision}); leave --bf16 out"
            )
        share, rest = divmod(plan.batch_size, self.world_size)
        if rest:
            raise UserError(
                f"a batch of {plan.batch_size} examples cannot be divided among {self.world_size} "
                "ranks: give --batch-size, or start another number of ranks"
            )
        most = min(share, self._ds.micro_batch)
        micro = next(size for size in range(most, 0, -1) if share % size == 0)
        document = {
            **self._ds.raw,
            "train_batch_size": plan.batch_size,
            "train_micro_batch_size_per_gpu": micro,
        }
        ds = check_deepspeed_config(document, self._ds.path)
        return _EngineStepper(model, kind, plan, ds, self._world)

    def agree(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 and give its result, or its UserError, to all."""
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [(action(), None)]
            except UserError as error:
                found = [(None, error)]
        dist.broadcast_object_list(found, src=0, group=self._group)
        value, problem = found[0]
        if problem is not None:
            raise problem
        return value

    def exchange(self, value: T) -> list[T]:
        """Give the values of all ranks to all."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class _EngineStepper:
    """One DeepSpeed engine."""

    def __init__(
        self, model: nn.Module, kind: Kind, plan: TrainingPlan, ds: DeepSpeedConfig, world: World
    ):
        self._kind, self._world = kind, world
        self._plan: BatchPlan = ds.batch_plan(world.world_size)
        self._optimizer = OptimizerSection(
            generator_learning_rate=plan.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=WEIGHT_DECAY,
        )
        engines = start_engines(
            {_NETWORK: model}, optimizer=self._optimizer, ds=ds, plan=self._plan, world=world
        )
        self.model: Any = engines.by_name[_NETWORK]
        # The module: a gradient through the engine's outputs is a backward pass of its step to it.
        self._sift = Sift(self.model.module, plan.sift).attach() if plan.sift else None

    def step(self, chosen: Sequence[Feature], factor: float) -> float:
        """Take one optimizer step."""
        world, micro = self._world, self._plan.train_micro_batch_size_per_gpu
        mine = chosen[world.rank :: world.world_size]
        num_micro_steps = math.ceil(len(chosen) / (micro * world.world_size))
        total = torch.zeros((), device=world.device)
        for number in range(num_micro_steps):
            part = mine[number * micro : (number + 1) * micro]
            share = len(part) / len(chosen)
            # The last batch of an epoch may leave a rank without examples, but not without a pass.
            batch = collate(part or chosen[:1], world.device, self._kind.label_dtype)
            loss = batch_loss(self._kind, self.model, batch, self._sift)
            total += loss.detach().float() * share
            scale = share * world.world_size * self._plan.gradient_accumulation_steps
            backward(self.model, loss * scale, is_last=number + 1 == num_micro_steps)
        dist.all_reduce(total)
        value = float(total)
        if math.isfinite(value):
            set_learning_rates(self.model, self._optimizer, factor)
            step_engine(self.model)
        return value

    def close(self) -> None:
        """Give the engine's hooks and buffers back, and remove the perturbation."""
        if self._sift is not None:
            self._sift.detach()
        self.model.destroy()
