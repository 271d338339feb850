"""The ranks of `mpirun` as workers: `mpirun -n 64 deberta-prep build ... --executor mpi`.

    mpi_ranks()    on rank 0: an executor; on the others: None, after they have worked for rank 0

mpi4py.futures gives MPI the interface of `concurrent.futures`: rank 0 plans, hands out units and
assembles; the others call functions for it. What travels is a unit (paths and ranges) and a few
numbers back. A rank that dies takes the world with it, because mpirun ends the others; the same
command then goes on with what is finished.

mpich and mpi4py come as wheels with `pip install 'deberta-pretrain[mpi]'`, mpirun included.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor as FuturesPool
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from data_prep.errors import UserError
from data_prep.executors import Item, Result, run_in_pool

INSTALL = "pip install 'deberta-pretrain[mpi]'"
GRACE_SECONDS = 10.0
"""After an error the other ranks may finish what they are at for so long; then MPI aborts them."""
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


class MpiExecutor:
    """The other ranks as a pool; alone in its world, rank 0 does the work itself.

    Args:
        pool: mpi4py's executor on rank 0.
        num_workers: ranks that work for it; 0 if there is no other.
    """

    def __init__(self, pool: FuturesPool, num_workers: int) -> None:
        self._pool = pool
        self.is_alone = num_workers == 0
        self._num_workers = max(1, num_workers)
        self._pending: set[Future[Any]] = set()

    def run(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See `Executor.run`."""
        yield from run_in_pool(self._pool, self._num_workers, task, items, self._pending)

    def stop(self) -> bool:
        """Take back what no rank has begun, and give the rest a little time.

        Returns:
            Whether no rank is at work any more.
        """
        for future in self._pending:
            future.cancel()
        return not wait(self._pending, GRACE_SECONDS).not_done


@contextmanager
def mpi_ranks() -> Iterator[MpiExecutor | None]:
    """Divide the world into rank 0 and its workers, for the body of a `with`.

    Yields:
        Rank 0: the executor. The others: None, when rank 0 has left its body.

    Raises:
        UserError: mpi4py or MPI is missing, or mpirun and mpi4py are of different MPIs.
    """
    try:
        MPI, MPICommExecutor = _import_mpi()
    except UserError as error:
        if _num_ranks(os.environ) > 1:
            _die_of(error)
        raise
    world = MPI.COMM_WORLD
    refuse_foreign_launcher(world.Get_size(), os.environ)
    if world.Get_rank():
        # Ctrl-C reaches every rank; rank 0 says what becomes of it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with MPICommExecutor(world, root=0) as pool:
        if pool is None:
            yield None
            return
        executor = MpiExecutor(pool, world.Get_size() - 1)
        try:
            yield executor
        except BaseException as error:
            if not executor.stop():
                _tell(error)
                world.Abort(_exit_code(error))
            raise


def refuse_foreign_launcher(world_size: int, environment: Mapping[str, str]) -> None:
    """Stop where several processes were started that do not know of each other.

    Args:
        world_size: ranks that MPI knows of.
        environment: variables of the launcher.

    Raises:
        UserError: the launcher started more; each of them would build the same dataset alone.
    """
    for name in _SIZES:
        if world_size == 1 and environment.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{name}={environment[name]}, but this process is alone in its MPI world: the "
                f"launcher belongs to another MPI than mpi4py. Start it with the mpirun beside "
                f"{sys.executable}, or under SLURM with srun --mpi=pmi2"
            )


def refuse_uncounted_ranks(executor: str, environment: Mapping[str, str]) -> None:
    """Stop where mpirun starts an executor that does not know of ranks.

    Args:
        executor: what the user asked for.
        environment: variables of the launcher.

    Raises:
        UserError: mpirun has started several; each would build the same dataset alone.
    """
    size = _num_ranks(environment)
    if size > 1:
        raise UserError(
            f"mpirun has started {size} processes, each with --executor {executor}: add "
            f"--executor mpi, or leave mpirun out"
        )


def rank_in_environment(environment: Mapping[str, str]) -> int:
    """Rank that mpirun gave this process, without asking MPI.

    Args:
        environment: variables of the launcher.

    Returns:
        The rank; 0 where there was no launcher.
    """
    values = (environment.get(name, "") for name in _RANKS)
    return next((int(value) for value in values if value.isdigit()), 0)


def _num_ranks(environment: Mapping[str, str]) -> int:
    """Processes that mpirun has started, without asking MPI; 1 where it has not."""
    values = (environment.get(name, "") for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    return max((int(value) for value in values if value.isdigit()), default=1)


def _die_of(error: UserError) -> None:
    """End this rank in a way that mpirun notices.

    The others wait in MPI_Init for a rank that has not got there, for ever if it just exits. This
    may be the only host where something is missing, so it speaks for itself.
    """
    assert sys.__stderr__ is not None
    sys.__stderr__.write(f"error: {socket.gethostname()}: {error}\n")
    sys.__stderr__.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _import_mpi() -> tuple[Any, Any]:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:  # no package; no MPI library for it
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--executor mpi needs mpi4py and an MPI library ({reason}): {INSTALL}"
        ) from error
    return MPI, MPICommExecutor


def _exit_code(error: BaseException) -> int:
    code = getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1


def _tell(error: BaseException) -> None:
    """Say what went wrong now: nobody comes to it after MPI has ended this process too."""
    if isinstance(error, UserError):
        sys.stderr.write(f"error: {error}\n")
    elif not hasattr(error, "exit_code"):  # else a command has told it, and asks to exit
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
