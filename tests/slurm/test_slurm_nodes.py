"""pretrain.sbatch where nodes fail: it goes on elsewhere, and without those that fail twice."""

import time

import pytest

from tests.slurm.trials import ROOT, Trial

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 3}
MESSAGES = """\
srun: error: Task launch for StepId=12.0 failed on node n[7-8]: Communication connection failure
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=12.0
srun: error: gpu-a[3-4]: tasks 2-3: Exited with exit code 1
srun: error: Node failure on n9
srun: error: Timed out waiting for job step to complete
"""
SLOW = ("steps=300", "step_seconds=0.1", "commit_every=20")


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


CHECKS = {
    "fails": '[ "$(hostname)" != {bad} ] || {{ echo "{bad} disk: FAIL, full"; exit 1; }}',
    "is named by another": """
[ "$(hostname)" = {bad} ] && exit 0
scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -qx {bad} || exit 0
echo "{bad} clock: FAIL, 300 s late; set it"
exit 1""",
    "cannot check": '[ "$(hostname)" != {bad} ]',
}


@pytest.mark.parametrize("kind", CHECKS)
def test_the_check_before_training_names_and_excludes_a_node(
    kind, cluster, trial, tmp_path, outcome
):
    check = tmp_path / "check"
    bad = cluster.nodes[1]
    check.write_text("#!/bin/bash\n" + CHECKS[kind].format(bad=bad))
    check.chmod(0o755)
    job = trial.submit("steps=10", PREFLIGHT="1", PREFLIGHT_COMMAND=str(check)).end()
    assert bad in trial.decisions()[1]["reason"]
    assert job["ExcNodeList"] == bad
    assert trial.verdicts() == ["requeue", "end"]
    outcome(f"the check before training: a node {kind}", **trial.seen(job))


def test_a_check_that_fails_everywhere_is_no_node_s_fault(trial, outcome):
    job = trial.submit("steps=10", PREFLIGHT="1", PREFLIGHT_COMMAND="false").end("FAILED")
    assert "fails on most nodes" in trial.decisions()[-1]["reason"]
    assert trial.computed() == []
    outcome("all nodes fail the check before training", **trial.seen(job))


def test_dependents_of_a_failed_array_task_are_cancelled(cluster, tmp_path, outcome):
    script = tmp_path / "task.sh"
    script.write_text('#!/bin/bash\n[ "${SLURM_ARRAY_TASK_ID:-0}" != 2 ]\n')
    array = cluster.sbatch(script, options=["--array=0-3"], cwd=tmp_path)
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
    dependent = cluster.sbatch(script, options=after, cwd=tmp_path)
    job = cluster.wait(dependent)
    assert job["JobState"] == "CANCELLED"
    assert cluster.job(f"{array}_2")["JobState"] == "FAILED"
    while (states := cluster.states_seen(dependent))[-1:] != ["CANCELLED"]:
        time.sleep(0.1)
    outcome("a task of an array fails: its dependent", states=states, end="CANCELLED")


def test_the_nodes_that_srun_blames(cluster, tmp_path):
    (tmp_path / "srun.err").write_text(MESSAGES)
    words = f". {ROOT}/slurm/nodes.sh; blamed_nodes {tmp_path}/srun.err"
    blamed = cluster.client("bash", "-c", words).split()
    assert blamed == ["n7", "n8", "n2", "gpu-a3", "gpu-a4", "n9"]


def test_failures_of_long_ago_are_forgiven(cluster, tmp_path):
    lines = ["n1 2020-01-01T00:00:00 a", "n1 2020-01-01T00:00:01 b", "n2 {now} a", "n2 {now} b"]
    text = "\n".join([*lines, "n3 2020-01-01T00:00:00 a", "n3 {now} b"]) + "\n"
    (tmp_path / "bad-nodes").write_text(text.replace("{now}", time.strftime("%Y-%m-%dT%H:%M:%S")))
    words = f"BOOKS={tmp_path}; . {ROOT}/slurm/nodes.sh; bad_nodes"
    assert cluster.client("bash", "-c", words).split() == ["n2"]
