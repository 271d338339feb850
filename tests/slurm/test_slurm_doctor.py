"""What `deberta doctor` says of a live SLURM, of one without a controller, and within a step."""

import sys

import pytest

from tests.worlds import ROOT, environment

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 1}
CODE = """
import os
from pipeline.preflight.launchers import look_at_slurm
print(look_at_slurm("n", os.environ).line)
"""


def told(cluster, **variables):
    """Asked where the controller is."""
    environment = {**cluster.environment, "PYTHONPATH": ":".join(filter(None, sys.path))}
    words = [sys.executable, "-c", CODE]
    done = cluster.run_on(cluster.controller, words, env={**environment, **variables}, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_slurm_answers_or_does_not(cluster):
    line = told(cluster)
    assert line.startswith("n slurm: ok, slurm")
    assert "batch (1 nodes, " in line
    assert "urgent (1 nodes, " in line
    line = told(cluster, SBATCH_PARTITION="batches")
    assert "has no partition batches: " in line
    cluster.stop_controller()
    try:
        line = told(cluster)
    finally:
        cluster.start_controller()
    assert line.startswith("n slurm: FAIL, sinfo does not answer: ")
    assert line.endswith("; ask whether slurmctld runs (scontrol ping)")


def test_an_installation_within_a_step(cluster, tmp_path):
    mine = environment()
    variables = {
        **{**mine, **cluster.environment},
        "PATH": f"{mine['PATH']}:{cluster.environment['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    words = ["srun", sys.executable, "-m", "pipeline.cli", "doctor", "--run", str(tmp_path / "run")]
    done = cluster.run_on(cluster.controller, words, env=variables, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (node,) = cluster.nodes
    for words in (
        "mpi: ok, two ranks",
        "slurm: ok, slurm",
        "world of 2, gloo: ok, gloo all-reduce",
    ):
        assert any(line.startswith(f"{node} {words}") for line in lines), done.stdout
