"""Runs of tokens between edges: slices, in new memory, of which no neighbour is seen."""

import numpy as np
import pytest

from data_prep.run_copies import copy_runs

TOKENS = np.arange(100, 200, dtype=np.uint32)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 5, 9])
def test_runs_are_slices_between_edges(rows_at_once):
    starts = np.array([0, 93, 93, 7, 50])
    parts = copy_runs(TOKENS, starts, 5, (1, 2), rows_at_once)
    assert [len(part) for part in parts] == [
        min(rows_at_once, 5 - n) for n in range(0, 5, rows_at_once)
    ]
    expected = [[1, *TOKENS[1 + start : 6 + start], 2] for start in starts.tolist()]
    assert np.concatenate(parts).tolist() == expected
    assert all(part.dtype == np.uint32 and part.flags.c_contiguous for part in parts)


def test_runs_are_copies():
    tokens = TOKENS.copy()
    (rows,) = copy_runs(tokens, np.array([4, 4]), 3, (1, 2), 2)
    rows[0] = 7
    assert rows[1].tolist() == [1, 105, 106, 107, 2]
    assert np.array_equal(tokens, TOKENS)


def test_no_run_reaches_beyond_the_tokens():
    for start in (94, -96):
        with pytest.raises(IndexError):
            copy_runs(TOKENS, np.array([start]), 5, (1, 2), 1)
