"""What lay in a GPU's memory during one step, and which line of code put it there.

    deberta train ... --memory-snapshot 10

records every allocation of the tenth step of a start of the run, as numbered in metrics.jsonl, and
writes RUN/profile/rank-00000-step-10.memory.pickle, which https://pytorch.org/memory_viz draws. The
page reads it in the browser; this program never reads it. Like the profiler, it listens to the
run's marks.
"""

import logging
import threading
from pathlib import Path

import torch

from data_prep.errors import UserError
from pipeline.profiling import FIRST_PART
from pipeline.terminal import tell

MAX_ALLOCATIONS = 1_000_000
"""Older ones of a step are forgotten; a step of large has about 30,000."""

logger = logging.getLogger(__name__)


def parse_step(text: str) -> int:
    """Read the step of --memory-snapshot.

    Args:
        text: A number.

    Returns:
        The step, counted from 1.

    Raises:
        UserError: Anything else.
    """
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--memory-snapshot {text}: give the number of a step, counted from 1")
    return int(text)


class MemorySnapshot:
    """Records the allocations of one step; listens to the run's marks.

    Args:
        folder: The run folder.
        device: Where the step runs.
        rank: This rank, for the file's name.
        step: Its number, counted from 1.
    """

    def __init__(self, folder: Path, device: torch.device, rank: int, step: int) -> None:
        self.path = folder / "profile" / f"rank-{rank:05d}-step-{step}.memory.pickle"
        self._step = step
        self._thread = threading.get_ident()
        self._is_recording = False
        self._is_over = device.type != "cuda"
        if self._is_over:
            logger.warning("--memory-snapshot %d needs a GPU: no snapshot is written", step)

    def mark(self, phase: str, step: int) -> None:
        """Learn what the run does now.

        Args:
            phase: As for `Watchdog.mark`.
            step: Completed optimizer steps.
        """
        if self._is_over or phase != FIRST_PART or threading.get_ident() != self._thread:
            return
        if self._is_recording:
            self._write()
        elif step + 1 == self._step:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, stacks="python")
            self._is_recording = True

    def close(self) -> None:
        """Write what is being recorded; say so where the step never came."""
        if self._is_recording:
            self._write()
        elif not self._is_over:
            logger.warning("--memory-snapshot %d: this start did not train that step", self._step)

    def _write(self) -> None:
        self._is_recording, self._is_over = False, True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self.path))
        torch.cuda.memory._record_memory_history(enabled=None)
        tell(f"memory snapshot: {self.path}, for pytorch.org/memory_viz")
