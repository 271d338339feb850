"""pretrain.sbatch where training crashes, hangs or must not go on; a stand-in trains."""

import pytest

from tests.slurm import requeue_cases as cases
from tests.slurm.trials import Trial

pytestmark = pytest.mark.slurm


@pytest.fixture
def trial(cluster, tmp_path):
    yield Trial(cluster, tmp_path)
    cluster.cancel_all()


@pytest.mark.parametrize("case", cases.CRASHES + cases.ENDS, ids=lambda case: case.__name__)
def test_crashed(case, trial, outcome):
    outcome(case.__doc__.splitlines()[0], **trial.seen(case(trial)))
