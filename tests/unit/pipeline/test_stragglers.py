"""Ranks compared with their peers; `tests/distributed/test_hangs.py` has a world that does it."""

import pytest
import torch

from pipeline.config import SafetySection
from pipeline.runtime import World
from pipeline.stragglers import Stragglers, ratios_to_peers


@pytest.mark.parametrize(
    ("seconds", "ratios"),
    [
        ([1.0, 2.0], [0.5, 2.0]),  # with the median of both, neither would be far off
        ([1.0, 1.0, 1.5], [0.8, 0.8, 1.5]),
        ([1.0, 1.0, 2.0, 2.0], [0.5, 0.5, 2.0, 2.0]),
        ([1.0, 1.0, 1.0, 1.0], [1.0] * 4),
        ([1.0, 1.0, 1.0, 100.0], [1.0, 1.0, 1.0, 100.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_each_rank_is_compared_with_the_others(seconds, ratios):
    assert ratios_to_peers(seconds) == pytest.approx(ratios)


def test_a_world_of_one_has_no_slow_rank():
    world = World(0, 0, 1, torch.device("cpu"))
    stragglers = Stragglers(SafetySection(straggler_steps=1), world, None)
    assert [stragglers.add(1.0, step) for step in range(5)] == [None] * 5
