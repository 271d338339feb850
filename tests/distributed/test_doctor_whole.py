"""`deberta doctor` as users start it: all looks, on this machine, with nothing pretended."""

import json
import subprocess
import sys

import pytest

from pipeline.preflight.small_worlds import look_at_world
from tests.worlds import environment

pytestmark = pytest.mark.distributed

EXPECTED = [
    *("python", "packages", "extras"),
    *("memory", "limits", "time service", "text"),
    *("launchers", "mpi", "slurm"),
    *(
        f"file system {name}"
        for name in ("rename", "fsync", "creation", "lock", "mapping", "names")
    ),
    *("deepspeed", "compiler", "offload build", "cuda", "triton"),
    *("gpu", "clock", "network", "world of 2, gloo"),
]


def variables():
    drop = ("SLURM", "OMPI", "PMI")
    return {key: value for key, value in environment().items() if not key.startswith(drop)}


def test_all_looks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "doctor", "--json", "--run", str(tmp_path / "run")],
        env=variables(),
        capture_output=True,
        text=True,
        timeout=250,
    )
    findings = {each["check"]: each for each in map(json.loads, done.stdout.splitlines())}
    wrong = [each for each in findings.values() if not each["ok"]]
    assert (done.returncode, wrong) == (0, []), done.stderr
    folders = [check for check in findings if " /" in check]
    assert [check for check in findings if check not in folders] == EXPECTED
    assert [check.partition(" /")[0] for check in folders] == [
        "shared memory",
        "temporary folder",
        "run folder",
    ]
    assert "cpu_adam" in findings["deepspeed"]["text"]
    assert findings["world of 2, gloo"]["text"].startswith("gloo all-reduce over 2 ranks, ")
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_one():
    line = look_at_world("n", variables(), "gloo", 1).line
    assert line.startswith("n world of 1, gloo: ok, gloo all-reduce of one rank, in ")


def test_a_world_that_cannot_meet():
    finding = look_at_world("n", {**variables(), "GLOO_SOCKET_IFNAME": "ib7"}, "gloo", 2)
    assert finding.line.startswith("n world of 2, gloo: FAIL, rank 0 at 127.0.0.1:")
    assert "ib7" in finding.text
    assert "DEBERTA_NETWORK_INTERFACE in slurm/site.env" in finding.cure


def test_ranks_that_say_nothing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so: wrong ELF class')")
    broken = {**variables(), "PYTHONPATH": str(tmp_path)}
    finding = look_at_world("n", broken, "gloo", 2)
    assert finding.line == (
        "n world of 2, gloo: FAIL, a rank has ended without a word: ImportError: libc10.so: wrong "
        "ELF class; see the lines of packages and of GPUs"
    )
