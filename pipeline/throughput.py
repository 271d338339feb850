"""Tokens a second, MFU, waiting for data and memory, between two rows of metrics."""

import time
from collections.abc import Callable

import psutil
import torch

from pipeline.config import RunConfig
from pipeline.flops import peak_flops, training_flops_per_token
from pipeline.runtime import World


class Throughput:
    """Measures throughput between rows, without evaluations and commits."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Start the clock.

        Args:
            config: The run.
            world: This process's place.
        """
        self._config = config
        self._device = world.device
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        rate = peak_flops(name)
        self._peak_flops = rate * world.world_size if rate else None
        self._reset()

    def _reset(self) -> None:
        self._started_seconds = time.monotonic()
        self._waited_seconds = 0.0
        self._steps = 0
        self._tokens = 0
        self._flops = 0.0

    def waiting_for_data(self) -> "_Stopwatch":
        """Wait for a step's data.

        Returns:
            A context whose time counts as waiting.
        """
        return _Stopwatch(self._add_wait)

    def count_step(self, train_batch_size: int, sequence_length: int) -> None:
        """Count the work of a step.

        Args:
            train_batch_size: Its sequences.
            sequence_length: Their tokens.
        """
        tokens = train_batch_size * sequence_length
        self._steps += 1
        self._tokens += tokens
        self._flops += tokens * training_flops_per_token(self._config, sequence_length)

    def paused(self) -> "_Stopwatch":
        """Do something that is not training.

        Returns:
            A context whose time is left out of the interval.
        """
        return _Stopwatch(self._skip)

    def _add_wait(self, seconds: float) -> None:
        self._waited_seconds += seconds

    def _skip(self, seconds: float) -> None:
        self._started_seconds += seconds

    def take(self) -> dict[str, float]:
        """Read the figures since the last row and start over.

        Returns:
            The `perf/*` figures; `perf/mfu` where the device's peak is known.
        """
        seconds = max(1e-9, time.monotonic() - self._started_seconds)
        figures = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/data_wait_fraction": self._waited_seconds / seconds,
            "perf/step_seconds": seconds / max(1, self._steps),
            "perf/memory_gib": _memory_bytes(self._device) / 2**30,
        }
        if self._peak_flops:
            figures["perf/mfu"] = self._flops / seconds / self._peak_flops
        self._reset()
        return figures


class _Stopwatch:
    """Reports the seconds spent in a with-block."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report

    def __enter__(self) -> None:
        self._entered_seconds = time.monotonic()

    def __exit__(self, *_exception: object) -> None:
        self._report(time.monotonic() - self._entered_seconds)


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: the GPU's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
