"""Reading ahead: the next steps' batches, while the device computes."""

import queue
import threading

from pipeline.data import SequenceBatch, TrainBatches


class Prefetcher:
    """Reads the batches of the next steps in a thread while the device computes."""

    def __init__(self, batches: TrainBatches, first_step: int, last_step: int, depth: int = 4):
        """Start reading.

        Args:
            batches: What to read.
            first_step: First step to read.
            last_step: Step before which to stop.
            depth: Steps to read ahead.
        """
        self._queue: queue.Queue[list[SequenceBatch] | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._read, args=(batches, first_step, last_step), name="prefetch", daemon=True
        )
        self._thread.start()

    def _read(self, batches: TrainBatches, first_step: int, last_step: int) -> None:
        item: list[SequenceBatch] | Exception
        for step in range(first_step, last_step):
            try:
                item = batches.at_step(step)
            except Exception as error:  # carried to the training thread, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, Exception):
                return

    def next(self) -> list[SequenceBatch]:
        """Wait for the next step's micro batches.

        Returns:
            One batch a micro step, in step order.

        Raises:
            CorruptError: The data that was read is not what was written; every later call raises
                the same error, because nothing is read behind it.
        """
        if self._error is not None:
            raise self._error
        item = self._queue.get()
        if isinstance(item, Exception):
            self._error = item
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join()
