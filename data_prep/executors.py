"""Where the work of `build` runs: one interface, so that the work does not know.

    Executor.run(task, items)   yields results as they complete, in any order
    run_in_pool                 the same over any pool of `concurrent.futures`, in bounded memory

A task is a picklable function of one item that leaves its result on disk; what it returns is only
a report of a few numbers. The build looks at the disk afterwards, so workers may be killed at any
time.

    ProcessExecutor             a pool of processes on this machine
    mpi_executor.MpiExecutor    the ranks that mpirun started, on any number of machines

SLURM array tasks (`array_build`) each run their share in a pool of processes.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures import Executor as FuturesPool
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from data_prep.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(UserError):
    """A worker process vanished; what was finished is kept, and the same command goes on."""

    exit_code = 1


class Executor(Protocol):
    """Runs independent tasks somewhere."""

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Run a task on every item.

        Args:
            task: picklable function; its effects must be idempotent and atomic.
            items: what to call it with.

        Returns:
            The results in order of completion.

        Raises:
            WorkerDiedError: a worker vanished.
        """
        ...


def run_in_pool(
    pool: FuturesPool,
    num_workers: int,
    task: Callable[[Item], Result],
    items: Iterable[Item],
    pending: set[Future[Any]],
) -> Iterator[Result]:
    """Run a task on every item; at most two items a worker are handed out ahead.

    So neither the items nor the results of a large corpus are ever in memory at once.

    Args:
        pool: any pool of `concurrent.futures`.
        num_workers: its workers.
        task: picklable function.
        items: what to call it with; drawn only as workers need them.
        pending: filled with what is handed out, for those who have to clear up after an error.

    Yields:
        The results in order of completion.
    """
    remaining = iter(items)
    pending |= {pool.submit(task, item) for item in islice(remaining, 2 * num_workers)}
    while pending:
        done = wait(pending, return_when=FIRST_COMPLETED).done
        pending -= done
        pending |= {pool.submit(task, item) for item in islice(remaining, len(done))}
        yield from (future.result() for future in done)


class ProcessExecutor:
    """A pool of fresh processes on this machine.

    Processes are spawned, not forked: the parent may hold threads (a progress bar), and forking
    those is how programs hang.

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
        try:
            yield from run_in_pool(pool, self._num_workers, task, items, set())
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
