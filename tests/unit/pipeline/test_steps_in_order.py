"""Steps one after the other: what the next ones need is announced, and changes nothing."""

import pytest
import torch

from pipeline.data import TrainBatches
from pipeline.phases import Phase, TrainSchedule
from pipeline.sample_order import SampleOrder
from pipeline.sequences import SequenceStream
from tests.unit.pipeline.test_data import Tokens, identities


class Announced(Tokens):
    """Writes down what is announced, and has room for so many announcements between two reads."""

    def __init__(self, count, room):
        super().__init__(count)
        self.room, self.left = room, room
        self.calls = []

    def announce_rows(self, split, starts, count):
        if self.left == 0:
            return False
        self.left -= 1
        self.calls.append(("announce", tuple(starts.tolist())))
        return True

    def read_rows(self, split, starts, *shape):
        self.left = self.room
        self.calls.append(("read", tuple(starts.tolist())))
        return super().read_rows(split, starts, *shape)

    def stop_announced(self):
        self.calls.append(("stop", ()))


@pytest.mark.parametrize("room", [0, 1, 3, 1000])
def test_steps_in_order_are_those_asked_for_alone_and_announced_once_before_they_are_read(room):
    tokens = Announced(29 * 8, room)
    several = TrainBatches(
        {10: SequenceStream(tokens, "train", 10)},
        {10: SampleOrder(29, 0, 10, 4, 2)},
        TrainSchedule((Phase(0, 1000, 10, 8),)),
        4,
        1,
        0,
    )
    taken = list(several.in_order(2, 9))
    assert tokens.calls[-1] == ("stop", ())
    announced, read = (
        [starts for what, starts in tokens.calls if what == kind] for kind in ("announce", "read")
    )
    assert len(read) == 7
    assert announced == (read if room else [])
    if room == 3:  # as far ahead as there is room, and no step twice
        assert [what for what, _ in tokens.calls[:8]] == 2 * [*3 * ["announce"], "read"]
    for step, micro_batches in enumerate(taken, 2):
        expected = several.at_step(step)
        assert identities(micro_batches) == identities(expected)
        for ours, theirs in zip(micro_batches, expected, strict=True):
            assert torch.equal(ours.input_ids_BL, theirs.input_ids_BL)


def test_no_more_is_announced_than_a_window_and_a_half(monkeypatch):
    monkeypatch.setattr("pipeline.data._SAMPLES_AHEAD", 20)
    tokens = Announced(290 * 8, 1000)
    order = {10: SampleOrder(290, 0, 10, 4, 2)}
    phases = TrainSchedule((Phase(0, 1000, 10, 8),))
    ours = TrainBatches({10: SequenceStream(tokens, "train", 10)}, order, phases, 8, 1, 0)
    next(ours.in_order(0, 100))
    assert [what for what, _ in tokens.calls[:4]] == [*3 * ["announce"], "read"]
