"""pretrain.sbatch while SLURM's controller is away: no job is lost, none comes back to life."""

import signal
import threading

import pytest

from tests.slurm.trials import Trial

pytestmark = pytest.mark.slurm
CONTROLLER_AWAY_SECONDS = 10
CONTROLLER_KNOWS_STEP = 80
"""A controller that is killed forgets what it has not saved, and it saves every 5 s."""


@pytest.fixture
def trial(cluster, tmp_path):
    yield Trial(cluster, tmp_path)
    cluster.cancel_all()
    cluster.wait_for_nodes()


@pytest.mark.parametrize("accident", ["USR1", "SIGKILL of a rank"])
def test_controller_away(accident, cluster, trial, outcome):
    """Training ends while the controller is down; the job's shell waits and is requeued."""
    fault = "" if accident == "USR1" else f"fault=kill:1:{CONTROLLER_KNOWS_STEP + 10}:0"
    trial.submit("steps=120", fault).until_step(CONTROLLER_KNOWS_STEP)
    shell = cluster.job(trial.job_id)["BatchHost"]
    cluster.stop_controller()
    back = threading.Timer(CONTROLLER_AWAY_SECONDS, cluster.start_controller)
    back.start()
    if accident == "USR1":
        found = cluster.run_on(shell, ["pgrep", "-f", "slurm_script"]).stdout.split()
        assert cluster.run_on(shell, ["kill", "-USR1", found[0]]).returncode == 0
        trial.until(lambda: trial.state()["status"] == "stopped", "the commit", 9)
    back.join()
    job = trial.end()
    assert trial.verdicts() == ["requeue", "end"]
    assert job["Restarts"] == "1"
    outcome(f"controller down for 10 s, {accident} meanwhile", **trial.seen(job))


def test_a_cancelled_job_stays_so_when_the_controller_was_away(cluster, trial, outcome):
    trial.submit("steps=300").until_step(CONTROLLER_KNOWS_STEP)
    cluster.client("scancel", trial.job_id)
    cluster.stop_controller(signal.SIGTERM)
    threading.Timer(CONTROLLER_AWAY_SECONDS, cluster.start_controller).start()
    trial.until(
        lambda: cluster.run_on(cluster.controller, ["scontrol", "ping"]).returncode == 0, "it"
    )
    job = trial.end("CANCELLED")
    assert job["Restarts"] == "0"
    outcome("scancel, then the controller is down for 10 s", **trial.seen(job))
