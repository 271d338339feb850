"""Runs of equal length out of one array of tokens, copied into rows as fast as memory allows.

Indexing a view in which every run is one element copies each run once, into an array that is new.
Indexing into an array that is there already would copy it twice.

Letters: B runs of tokens, N tokens in each.
"""

import numpy as np
from numpy.typing import NDArray

_TOKEN_BYTES = 4


def copy_runs(
    tokens: NDArray[np.uint32],
    starts_B: NDArray[np.int64],
    count: int,
    edges: tuple[int, int],
    rows_at_once: int,
) -> list[NDArray[np.uint32]]:
    """Copy runs of tokens, each between two tokens that are given.

    Args:
        tokens: uint32, contiguous, with one token more than any run needs at either end.
        starts_B: int64 [B], where runs begin in them, the first of those tokens not counted.
        count: N, tokens of a run.
        edges: what stands before and behind every run.
        rows_at_once: rows of an array.

    Returns:
        uint32 [rows_at_once, 1 + N + 1] each, in the order of the runs, the last one shorter.
    """
    width = 1 + count + 1
    # With a neighbour on either side, in whose place the edges are written.
    of_runs = np.dtype((np.void, width * _TOKEN_BYTES))
    runs = np.ndarray((len(tokens) - width + 1,), of_runs, tokens, 0, (_TOKEN_BYTES,))
    parts = []
    for first in range(0, len(starts_B), rows_at_once):
        part = runs[starts_B[first : first + rows_at_once]].view(np.uint32).reshape(-1, width)
        part[:, 0], part[:, -1] = edges  # while a core's own cache holds them
        parts.append(part)
    return parts
