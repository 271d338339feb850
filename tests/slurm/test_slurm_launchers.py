"""pretrain.sbatch with the launchers that die of USR1: their ranks hear it and commit."""

import re

import pytest

from tests.slurm.trials import Trial, broken_home

pytestmark = pytest.mark.slurm
RANKS = 4
WORDS = ("steps=150", "step_seconds=0.1", "commit_every=1000")


@pytest.fixture
def trial(cluster, tmp_path):
    yield Trial(cluster, tmp_path)
    cluster.cancel_all()


def ranks_that_stopped(trial):
    return set(re.findall(r"start 0 rank (\d+) .*: stopped at step", trial.text()))


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_all_ranks_hear_usr1(launcher, trial, outcome):
    trial.submit(*WORDS, tasks=2, LAUNCHER=launcher).until_step(8)
    # A signal kills a Python that has only begun, and launchers of two nodes begin apart.
    trial.until(lambda: len(list(trial.run.glob("pid-*"))) == RANKS, "all ranks")
    trial.signal("USR1", "--batch")
    job = trial.end(seconds=180)
    assert ranks_that_stopped(trial) == {str(rank) for rank in range(RANKS)}, trial.text()
    assert trial.verdicts() == ["requeue", "end"]
    assert trial.lost_steps() == 0
    outcome(f"USR1 under LAUNCHER={launcher}", **trial.seen(job))


def test_without_the_wrapper_they_do_not(cluster, tmp_path):
    line = "trap 'forward USR1' USR1"
    trial = Trial(cluster, tmp_path, broken_home(tmp_path, "forward_usr1.sh", line, ""))
    trial.submit(*WORDS, LAUNCHER="torchrun", MAX_RESTARTS="0").until_step(8)
    trial.signal("USR1", "--batch")
    trial.end("FAILED")
    assert ranks_that_stopped(trial) == set()
    assert "training crashed" in trial.decisions()[-1]["reason"]
