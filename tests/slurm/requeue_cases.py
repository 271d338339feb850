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
    assert trial.verdicts() == ["left to SLURM", "end"]
    assert not (trial.run / "slurm/bad-nodes").exists()
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


def a_rank_is_killed(trial):
    """SIGKILL of a rank"""
    trial.submit(*FAST, "fault=kill:1:12:0")
    job = trial.end()
    assert trial.verdicts() == ["requeue", "end"]
    assert trial.state()["status"] == "done"
    assert job["Restarts"] == "1"
    assert 0 <= trial.lost_steps() <= 5
    return job


def crashes_without_progress(trial):
    """a crash at each start, before a commit"""
    trial.submit(*FAST, "fault=raise:0:3:*", MAX_RESTARTS="4")
    job = trial.end("FAILED")
    assert trial.verdicts() == ["requeue", "requeue", "end"]
    assert "given up: 3 times without a new commit" in trial.decisions()[-1]["reason"]
    assert "RuntimeError: a broken GPU" in next(trial.folder.glob("*.out")).read_text()
    assert job["Restarts"] == "2"
    return job


def crashes_with_progress(trial):
    """a crash at each start, behind a commit"""
    faults = ",".join(f"raise:0:{7 + 5 * start}:{start}" for start in range(8))
    trial.submit(*FAST, f"fault={faults}", MAX_RESTARTS="3", MAX_CRASHES_WITHOUT_PROGRESS="2")
    job = trial.end("FAILED")
    assert trial.verdicts() == ["requeue", "requeue", "requeue", "end"]
    assert "MAX_RESTARTS=3" in trial.decisions()[-1]["reason"]
    assert job["Restarts"] == "3"
    return job


def hangs_once(trial):
    """a hang"""
    trial.submit(*FAST, "fault=hang:1:12:0")
    job = trial.end()
    requeue = next(each for each in trial.decisions() if each["decision"] == "requeue")
    assert requeue["reason"].startswith("hang: rank 1 (host ")
    assert requeue["reason"].endswith('in phase "data" of step 12')
    bad = (trial.run / "slurm/bad-nodes").read_text().splitlines()
    assert [line.split()[0] for line in bad] == [trial.cluster.nodes[1]]
    assert job["Restarts"] == "1"
    return job


def _ends_for_good(trial, code, reason):
    job = trial.end("FAILED")
    assert trial.verdicts() == ["end"]
    assert reason in trial.decisions()[-1]["reason"]
    assert (job["ExitCode"], job["Restarts"]) == (f"{code}:0", "0")
    return job


def diverges(trial):
    """divergence"""
    trial.submit(*FAST, "fault=diverged:0:7:*")
    return _ends_for_good(trial, 87, "diverged: for a test")


def finds_corrupt_data(trial):
    """corrupt data"""
    trial.submit(*FAST, "fault=corrupt:1:7:*")
    return _ends_for_good(trial, 88, "corrupt: for a test")


def runs_out_of_disk(trial):
    """a disk that fills up"""
    trial.submit(*FAST, "fault=disk:0:7:*,disk:1:7:*")
    return _ends_for_good(trial, 75, "stopped: 3 MiB are left on the disk")


def runs_out_of_memory(trial):
    """memory that fills up while steps are taken"""
    faults = ",".join(
        f"memory:{rank}:{7 * (1 + start)}:{start}" for rank in (0, 1) for start in (0, 1)
    )
    trial.submit(*FAST, f"fault={faults}", MAX_CRASHES_WITHOUT_PROGRESS="2")
    job = trial.end()
    assert trial.verdicts() == ["requeue", "requeue", "end"]
    assert (job["Restarts"], trial.lost_steps()) == ("2", 0)
    return job


def may_not_be_requeued(trial):
    """a job with --no-requeue"""
    trial.submit(*FAST, "fault=raise:0:7:*", options=["--no-requeue"])
    job = trial.end("FAILED")
    assert trial.verdicts() == ["requeue", "end"]
    assert "SLURM does not requeue" in trial.decisions()[-1]["reason"]
    return job


def is_refused(trial):
    """a command line that training refuses"""
    trial.submit(*FAST, "refuse=1")
    job = _ends_for_good(trial, 2, "training refuses its command line")
    assert "error: refused" in next(trial.folder.glob("*.out")).read_text()
    return job


def the_kill_switch_is_on(trial):
    """RUN/no-restart while training runs, and before the next job"""
    trial.submit(*FAST).until_step(12)
    (trial.run / "no-restart").touch()
    trial.signal("USR1", "--batch")
    job = _ends_for_good(trial, 75, "no-restart exists")
    computed = trial.computed()
    trial.submit(*FAST).end("FAILED")
    assert trial.computed() == computed
    assert "not started" in trial.decisions()[-1]["reason"]
    return job


def the_limit_comes_first(trial):
    """the time limit, and no commit after USR1"""
    words = ("steps=40", "commit_every=10", "fault=stuck:0:25:0,stuck:1:25:0")
    trial.submit(*words, minutes=1, options=["--signal=B:USR1@20"])
    job = trial.end(seconds=240)
    assert trial.state()["status"] == "done"
    assert "time limit" in trial.decisions()[1]["reason"]
    assert (job["Restarts"], trial.lost_steps()) == ("1", 5)
    return job


def done_past_the_limit(trial):
    """the run is done past the time limit"""
    words = ("steps=620", "step_seconds=0.1", "commit_every=10", "fault=deaf:0:1:*,deaf:1:1:*")
    trial.submit(*words, minutes=1, options=["--signal=B:USR1@20"])
    job = trial.end(seconds=240)
    assert trial.verdicts() == ["requeue", "end"]
    return job


STOPS = [
    usr1_before_the_limit,
    usr1_by_hand,
    stopped_with_exit_code_zero,
    requeued_by_the_user,
    preempted_within_the_grace,
    preempted_past_the_grace,
    cancelled,
    the_limit_comes_first,
    done_past_the_limit,
    finished_and_requeued,
]
CRASHES = [
    a_rank_is_killed,
    crashes_without_progress,
    crashes_with_progress,
    hangs_once,
]
ENDS = [
    diverges,
    finds_corrupt_data,
    runs_out_of_disk,
    runs_out_of_memory,
    may_not_be_requeued,
    is_refused,
    the_kill_switch_is_on,
]
