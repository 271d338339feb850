"""Where the work of `build` runs: one interface, so that the work does not know.

    Executor.run(task, items)   yields results as they complete, in any order

A task is a picklable function of one item that leaves its result on disk; what it returns is only
a report. The build looks at the disk afterwards, so an executor may run any subset of the items
(the share of one machine) and be killed at any time.

    ProcessExecutor             a pool of processes on this machine
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Protocol, TypeVar

from data_prep.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(UserError):
    """A worker process vanished; what was finished is kept, and the same command goes on."""

    exit_code = 1


class Executor(Protocol):
    """Runs independent tasks somewhere."""

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Run a task on every item of this executor's share.

        Args:
            task: picklable function; its effects must be idempotent and atomic.
            items: what to call it with.

        Returns:
            The results in order of completion.

        Raises:
            WorkerDiedError: a worker vanished.
        """
        ...


class ProcessExecutor:
    """A pool of fresh processes on this machine.

    Processes are spawned, not forked: the parent may hold threads (a progress bar), and forking
    those is how programs hang. At most two items a worker are handed out ahead, so that memory
    does not depend on the number of items.

    Args:
        num_workers: processes that work at the same time.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise UserError(f"--workers {num_workers}: at least 1 worker is needed")
        self._num_workers = num_workers

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See `Executor.run`; closing the iterator early stops the workers at once."""
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(
            self._num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_die_with_parent,
        )
        remaining = iter(items)
        try:
            pending = {pool.submit(task, i) for i in islice(remaining, 2 * self._num_workers)}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {pool.submit(task, i) for i in islice(remaining, len(done))}
                yield from (future.result() for future in done)
        except BaseException as error:
            # Results are atomic files, so nothing is lost by not waiting for the rest; an unkilled
            # worker would keep the interpreter from ending.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            if isinstance(error, BrokenProcessPool):
                # Told by the pool when a result is asked for, or when the next item is handed in.
                raise WorkerDiedError(
                    "a worker process died without a word: it was killed, most often for lack of "
                    "memory (each needs up to 1.5 GiB; lower --workers). Finished units are kept: "
                    "run the same command again to continue"
                ) from error
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """Set up a worker: it leaves Ctrl-C to its parent, and never outlives it.

    A pool's worker waits on a pipe that it holds open itself, so it would wait for ever after its
    parent was killed; and a working one would go on writing into a folder that a new build owns.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
