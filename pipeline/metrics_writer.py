"""Rows of metrics.jsonl and TensorBoard: the same numbers, and no row is lost to a full disk."""

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from pipeline import faults

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows to metrics.jsonl and TensorBoard; rank 0 only.

    A row that cannot be written waits in memory for the next one: training goes on. A commit waits
    for the rows before it (`sync`), because the run that continues it will not repeat them.
    """

    def __init__(self, metrics: Path, tensorboard: Path, purge_step: int) -> None:
        """Open both.

        Args:
            metrics: The jsonl file; rows are appended.
            tensorboard: Folder of event files.
            purge_step: TensorBoard hides earlier rows from this step on.
        """
        self._path, self._folder = metrics, tensorboard
        self.reopen(purge_step)

    def reopen(self, purge_step: int) -> None:
        """Go on behind what the file holds now, after somebody has cut it.

        Args:
            purge_step: TensorBoard hides earlier rows from this step on.
        """
        from torch.utils.tensorboard import SummaryWriter  # costs a second to import

        self._file = self._path.open("ab", buffering=0)
        self._safe_bytes = self._file.seek(0, os.SEEK_END)
        self._waiting = b""
        self._tensorboard = SummaryWriter(str(self._folder), purge_step=purge_step)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Write one row.

        Args:
            step: Completed optimizer steps.
            figures: name -> number; one that is not finite is null in the file, as JSON has no
                other word for it.
        """
        row = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._waiting += (json.dumps({"step": step, **row}) + "\n").encode()
        try:
            faults.reach("metrics.write", step)
            self._write_waiting()
        except OSError as error:
            logger.warning(
                "%s: %s; %d bytes of rows wait in memory, the next row tries again",
                *(self._path, error, len(self._waiting)),
            )
        try:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            self._restart_tensorboard(step, error)

    def _write_waiting(self) -> None:
        """Write what waits as a whole, or leave the file as it was."""
        try:
            written = 0
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._safe_bytes)
            raise
        self._safe_bytes += len(self._waiting)
        self._waiting = b""

    def _restart_tensorboard(self, step: int, error: OSError) -> None:
        """Begin another event file: a writer that failed once refuses everything from then on."""
        from torch.utils.tensorboard import SummaryWriter

        logger.warning("%s: %s; figures until step %d may be missing", self._folder, error, step)
        with contextlib.suppress(OSError):
            self._tensorboard.close()
        with contextlib.suppress(OSError):  # no room for it either: the next row tries again
            self._tensorboard = SummaryWriter(str(self._folder))

    def sync(self) -> None:
        """Make the rows as durable as the commit that follows.

        Raises:
            OSError: Rows cannot be written; they are still in memory.
        """
        self._write_waiting()
        os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):  # told by the next row
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close both."""
        with contextlib.suppress(OSError):
            self._write_waiting()
        self._file.close()
        with contextlib.suppress(OSError):
            self._tensorboard.close()
