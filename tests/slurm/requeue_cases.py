"""What can happen to a training job, and what must come of it: one function a case.

Each takes a `Trial`, hurts it, and returns the job as SLURM shows it in the end. Tests run them
with the scripts as they are, and some again with broken ones, which must fail.
"""

FAST = ("steps=40", "step_seconds=0.1", "commit_every=5")
URGENT = """#!/bin/bash
#SBATCH --partition=urgent --exclusive --job-name=urgent --output=/dev/null
sleep 4
"""


def usr1_before_the_limit(trial):
    """USR1 before the time limit"""
    words = ("steps=400", "step_seconds=0.1", "commit_every=1000")
    trial.submit(*words, minutes=1, options=["--signal=B:USR1@20"])
    job = trial.end(seconds=200)
    assert "TIMEOUT" not in trial.cluster.states_seen(trial.job_id)
    assert trial.verdicts()[0] == "requeue"
    assert trial.lost_steps() == 0
    assert int(job["Restarts"]) >= 1
    return job


def usr1_by_hand(trial):
    """USR1 by scancel --batch"""
    trial.submit(*FAST).until_step(12).signal("USR1", "--batch")
    job = trial.end()
    assert trial.verdicts() == ["requeue", "end"]
    assert (job["Restarts"], trial.lost_steps()) == ("1", 0)
    return job


def stopped_with_exit_code_zero(trial):
    """training stops with exit code 0"""
    trial.submit(*FAST, "stopped_code=0").until_step(12).signal("USR1", "--batch")
    job = trial.end()
    assert trial.state()["status"] == "done", trial.text()
    assert (job["Restarts"], trial.lost_steps()) == ("1", 0)
    return job


def requeued_by_the_user(trial):
    """scontrol requeue"""
    trial.submit(*FAST).until_step(12).scontrol("requeue")
    job = trial.end()
    assert trial.verdicts() == ["left to SLURM", "end"]
    assert (job["Restarts"], trial.lost_steps()) == ("1", 0)
    return job


def _preempt(trial):
    script = trial.folder / "urgent.sh"
    script.write_text(URGENT)
    nodes = f"--nodes={len(trial.cluster.nodes)}"
    return trial.cluster.sbatch(script, options=[nodes], cwd=trial.folder)


def preempted_within_the_grace(trial):
    """preemption, commit within the grace time"""
    trial.submit(*FAST).until_step(12)
    _preempt(trial)
    job = trial.end()
    assert trial.verdicts() == ["requeue", "end"]
    assert trial.state()["status"] == "done", trial.text()
    assert (job["Restarts"], trial.lost_steps()) == ("1", 0)
    return job


def preempted_past_the_grace(trial):
    """preemption, no commit within the grace time"""
    trial.submit("steps=200", "commit_every=50", "fault=deaf:0:1:0,deaf:1:1:0").until_step(12)
    _preempt(trial)
    job = trial.end(seconds=180)
    assert trial.state()["status"] == "done", trial.text()
    assert job["Restarts"] == "1"
    assert trial.lost_steps() > 0
    return job


def cancelled(trial):
    """scancel"""
    trial.submit(*FAST).until_step(12)
    trial.cluster.client("scancel", trial.job_id)
    job = trial.end("CANCELLED")
    assert trial.verdicts() == ["left to SLURM"]
    assert job["Restarts"] == "0"
    assert trial.state()["status"] == "stopped"
    return job


def finished_and_requeued(trial):
    """scontrol requeue of a finished job"""
    trial.submit("steps=10")
    trial.end()
    before = trial.computed()
    trial.scontrol("requeue")
    trial.cluster.wait(trial.job_id, ("PENDING", "RUNNING"))
    job = trial.end()
    assert trial.computed() == before
    assert trial.verdicts() == ["end", "end"]
    return job


STOPS = [
    usr1_before_the_limit,
    usr1_by_hand,
    stopped_with_exit_code_zero,
    requeued_by_the_user,
    preempted_within_the_grace,
    preempted_past_the_grace,
    cancelled,
    finished_and_requeued,
]
