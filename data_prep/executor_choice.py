"""`--executor` and `--workers`: which executor they mean, and which of their words make no sense.

open_executor   for the body of a `with`: something that runs units, or None on an MPI rank that
                has worked for rank 0
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from data_prep.errors import UserError
from data_prep.executors import Executor, ProcessExecutor
from data_prep.mpi_executor import mpi_ranks, refuse_uncounted_ranks

ExecutorName = Literal["processes", "mpi", "slurm-array"]


@contextmanager
def open_executor(name: ExecutorName, workers: int | None) -> Iterator[Executor | None]:
    """Open the executor that a user asked for.

    Args:
        name: `processes`, `mpi`, or `slurm-array` for the processes of one array task.
        workers: processes; None where the user did not say.

    Yields:
        The executor; None where there is nothing to do because rank 0 has done it.

    Raises:
        UserError: the two do not go together, or MPI is missing.
    """
    if name != "mpi":
        refuse_uncounted_ranks(name, os.environ)
        yield ProcessExecutor(1 if workers is None else workers)
        return
    if workers is not None:
        raise UserError(
            f"--workers {workers} does not go with --executor mpi, whose workers are the ranks: "
            f"leave it out, and type mpirun -n {max(1, workers) + 1} deberta-prep build ... (one "
            f"rank hands out the work)"
        )
    with mpi_ranks() as ranks:
        if ranks is not None and ranks.is_alone:
            sys.stderr.write(
                "note: there is one MPI rank, which does all the work; for more, type "
                "mpirun -n 8 deberta-prep build ... --executor mpi\n"
            )
        yield ranks
