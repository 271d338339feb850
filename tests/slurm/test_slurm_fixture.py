"""The cluster itself: steps on all nodes, accidents, and nothing that outlives its owner.

With one case of pretrain.sbatch, this is what `make test` runs on a live SLURM.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm import requeue_cases
from tests.slurm.cluster import remove_what_dead_owners_left
from tests.slurm.hosts import owner_of
from tests.slurm.trials import Trial

ROOT = Path(__file__).parents[2]
JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2
srun bash -c 'echo "task $SLURM_PROCID on $(hostname) sees $CUDA_VISIBLE_DEVICES"'
exit 3
"""
OWNER = """
import sys, time
from tests.slurm.cluster import Cluster
with Cluster(sys.argv[1], nodes=1) as cluster:
    print(cluster.nodes[0], flush=True)
    time.sleep(600)
"""


def test_a_job_runs_on_all_nodes_and_its_exit_code_is_told(cluster):
    script = cluster.folder / "job.sh"
    script.write_text(JOB)
    job_id = cluster.sbatch(script)
    job = cluster.wait(job_id, timeout_seconds=30)
    said = (cluster.folder / f"slurm-{job_id}.out").read_text().splitlines()
    expected = [f"task {n} on {cluster.nodes[n // 2]} sees 0,1" for n in range(4)]
    assert sorted(said) == expected
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0")
    assert cluster.states_seen(job_id)[-1:] in (["FAILED"], ["RUNNING"])  # its poll may be later


def test_a_killed_node_and_a_killed_controller_come_back(cluster):
    cluster.stop_controller()
    assert cluster.run_on(cluster.controller, ["scontrol", "show", "node"]).returncode
    cluster.start_controller()
    cluster.kill_node(cluster.nodes[0])
    cluster.start_node(cluster.nodes[0])
    cluster.wait_for_nodes(30)


@pytest.mark.usefixtures("cluster")
def test_nothing_outlives_an_owner_that_was_killed(tmp_path):
    """`kill -9` of the tests: no daemon stays, and the next start removes the control groups."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "cluster")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    node = owner.stdout.readline().strip()
    assert owner_of(node.partition("-")[0]) == owner.pid
    group = Path(f"/sys/fs/cgroup/freezer/slurm_{node}")
    assert group.exists()
    mine = [each.pid for each in psutil.Process(owner.pid).children(recursive=True)]
    assert len(mine) > 6
    owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in mine):
        assert time.monotonic() < deadline, "daemons go on without their owner"
        time.sleep(0.05)
    remove_what_dead_owners_left()
    assert not group.exists()


def test_a_job_comes_back_after_usr1(cluster, tmp_path):
    requeue_cases.usr1_by_hand(Trial(cluster, tmp_path))
