"""The same run in other worlds: ranks, ZeRO stages, accumulation, launchers, and between them."""

import shutil

import pytest

from tests import worlds
from tests.forked_worlds import train
from tests.worlds import largest_difference, rows

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]  # seven worlds

# Sums of fp32 in another order over 12 steps; measured 6e-7.
SUMMATION_TOLERANCE = 1e-5


@pytest.fixture
def reference(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    """One process, one accumulation step: the run that every other world must repeat."""
    config = tiny_run(dropout=0.0)
    code, output = train(config, deepspeed_json(1, 8), dataset_folder, tmp_path / "reference")
    assert code == 0, output
    return config, tmp_path / "reference"


def test_stages_ranks_launchers_and_changes_between_them(
    reference, deepspeed_json, dataset_folder, tmp_path
):
    config, folder = reference
    expected = rows(folder)
    for stage, launcher in ((0, "torchrun"), (1, "deepspeed"), (2, "mpirun"), (3, "fork")):
        run = tmp_path / f"stage-{stage}"
        arguments = (config, deepspeed_json(stage, 2), dataset_folder, run)
        if launcher == "fork":
            code, output = train(*arguments, ranks=2)
        else:
            code, output = worlds.train(*arguments, ranks=2, launcher=launcher)
        assert code == 0, output
        assert largest_difference(expected, rows(run)) < SUMMATION_TOLERANCE, stage
    # A commit of one world is continued by another: fewer ranks, another stage, and back.
    for source, stage, ranks in ((folder, 3, 2), (tmp_path / "stage-3", 1, 1)):
        run = tmp_path / f"from-{source.name}"
        shutil.copytree(source, run)
        shutil.rmtree(run / "checkpoints" / "step-00000012")
        arguments = (config, deepspeed_json(stage, 2), dataset_folder, run)
        code, output = train(*arguments, ranks=ranks)
        assert code == 0, output
        assert f"continues {run}/checkpoints/step-00000008" in output
        assert "ranks instead of" in output
        assert largest_difference(expected, rows(run)) < SUMMATION_TOLERANCE, source
