"""Where the time of some steps went: a trace for TensorBoard or Perfetto, and a table by part.

A run tells what it does next by marks (`Watchdog.mark`): data, masks, generator forward, generator
backward, generator update, discriminator forward, ..., sums, evaluate, save. A profiler listens to
them: between two marks lies a part of the step. Each part becomes a range of the trace, and a row
of the table with its time on the host and, by events in the stream, on the GPU. Nothing waits for
the device before the last profiled step has ended.

    deberta train ... --profile 10-12

writes RUN/profile/rank-00000-steps-10-12.pt.trace.json.gz and .md; steps are numbered as in
metrics.jsonl. What has a name of its own inside of a part, the vocabulary head and its draws,
stands below. A profiled step is slower than others: shares are worth more than times.
"""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_prep.errors import UserError
from pipeline.modeling.vocabulary_head import DRAW_RANGE, HEAD_RANGE
from pipeline.terminal import tell

FIRST_PART = "data"
"""With it a step begins."""

logger = logging.getLogger(__name__)


def parse_steps(text: str) -> range:
    """Read the steps of --profile.

    Args:
        text: "12", or "10-12" for the tenth to the twelfth step.

    Returns:
        Their numbers, counted from 1 as in metrics.jsonl.

    Raises:
        UserError: Anything else.
    """
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise UserError(f"--profile {text}: give a step or the first and the last one, as in 10-12")
    steps = range(int(first), int(last or first) + 1)
    if steps.start < 1 or not steps:
        raise UserError(
            f"--profile {text}: steps count from 1, and the last is not before the first"
        )
    return steps


@dataclass(frozen=True)
class PartTime:
    """Where a part's time went, over all profiled steps."""

    part: str
    calls: int
    host_seconds: float
    device_seconds: float | None
    """None where there is no GPU, whose work the host does not wait for."""


class _Boundary:
    """The moment of a mark, on the host and in the stream."""

    def __init__(self, part: str, on_gpu: bool) -> None:
        self.part = part
        self.host_seconds = time.perf_counter()
        self.event = None
        if on_gpu:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()


def part_of(phase: str) -> str:
    """Name the part of a phase, whose number is that of the micro step.

    Args:
        phase: For example "generator forward 3".

    Returns:
        For example "generator forward".
    """
    return phase.rstrip("0123456789 ")


