"""The attention alone on a CPU, forward and backward, without dropout: our two backends and others.

A processor's caches hide what memory traffic costs on a GPU, so that these times say little; what
is moved is counted by `bench_traffic`, and a GPU is measured by `gpu.py --part attention`.
"""

import torch

from tests.benchmarks.attention_variants import EAGER, Shape, attention_variants
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure

SHAPE = Shape(sequences=4, length=256, heads=8, dropout=0.0)
ROUNDS = 7
REPEATS = 3
OURS = ("ours, torch", "ours, eager")


def benchmark(_device: str) -> Outcome:
    device, dtype = torch.device("cpu"), torch.float32
    builders = attention_variants(SHAPE, device)
    inputs = SHAPE.inputs(device, dtype)

    def case(name):
        forward = builders[name]()

        def train():
            for _ in range(REPEATS):
                torch.autograd.grad(forward(*inputs).sum(), inputs)

        return Case(name, train)

    seconds, notes = measure([case(name) for name in (*OURS, EAGER)], ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="attention",
        unit="tokens",
        work=SHAPE.tokens * REPEATS,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[(OURS[0], EAGER), OURS],
        shape={**vars(SHAPE), "dtype": "float32"},
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=("cpu",))
