"""`deberta doctor --node` as tasks of one step: it measures, compares and names who is absent."""

import socket
import subprocess
import sys

import pytest

from tests.worlds import ROOT, environment

pytestmark = pytest.mark.distributed

CODE = """
import sys
from pipeline.preflight import network
network.PATIENCE_SECONDS = float(sys.argv[1])
network._CPU_BYTES = 1 << 20
from pipeline.cli import main
main(["doctor", "--node"])
"""


def tasks(folder, present, patience):
    """Start tasks of a step of two on one node; (exit code, output, errors) of those present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in present:
        step = {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "lab08",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURMD_NODENAME": "lab08",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        inherited = {k: v for k, v in environment().items() if not k.startswith("SLURM")}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", CODE, str(patience)],
                env={**inherited, **step, "PYTHONPATH": str(ROOT)},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [(process.communicate(timeout=100), process.returncode) for process in running]
    return [(code, output, errors) for (output, errors), code in outputs]


def test_two_tasks(tmp_path):
    first, second = tasks(tmp_path, [0, 1], 60)
    assert (first[0], second[0]) == (0, 0), (first, second)
    lines = first[1].splitlines()
    assert any(line.startswith("lab08 network: ok, gloo all-reduce over 2 ranks") for line in lines)
    assert any(line.startswith("lab08 clock: ok, all 2 ranks within") for line in lines)
    assert any(line.startswith("lab08 versions: ok, the same on 2 ranks") for line in lines)
    assert "lab08 network: ok, gloo all-reduce over 2 ranks" in second[1]


def test_a_task_that_does_not_come(tmp_path):
    ((code, output, errors),) = tasks(tmp_path, [0], 2)
    assert code == 0, errors  # its own node is well
    assert "rank 1 network: FAIL, did not reach rank 0 at " in output


def test_rank_0_that_does_not_come(tmp_path):
    ((code, output, errors),) = tasks(tmp_path, [1], 2)
    assert code == 1, errors
    assert "lab08 network: FAIL, rank 0 at " in output
    assert "firewalls" in output
