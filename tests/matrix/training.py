"""One cell, trained by the program's own engines and step, and compared with its reference.

The reference's draws replace the cell's own: two candidates that tie would otherwise part two runs
that are equal but for rounding. Draws that differ are counted.
"""

import contextlib
import time
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist

from pipeline import engine
from pipeline.ds_config import DeepSpeedConfig
from pipeline.engine_state import WEIGHT, local_slices
from pipeline.engine_stepping import set_learning_rates
from pipeline.metrics import ratios
from pipeline.schedule import learning_rate_factor
from pipeline.step import build_step
from tests.engines import sequence_batch, small_pair
from tests.matrix.cells import Cell
from tests.matrix.shared_run import (
    POISONED_STEPS,
    SEED,
    STEPS,
    UNCHANGED_STEPS,
    objective_keys,
    run_config,
    samples_of,
    start_weights,
)
from tests.matrix.truth import Distance, Truth, relative, weight_distances
from tests.micro_steps import cpu_adam


@dataclass
class Measured(Distance):
    """How far a cell is from its reference, and what it did."""

    flipped_draws: int
    skipped_steps: int
    seconds: float


class Mismatch(Exception):
    """A cell did something else than its reference."""


class DrawInjector:
    """Replaces what a generator draws by the reference's draws, and counts the difference.

    The first loss that is `poisoned` becomes infinite.
    """

    def __init__(self, generator):
        self.expected, self.flipped, self.poisoned = [], 0, False
        self.handle = generator.register_forward_hook(self.replace)

    def replace(self, _module, arguments, output):
        """Take the next micro batch's draws."""
        drawn = self.expected.pop(0)
        valid = arguments[3]
        self.flipped += int(((drawn != output.drawn_BK) & valid).sum())
        output = output._replace(drawn_BK=drawn)
        if self.poisoned:
            output = output._replace(loss_sum=output.loss_sum * float("inf"))
        self.poisoned = False
        return output


