"""DeepSpeed's bookkeeping of stage 3, on modules whose gathers can be counted by hand."""

import pytest

from pipeline.plan.gathering import _Limits, _Module, _Trace

A, B, C = _Module((0,)), _Module((1,)), _Module((2,))
ROOT = _Module((), (A, B, C))
SIZES = (10, 10, 10)


def gathered(kept=(), live=0, reuse=1, prefetch=0):
    """How often a pass forward and one backward gather each parameter."""
    events = [*ROOT.uses(backward=False), *ROOT.uses(backward=True)]
    uses = [module for module, begins in events if begins]
    trace = _Trace(SIZES, uses, frozenset(kept), _Limits(live, reuse, prefetch))
    for module, begins in events:
        (trace.begin if begins else trace.end)(module)
    return [trace.gathered[number] for number in range(len(SIZES))]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        # The last module is used again at once, the others are gathered in both passes.
        ({}, [2, 2, 1]),
        ({"kept": {0}}, [0, 2, 1]),
        ({"kept": {0, 1, 2}}, [0, 0, 0]),
        # Between B's two uses are 20 elements, between A's 40.
        ({"reuse": 20}, [2, 2, 1]),
        ({"reuse": 21}, [2, 1, 1]),
        ({"reuse": 40}, [2, 1, 1]),
        # So far ahead that all of the pass forward is still there in the pass backward.
        ({"reuse": 1000}, [1, 1, 1]),
        ({"live": 1000, "prefetch": 1000}, [1, 1, 1]),
        # A limit alone allows nothing.
        ({"live": 1000}, [2, 2, 1]),
        ({"prefetch": 1000}, [2, 2, 1]),
    ],
)
def test_gathers_of_three_modules(limits, expected):
    assert gathered(**limits) == expected
