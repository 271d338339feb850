"""slurm/job.sh on a live SLURM: what starts again and what does not, with a stand-in command."""

import pytest

from tests.worlds import ROOT

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 2, "gpus": 0}
JOB = """#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.out
set -euo pipefail
. "$DEBERTA_HOME/slurm/job.sh"
begin_job
run bash -c "$COMMAND"
tell "after the command"
"""
TWICE = "echo start; test -e second || { touch second; FIRST; }; echo finished"


@pytest.fixture
def start(cluster, tmp_path):
    """Submit a stand-in command."""
    script = tmp_path / "job.sbatch"
    script.write_text(JOB)

    def start(command, **variables):
        environment = {"DEBERTA_HOME": str(ROOT), "COMMAND": command, **variables}
        options = ("--job-name=job",)
        return cluster.sbatch(script, env=environment, cwd=tmp_path, options=options)

    start.log = tmp_path / "job.out"
    return start


def running(cluster, job_id, log):
    """Wait until the command runs."""
    has_begun = log.exists
    return cluster.wait(
        job_id, "RUNNING", when=lambda _: has_begun() and "start\n" in log.read_text()
    )


def test_a_killed_command_starts_again_with_its_job(cluster, start):
    job_id = start(TWICE.replace("FIRST", "kill -9 $$"))
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert "exit code 137 of bash; queued again" in start.log.read_text()
    assert start.log.read_text().endswith("after the command\n")


def test_restarts_are_bounded(cluster, start):
    job = cluster.wait(start("kill -9 $$", MAX_RESTARTS="1"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "137:0", "1")
    assert "not started again after 2 starts (MAX_RESTARTS)" in start.log.read_text()


def test_a_command_that_fails_by_itself_is_not_tried_again(cluster, start):
    job = cluster.wait(start("exit 3"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0")
    assert "FAILED with exit code 3: bash -c exit 3" in start.log.read_text()


def test_near_the_time_limit_a_job_goes_back_into_the_queue(cluster, start):
    job_id = start(TWICE.replace("FIRST", "sleep 100"))
    running(cluster, job_id, start.log)
    cluster.client("scancel", "--signal=USR1", "--batch", job_id)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert "the time limit is near; queued again" in start.log.read_text()


def test_a_cancelled_job_stays_cancelled(cluster, start):
    job_id = start("trap 'exit 143' TERM; echo start; sleep 100 & wait")
    running(cluster, job_id, start.log)
    cluster.client("scancel", job_id)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    cluster.wait(job_id, "CANCELLED", when=lambda job: job.get("EndTime", "Unknown") != "Unknown")
    assert "queued again" not in start.log.read_text()


def test_the_site_and_its_container_are_used(cluster, start, tmp_path):
    setup = tmp_path / "setup.sh"
    setup.write_text("export FROM_SETUP=$NOBODY_HAS_SET_THIS/x\n")
    command = 'echo "$FROM_SETUP $INSIDE"'
    container = {"DEBERTA_SETUP": str(setup), "DEBERTA_CONTAINER": "env INSIDE=yes"}
    job = cluster.wait(start(command, **container))
    assert job["JobState"] == "COMPLETED", start.log.read_text()
    assert "/x yes" in start.log.read_text()
    # Options alone are srun's, as those of pyxis.
    job = cluster.wait(start("echo step $SLURM_STEP_ID", DEBERTA_CONTAINER="--label"))
    assert job["JobState"] == "COMPLETED", start.log.read_text()
    assert "0: step 0" in start.log.read_text()
