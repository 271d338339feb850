"""A run whose sequences and batches grow: the same in another world, and resumed within a phase."""

import shutil

import pytest

from tests.forked_worlds import train
from tests.worlds import largest_difference, rows

pytestmark = pytest.mark.distributed

# Micro steps of one rank with a micro batch of 4: 1, 2, 1, and 2 in the rest.
PHASES = (
    "schedule.phases=[{until_step = 3, sequence_length = 16, train_batch_size = 4},"
    " {until_step = 6, sequence_length = 16}, {until_step = 9, train_batch_size = 4}]"
)
# fp32 sums in another order over 12 steps, as in test_worlds_agree.py.
SUMMATION_TOLERANCE = 1e-5


def test_phases_agree_between_worlds_and_survive_a_resume(
    tiny_run, deepspeed_json, dataset_folder, tmp_path
):
    config, one, two = tiny_run(dropout=0.0), tmp_path / "one", tmp_path / "two"
    code, output = train(config, deepspeed_json(1, 4), dataset_folder, one, PHASES)
    assert code == 0, output
    expected = rows(one)
    code, output = train(config, deepspeed_json(2, 2), dataset_folder, two, PHASES, ranks=2)
    assert code == 0, output
    assert largest_difference(expected, rows(two)) < SUMMATION_TOLERANCE
    shutil.rmtree(one / "checkpoints" / "step-00000012")
    code, output = train(config, deepspeed_json(1, 4), dataset_folder, one, PHASES)
    assert code == 0, output
    assert "step-00000008" in output
    assert rows(one) == expected
