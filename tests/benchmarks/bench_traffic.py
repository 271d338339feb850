"""What one layer of large moves and its step computes, counted on meta tensors (`traffic`).

No time is measured and no device is needed; the figures are the same on every machine. Products
with weights, which any implementation has, are about 200 KiB a token of them.
"""

from tests.benchmarks.rounds import Outcome, main
from tests.benchmarks.traffic import (
    HEADS,
    LENGTH,
    SEQUENCES,
    WIDTH,
    our_traffic,
    step_flops,
    transformers_traffic,
)

OURS = (("eager", False), ("torch", False), ("torch", True), ("triton", True))


def benchmark(_device: str) -> Outcome:
    facts = {}
    for dropout in (0.0, 0.1):
        counted = {"transformers": transformers_traffic(dropout)}
        for backend, compiles in OURS:
            name = f"ours, {backend}{', compiled layer' if compiles else ''}"
            counted[name] = our_traffic(backend, compiles=compiles, dropout=dropout)
        for name, traffic in counted.items():
            facts[f"KiB a token, dropout {dropout:g}, {name}"] = traffic.kib_per_token
            facts[f"kernels, dropout {dropout:g}, {name}"] = float(traffic.launches)
    flops = step_flops()
    facts["GFLOP a token of large, counted"] = flops.counted / 1e9
    facts["GFLOP a token of large, formula"] = flops.formula / 1e9
    facts["counted / formula, less what it leaves out"] = flops.minimal / flops.formula
    return Outcome(
        benchmark="traffic",
        unit="bytes",
        work=0.0,
        clock="none",
        seconds={},
        pairs=[],
        shape={"sequences": SEQUENCES, "length": LENGTH, "hidden": WIDTH, "heads": HEADS},
        facts=facts,
    )


if __name__ == "__main__":
    main(benchmark, devices=("cpu",))
