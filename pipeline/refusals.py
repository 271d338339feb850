"""What is wrong with a run, said by the ranks that should say it.

refuse                  by rank 0; by any rank where only that one may know it
refuse_before_meeting   by rank 0 where it says it, and otherwise by one rank or two of each host
"""

import os
import time
from collections.abc import Callable

from data_prep.errors import UserError
from pipeline.slurm_ranks import rank_in_step, speaks_for_its_host
from pipeline.terminal import tell

RANK_0_FIRST_SECONDS = 3.0
"""That other ranks leave to rank 0, whose imports may take longer than theirs."""
_LAUNCHER_SECONDS = 1.0  # in which a launcher ends all ranks once one has left
_LOOK_SECONDS = 0.1


def refuse(error: UserError, *, everywhere: bool = False) -> int:
    """Say what is wrong once, not once a rank, unless only one rank may know it.

    Args:
        error: What is wrong.
        everywhere: Whether any rank says it, with its number.

    Returns:
        The exit code.
    """
    rank = rank_in_step(os.environ)  # 0 also where the launcher's words are nonsense
    if rank == 0 or everywhere:
        where = f"rank {rank}: " if rank else ""
        tell(f"{where}error: {error}")
    return error.exit_code


def refuse_before_meeting(
    error: UserError, is_asked_to_stop: Callable[[], bool] = lambda: False
) -> int:
    """Say what is wrong before the ranks have met: once if rank 0 says it, but in any case.

    A launcher ends all ranks when one has left, and may so end rank 0 before it has said a word; or
    rank 0 knows of nothing wrong. So the others wait for it to leave first; then a few of them
    speak, and the rest leave last.

    Args:
        error: What is wrong.
        is_asked_to_stop: Whether this process was told to end; then another rank has spoken.

    Returns:
        The exit code.
    """
    if rank_in_step(os.environ) == 0:
        return refuse(error)
    speaks = speaks_for_its_host(os.environ)
    end = time.monotonic() + RANK_0_FIRST_SECONDS + (0.0 if speaks else _LAUNCHER_SECONDS)
    while time.monotonic() < end and not is_asked_to_stop():
        time.sleep(_LOOK_SECONDS)
    return refuse(error, everywhere=speaks and not is_asked_to_stop())
