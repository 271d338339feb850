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

    def __init__(self, config: RunConfig, train_batch_size: int, world: World) -> None:
        """Start measuring.

        Args:
            config: The run.
            train_batch_size: Sequences in one optimizer step.
            world: This process's place.
        """
        self._tokens_per_step = train_batch_size * config.data.sequence_length
        self._flops_per_token = training_flops_per_token(config)
        self._device = world.device
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        rate = peak_flops(name)
        self._peak_flops = rate * world.world_size if rate else None
        self._first_step: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._started_seconds = time.monotonic()
        self._waited_seconds = 0.0
        self._steps = 0

    def waiting_for_data(self) -> "_Stopwatch":
        """Begin a step by waiting for its data.

        Returns:
            A context whose time counts as waiting.
        """
        self._steps += 1
        return _Stopwatch(self._add_wait)

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
        rate = self._steps * self._tokens_per_step / seconds
        figures = {
            "perf/tokens_per_second": rate,
            "perf/data_wait_fraction": self._waited_seconds / seconds,
            "perf/step_seconds": seconds / max(1, self._steps),
            "perf/memory_gib": _memory_bytes(self._device) / 2**30,
        }
        if self._peak_flops:
            figures["perf/mfu"] = rate * self._flops_per_token / self._peak_flops
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
