"""One encoder layer on a CPU, both passes, with dropout: ours, compiled or not, and others.

Masks of dropout are functions of the place, and cost torch many small operations; compiled, they
are one. What a GPU does with the same layers is measured by `gpu.py --part layer`.
"""

import torch

from tests.benchmarks.attention_variants import Shape, layer_variants
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure

SHAPE = Shape(sequences=4, length=256, heads=8)
ROUNDS = 7
OURS, UNCOMPILED = "ours, torch, compiled layer", "ours, torch"
PEERS = ("transformers", "transformers, compiled")


def benchmark(_device: str) -> Outcome:
    device, dtype = torch.device("cpu"), torch.float32
    builders = layer_variants(SHAPE, device, dtype)
    inputs = SHAPE.inputs(device, dtype)

    def case(name):
        forward = builders[name]()
        weights = [*inputs, *forward.module.parameters()]

        def train():
            torch.autograd.grad(forward(*inputs).sum(), weights)

        return Case(name, train, optional="compiled" in name)

    cases = [case(name) for name in (OURS, UNCOMPILED, *PEERS)]
    seconds, notes = measure(cases, ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="layer",
        unit="tokens",
        work=SHAPE.tokens,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[(OURS, peer) for peer in (*PEERS, UNCOMPILED)],
        shape={**vars(SHAPE), "dtype": "float32"},
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=("cpu",))
