"""Clock and memory of a device: two ways of one work in interleaved rounds."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from tests.benchmarks.rounds import Case, device_seconds, measure

ROUND_SECONDS = {"cuda": 0.1, "cpu": 0.02}
"""How long a case runs in a round, so that a clock's grain does not count."""
ROUNDS = {"cuda": 7, "cpu": 2}


class Bench:
    """Clock and memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.clock: Callable[[], float] = device_seconds if self.on_gpu else time.perf_counter

    def repeats(self, run: Callable[[], object]) -> int:
        """How often a case runs in a round; the first calls compile."""
        for _ in range(2):
            run()
        start = self.clock()
        run()
        return max(1, int(ROUND_SECONDS[self.device.type] / max(1e-6, self.clock() - start)))

    def compare(self, ours: Callable[[], object], peer: Callable[[], object]) -> dict[str, float]:
        """Seconds of both, and how many times the peer's rate ours reaches."""
        times = {"ours": self.repeats(ours), "peer": self.repeats(peer)}

        def case(name: str, run: Callable[[], object]) -> Case:
            return Case(name, lambda: [run() for _ in range(times[name])])

        cases = [case("ours", ours), case("peer", peer)]
        seconds, _ = measure(cases, ROUNDS[self.device.type], self.clock)
        each = {name: [s / times[name] for s in values] for name, values in seconds.items()}
        rounds = zip(each["peer"], each["ours"], strict=True)
        return {
            "ours": statistics.median(each["ours"]),
            "peer": statistics.median(each["peer"]),
            "ratio": statistics.median(theirs / mine for theirs, mine in rounds),
        }

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Most memory on top of what is allocated before; None where nobody counts it."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clean(self) -> None:
        """Give back what the cell before has left."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