@contextlib.contextmanager
def surroundings(cell: Cell, stands_in=False):
    """Undo what DeepSpeed changes for the whole process, and let fp16 run if it must be patched."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast

    with contextlib.ExitStack() as stack:
        linear = torch.nn.functional.linear
        stack.enter_context(mock.patch.object(torch.nn.functional, "linear", linear))
        for name in ("TORCH_AUTOCAST_INITIALIZED", "TORCH_AUTOCAST_DTYPE"):
            value = getattr(torch_autocast, name)
            stack.enter_context(mock.patch.object(torch_autocast, name, value))
        if cell.is_patched():
            kind = type(get_accelerator())
            stack.enter_context(mock.patch.object(kind, "is_fp16_supported", return_value=True))
        if stands_in:
            overlay = DeepSpeedConfig.overlay
            stack.enter_context(mock.patch.object(engine, "_cpu_adam", return_value=cpu_adam))
            stack.enter_context(
                mock.patch.object(
                    DeepSpeedConfig,
                    "overlay",
                    lambda *given: overlay(*given) | {"zero_force_ds_cpu_optimizer": False},
                )
            )
        yield


def measure(cell: Cell, truth: Truth, world, stands_in=False) -> Measured:
    """Train a cell on all ranks; every rank returns the same figures."""
    started = time.perf_counter()
    with surroundings(cell, stands_in):
        run = Run(cell, truth, world)
        try:
            for number in range(STEPS):
                run.step(number)
            weight, update = run.weight_differences()
        finally:
            run.end()
    figures = [run.loss, run.norm, weight, update, run.first_loss, run.first_norm]
    worst = torch.tensor(figures, dtype=torch.float64)
    flipped = torch.tensor(run.injector.flipped)
    if world.world_size > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        dist.all_reduce(flipped)
    seconds = time.perf_counter() - started
    return Measured(
        *worst.tolist(), flipped_draws=int(flipped), skipped_steps=run.skipped, seconds=seconds
    )


class Run:
    """A cell between its start and its end."""

    def __init__(self, cell: Cell, truth: Truth, world) -> None:
        self.cell, self.truth, self.world = cell, truth, world
        self.config = run_config(cell.update, cell.recomputation)
        self.keys = objective_keys(self.config)
        pair = small_pair(config=self.config)
        self.starts = start_weights(pair)
        ds = cell.deepspeed_config()
        self.plan = ds.batch_plan(world.world_size)
        self.engines = engine.start_engines(
            pair.trained_modules(),
            optimizer=self.config.optimizer,
            ds=ds,
            plan=self.plan,
            world=world,
        )
        self.injector = DrawInjector(pair.generator)
        self.train = build_step(
            self.engines,
            pair,
            self.config.objective,
            seed=SEED,
            plan=self.plan,
            world=world,
        )
        self.loss = self.norm = self.first_loss = self.first_norm = 0.0
        self.skipped = 0

    def step(self, number):
        """Train on one step and compare it."""
        micro = self.plan.train_micro_batch_size_per_gpu
        samples = [
            samples_of(number, micro_step, self.world.rank, micro, self.world.world_size)
            for micro_step in range(self.plan.gradient_accumulation_steps)
        ]
        first = samples_of(number, 0, 0, micro, 1).start
        drawn = self.truth.drawn[number]
        self.injector.expected = [drawn[each.start - first : each.stop - first] for each in samples]
        poisoned = self.cell.precision == "fp16" and number in POISONED_STEPS
        self.injector.poisoned = poisoned and self.world.is_main
        factor = learning_rate_factor(number, self.config.schedule)

        def prepare(name):
            set_learning_rates(self.engines.by_name[name], self.config.optimizer, factor)

        batches = [sequence_batch(each) for each in samples]
        result = self.train(number, batches, self.keys, prepare)
        figures = ratios(result.sums, "train")
        expected = self.truth.losses[number].tolist()
        ours = (figures["train/mlm_loss"], figures["train/rtd_loss"])
        loss, norms = max(map(relative, ours, expected)), [0.0]
        for name, outcome in result.outcomes.items():
            norm = float(self.truth.norms[name][number])
            if outcome.applied != (norm == norm):
                raise Mismatch(f"step {number}: {name} applied {outcome.applied}, norm {norm}")
            self.skipped += not outcome.applied
            if outcome.applied:
                norms.append(relative(outcome.grad_norm, norm))
        self.loss, self.norm = max(self.loss, loss), max(self.norm, *norms)
        if number < UNCHANGED_STEPS:
            self.first_loss = max(self.first_loss, loss)
            self.first_norm = max(self.first_norm, *norms)

    def weight_differences(self):
        """Largest differences of the final weights; a collective."""
        names = list(self.truth.weights)
        # Of each parameter: squares of difference, count, and the largest difference.
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        largest = torch.zeros(len(names), dtype=torch.float64)
        for engine_name, one in self.engines.by_name.items():
            for name, start, ours in self.local_weights(one):
                row = names.index(f"{engine_name}/{name}")
                theirs = self.truth.weights[names[row]].flatten()[start : start + ours.numel()]
                difference = (ours.double() - theirs.double()).abs()
                sums[row] += torch.tensor([float(difference.square().sum()), ours.numel()])
                largest[row] = difference.max()
        if self.world.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(sums, dist.ReduceOp.MAX if self.cell.stage == 0 else dist.ReduceOp.SUM)
        for row, name in enumerate(names):
            if int(sums[row, 1]) != self.truth.weights[name].numel():
                raise Mismatch(f"{int(sums[row, 1])} elements of {name} are somewhere")
        return weight_distances(
            self.truth,
            self.starts,
            dict(zip(names, largest.tolist(), strict=True)),
            dict(zip(names, sums[:, 0].tolist(), strict=True)),
        )

    def local_weights(self, one):
        """(name, first element, values) of the fp32 weights that this rank holds."""
        if self.cell.stage == 0:  # every rank has them all; each is compared
            for name, parameter in one.module.named_parameters():
                yield name, 0, parameter.detach().flatten()
            return
        for part in local_slices(one, self.world.rank):
            yield part.name, part.start, part.tensors[WEIGHT]

    def end(self):
        """Let go of the engines: the next cell needs the memory and none of the hooks."""
        self.injector.handle.remove()
        for one in self.engines.by_name.values():
            one.destroy()
        self.engines.by_name.clear()
        del self.train
