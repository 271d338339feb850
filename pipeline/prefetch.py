"""Reading ahead: the next steps' batches, while the device computes.

The thread does all that the host must do for a batch: order, reading, checking, and for a GPU the
copy to pinned memory, from which the training thread only starts transfers.

Whatever ends the reading thread reaches the training thread in the step that it belongs to, with
the step and its samples named; nobody waits for a thread that is gone.
"""

import contextlib
import queue
import threading

import torch

from data_prep.errors import CorruptError, UserError
from pipeline import faults
from pipeline.data import TrainBatches
from pipeline.sequences import SequenceBatch

_LOOK_SECONDS = 0.5
_NAMED_SAMPLES = 8
_CPU = torch.device("cpu")


class Prefetcher:
    """Reads the batches of the next steps in a thread while the device computes."""

    def __init__(
        self,
        batches: TrainBatches,
        first_step: int,
        last_step: int,
        depth: int = 4,
        device: torch.device = _CPU,
    ):
        """Start reading.

        Args:
            batches: What to read.
            first_step: First step to read.
            last_step: Step before which to stop.
            depth: Steps to read ahead.
            device: Where the batches will be moved to.
        """
        self._device = device
        self._queue: queue.Queue[list[SequenceBatch]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._next_step = first_step
        self._thread = threading.Thread(
            target=self._run, args=(batches, first_step, last_step), name="prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, batches: TrainBatches, first_step: int, last_step: int) -> None:
        """Read; an attribute and not the queue takes an error, so that it always gets through."""
        step = first_step
        try:
            if self._device.type == "cuda":
                # A new thread begins on device 0, where it would take memory of another rank.
                torch.cuda.set_device(self._device)
            # Closed by this thread: what reads ahead for it ends with it.
            with contextlib.closing(batches.in_order(first_step, last_step)) as steps:
                for step in range(first_step, last_step):
                    faults.reach("data.read", step)
                    micro_batches = next(steps)
                    if self._device.type == "cuda":
                        micro_batches = [batch.pinned() for batch in micro_batches]
                    self._put(micro_batches)
                    if self._closed.is_set():
                        return
        except BaseException as error:  # carried to the training thread, which raises it
            self._error = _named(error, batches, step)

    def _put(self, item: list[SequenceBatch]) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_LOOK_SECONDS)
            except queue.Full:
                continue

    def next(self) -> list[SequenceBatch]:
        """Wait for the next step's micro batches.

        Returns:
            One batch a micro step, in step order.

        Raises:
            CorruptError: The data that was read is not what was written, or could not be read;
                every later call raises the same error, because nothing is read behind it.
            RuntimeError: The thread has ended: behind the last step, or in a way that no thread
                should.
        """
        item = self._wait()
        if item is not None:
            self._next_step += 1
            return item
        if self._error is not None:
            raise self._error
        raise RuntimeError(f"nothing is read for step {self._next_step}")

    def _wait(self) -> list[SequenceBatch] | None:
        """What the thread has read next; None where it has ended and nothing is left."""
        while True:
            # Asked before the queue: what it holds after the thread has ended is all there will be.
            is_alive = self._thread.is_alive()
            try:
                return self._queue.get(timeout=_LOOK_SECONDS if is_alive else 0.0)
            except queue.Empty:
                if not is_alive:
                    return None

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join()


def _named(error: BaseException, batches: TrainBatches, step: int) -> BaseException:
    """An error that says for which step and samples the data was wanted."""
    where = f"while reading step {step}{_samples(batches, step)}"
    if isinstance(error, UserError):
        named = type(error)(f"{error}; {where}")
    elif isinstance(error, OSError):
        named = CorruptError(f"the dataset cannot be read: {error}; {where}. Look at its disk")
    elif isinstance(error, Exception):
        error.add_note(where)
        return error
    else:  # SystemExit and its like would end the training thread without a word
        named = RuntimeError(f"{type(error).__name__} {error} {where}")
    named.__cause__ = error
    return named


def _samples(batches: TrainBatches, step: int) -> str:
    """The first samples of this rank's share of a step, for a message."""
    try:
        epochs, samples = batches.samples_at(step, batches.rank)
    except Exception:  # whatever is wrong with the order has already been found by the reading
        return ""
    pairs = [f"{s} of epoch {e}" for e, s in zip(epochs.tolist(), samples.tolist(), strict=True)]
    more = len(pairs) - _NAMED_SAMPLES
    shown = ", ".join(pairs[:_NAMED_SAMPLES]) + (f" and {more} more" if more > 0 else "")
    return f" (samples {shown})"
