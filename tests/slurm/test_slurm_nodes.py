"""pretrain.sbatch where nodes and the controller fail: excluded, waited for; a stand-in trains."""

import signal
import threading

import pytest

from tests.slurm.trials import Trial

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 3}
SLOW = ("steps=300", "step_seconds=0.1", "commit_every=20")
CONTROLLER_AWAY_SECONDS = 10
CONTROLLER_KNOWS_STEP = 80
"""A controller that is killed forgets what it has not saved, and it saves every 5 s."""


@pytest.fixture
def trial(cluster, tmp_path):
    yield Trial(cluster, tmp_path)
    cluster.cancel_all()
    cluster.wait_for_nodes()


@pytest.mark.parametrize("position", [0, 1], ids=["of the job's shell", "of a rank"])
def test_power_cut_of_a_node(position, cluster, trial, outcome):
    """SLURM notices, requeues, and the job goes on elsewhere from its last commit."""
    trial.submit(*SLOW).until_step(45)
    dead = cluster.nodes[position]
    cluster.kill_node(dead)
    try:
        job = trial.end(seconds=180)
    finally:
        cluster.start_node(dead)
    assert dead not in trial.decisions()[-1]["nodes"]
    assert job["Restarts"] == "1"
    assert trial.state()["status"] == "done"
    where = ["of the job's shell", "of a rank"][position]
    outcome(f"power cut of the node {where}", **trial.seen(job))


def test_a_node_that_failed_twice_is_excluded(cluster, trial, outcome):
    """Rank 1 dies twice on the same node; the third start is without it, and as large."""
    job = trial.submit("steps=20", "fault=kill:1:7:0,kill:1:12:1").end(seconds=180)
    assert job["ExcNodeList"] == cluster.nodes[1]
    assert cluster.nodes[1] not in trial.decisions()[-1]["nodes"]
    assert job["Restarts"] == "2"
    outcome("the same node fails twice", **trial.seen(job))


def test_a_shell_s_own_node_is_excluded_too(cluster, trial, outcome):
    """The shell dies without a last word, twice on one node; the third start gives it back."""
    trial.submit("steps=200", "commit_every=2")
    for start in range(2):
        trial.until(lambda start=start: len(trial.decisions()) > start, f"start {start}")
        cluster.kill_node(cluster.nodes[0])
        cluster.start_node(cluster.nodes[0])
    job = trial.end(seconds=180)
    assert "given back" in " ".join(each["reason"] for each in trial.decisions())
    assert cluster.nodes[0] not in trial.decisions()[-1]["nodes"]
    outcome("the node of the job's shell fails twice", **trial.seen(job))


def test_the_check_before_training_names_and_excludes_a_node(cluster, trial, tmp_path, outcome):
    check = tmp_path / "check"
    check.write_text(f'#!/bin/bash\n[ "$(hostname)" != {cluster.nodes[1]} ]\n')
    check.chmod(0o755)
    job = trial.submit("steps=10", PREFLIGHT="1", PREFLIGHT_COMMAND=str(check)).end()
    assert cluster.nodes[1] in trial.decisions()[1]["reason"]
    assert job["ExcNodeList"] == cluster.nodes[1]
    assert trial.verdicts() == ["requeue", "end"]
    outcome("a node fails the check before training", **trial.seen(job))


def test_a_check_that_fails_everywhere_is_no_node_s_fault(trial, outcome):
    job = trial.submit("steps=10", PREFLIGHT="1", PREFLIGHT_COMMAND="false").end("FAILED")
    assert "fails on every node" in trial.decisions()[-1]["reason"]
    assert trial.computed() == []
    outcome("all nodes fail the check before training", **trial.seen(job))


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


def test_dependents_of_a_failed_array_task_are_cancelled(cluster, tmp_path, outcome):
    script = tmp_path / "task.sh"
    script.write_text('#!/bin/bash\n[ "${SLURM_ARRAY_TASK_ID:-0}" != 2 ]\n')
    array = cluster.sbatch(script, options=["--array=0-3"], cwd=tmp_path)
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
    dependent = cluster.sbatch(script, options=after, cwd=tmp_path)
    job = cluster.wait(dependent)
    assert job["JobState"] == "CANCELLED"
    assert cluster.job(f"{array}_2")["JobState"] == "FAILED"
    states = cluster.states_seen(dependent)
    outcome("a task of an array fails: its dependent", states=states, end="CANCELLED")