class StepProfiler:
    """Profiles some steps of a run; listens to its marks.

    Args:
        folder: The run folder.
        device: Where the steps run.
        rank: This rank, for the names of files.
        steps: Their numbers, counted from 1.
    """

    def __init__(self, folder: Path, device: torch.device, rank: int, steps: range) -> None:
        self._stem = folder / "profile" / f"rank-{rank:05d}-steps-{steps[0]}-{steps[-1]}"
        self._steps = steps
        self._on_gpu = device.type == "cuda"
        self._thread = threading.get_ident()
        self._boundaries: list[_Boundary] = []
        self._range: record_function | None = None
        self._profiler: profile | None = None
        self._is_over = False
        if self._on_gpu:
            with self._new_profiler():  # starting it takes seconds for the first time
                pass

    def _new_profiler(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        return profile(activities=activities)

    def mark(self, phase: str, step: int) -> None:
        """Learn what the run does now.

        Args:
            phase: As for `Watchdog.mark`.
            step: Completed optimizer steps.
        """
        # Commits that are written beside training mark from their own thread.
        if self._is_over or threading.get_ident() != self._thread:
            return
        part = part_of(phase)
        if part == FIRST_PART and self._profiler is not None and step >= self._steps[-1]:
            self._end()
        elif part == FIRST_PART and self._profiler is None and step + 1 in self._steps:
            self._profiler = self._new_profiler()
            self._profiler.start()
        if self._profiler is not None and not self._is_over:
            self._begin_part(part)

    def _begin_part(self, part: str) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._boundaries.append(_Boundary(part, self._on_gpu))
        self._range = record_function(part)
        self._range.__enter__()

    def close(self) -> None:
        """End what is still being profiled; say so where nothing was."""
        if self._profiler is not None and not self._is_over:
            self._end()
        elif self._profiler is None:
            first, last = self._steps[0], self._steps[-1]
            logger.warning("--profile %d-%d: this start trained none of these steps", first, last)

    def _end(self) -> None:
        """Stop, write both files, and listen no more."""
        assert self._profiler is not None
        assert self._range is not None
        self._is_over = True
        self._range.__exit__(None, None, None)
        self._boundaries.append(_Boundary("", self._on_gpu))
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.stop()
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        trace = self._stem.with_name(f"{self._stem.name}.pt.trace.json.gz")
        self._profiler.export_chrome_trace(str(trace))
        text = table(self.part_times(), self._inner_times(), self._count_steps())
        self._stem.with_name(f"{self._stem.name}.md").write_text(text, encoding="utf-8")
        tell(f"profile of {self._count_steps()} steps: {trace}, and a table by part beside it")

    def _count_steps(self) -> int:
        return sum(boundary.part == FIRST_PART for boundary in self._boundaries)

    def part_times(self) -> list[PartTime]:
        """Add up the time between marks; the device must have finished.

        Returns:
            One row a part, in the order of their first appearance.
        """
        host: dict[str, list[float]] = {}
        device: dict[str, float] = {}
        for left, right in zip(self._boundaries, self._boundaries[1:], strict=False):
            host.setdefault(left.part, []).append(right.host_seconds - left.host_seconds)
            if left.event is not None and right.event is not None:
                elapsed_seconds = left.event.elapsed_time(right.event) / 1000
                device[left.part] = device.get(left.part, 0.0) + elapsed_seconds
        return [
            PartTime(part, len(seconds), sum(seconds), device.get(part))
            for part, seconds in host.items()
        ]

    def _inner_times(self) -> list[PartTime]:
        """Ranges inside of parts that have a name of their own."""
        assert self._profiler is not None
        rows = []
        for event in self._profiler.key_averages():
            if event.key in (HEAD_RANGE, DRAW_RANGE) and event.cpu_time_total:
                device_seconds = event.device_time_total / 1e6 if self._on_gpu else None
                host_seconds = event.cpu_time_total / 1e6
                rows.append(PartTime(event.key, event.count, host_seconds, device_seconds))
        return rows


def table(parts: Iterable[PartTime], inner: Iterable[PartTime], steps: int) -> str:
    """Write the parts of the step as a Markdown table.

    Args:
        parts: What a step consists of.
        inner: Ranges inside of parts, which are not added again.
        steps: How many steps were profiled.

    Returns:
        The table: milliseconds a step, and shares of the whole on the device, or on the host where
        there is none.
    """
    parts = list(parts)
    on_gpu = all(part.device_seconds is not None for part in parts)
    whole = sum((part.device_seconds if on_gpu else part.host_seconds) or 0.0 for part in parts)

    def row(name: str, each: PartTime) -> str:
        device = each.device_seconds
        counted = (device if on_gpu else each.host_seconds) or 0.0
        figures = [
            f"{each.calls / steps:g}",
            f"{1000 * each.host_seconds / steps:.2f}",
            "" if device is None else f"{1000 * device / steps:.2f}",
            f"{counted / whole:.1%}",
        ]
        return f"| {name} | {' | '.join(figures)} |"

    total = PartTime(
        "", steps, sum(p.host_seconds for p in parts), whole if on_gpu and parts else None
    )
    lines = [
        "| part | calls a step | host ms a step | device ms a step | share |",
        "| --- | --- | --- | --- | --- |",
        *(row(part.part, part) for part in parts),
        row("**step**", total),
        *(row(f"of which {each.part}", each) for each in inner),
    ]
    return "\n".join(lines) + "\n"
