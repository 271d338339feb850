"""Tokens a second, MFU, waiting for data and memory between two rows; forward passes of a rank."""

import contextlib
import time
from collections.abc import Callable, Iterator

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
        self._step_started_seconds = time.monotonic()
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

    def count_step(self, train_batch_size: int, sequence_length: int) -> float:
        """Count the work of a step.

        Args:
            train_batch_size: Its sequences.
            sequence_length: Their tokens.

        Returns:
            Seconds since the step before it ended, without what was paused.
        """
        tokens = train_batch_size * sequence_length
        self._steps += 1
        self._tokens += tokens
        self._flops += tokens * training_flops_per_token(self._config, sequence_length)
        started_seconds, self._step_started_seconds = self._step_started_seconds, time.monotonic()
        return self._step_started_seconds - started_seconds

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
        self._step_started_seconds += seconds

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


class ForwardTimer:
    """Times this rank's forward passes without making the device wait.

    At ZeRO stages 0 to 2 a forward pass is the rank's own work. At stage 3 it gathers weights, so
    that every rank's takes as long as the slowest one's.
    """

    def __init__(self, device: torch.device) -> None:
        """Start from zero.

        Args:
            device: Where the passes run.
        """
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done inside."""
        if self._on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        started_seconds = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started_seconds

    def take_seconds(self) -> float:
        """Read the time since the last call and start over; the device must have finished.

        Returns:
            Seconds.
        """
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: the GPU's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
