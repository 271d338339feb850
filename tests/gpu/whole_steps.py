"""How often the host waits for a GPU in whole optimizer steps of real engines; prints JSON.

    python -m tests.gpu.whole_steps [--device cpu]

A process can start one world on one device, so `test_device_habits` starts this one. On a CPU,
which no host waits for, it only shows that it runs.
"""

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ObjectiveSection
from pipeline.runtime import World, start_world
from pipeline.training_step import StepHooks
from tests.engines import rig, sequence_batches

CELLS = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp16"), (3, "bf16")]
CELLS_OF_A_CPU = [(0, "fp32"), (1, "bf16")]


class Waits:
    """Listens to a step's marks, and writes down under each where torch says that the host waits.

    Attributes:
        found: Phase -> file:line of every wait in it; phases without one are there too.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._phase = ""
        self.found: dict[str, list[str]] = {}

    def mark(self, phase: str, _step: int) -> None:
        """Begin a phase, as a step announces it."""
        self._phase = phase.rstrip("0123456789 ")
        self.found.setdefault(self._phase, [])

    def _show(self, message: Any, _kind: Any, filename: str, line: int, *_rest: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            self.found[self._phase].append(f"{'/'.join(Path(filename).parts[-2:])}:{line}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Count what is done inside, and nothing from before."""
        self.found.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._show
            if self._on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self._on_gpu:
                    torch.cuda.set_sync_debug_mode("default")


def waits_of_a_step(world: World, stage: int, precision: str, update: str) -> dict[str, list[str]]:
    """What `Waits` finds in the third step: tables, buffers and traces are made in those before."""
    waits = Waits(world.device.type == "cuda")
    objective = ObjectiveSection(update="joint" if update == "joint" else "decoupled")
    hooks = StepHooks(mark=waits.mark)
    one = rig(world, objective=objective, hooks=hooks, stage=stage, precision=precision)
    for step in range(2):
        one.run(step)
    batches = sequence_batches(2, one.plan)
    with waits.listening():
        one.step(2, batches, one.keys, one.prepare())
    return waits.found


def main(device: str) -> int:
    """Print, for every cell, what each phase of a step waited for."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ["LOCAL_RANK"] = "0"
    world = World.from_environment()
    assert world.device.type == device, f"this process computes on {world.device}"
    start_world(world)
    cells = CELLS if device == "cuda" else CELLS_OF_A_CPU
    found = {}
    for update in ("decoupled", "joint"):
        for stage, precision in cells:
            name = f"{update}, stage {stage}, {precision}"
            found[name] = waits_of_a_step(world, stage, precision, update)
    json.dump({"device": device, "waits": found}, sys.stdout)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    sys.exit(main(parser.parse_args().device))
