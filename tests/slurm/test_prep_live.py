"""Preparation on a live SLURM, by hand: an array whose task is killed, and MPI, as one process."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.documents import embedded_corpus
from tests.worlds import ROOT

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 2, "gpus": 0}
TASKS = 8
KILLED_TASK = 3
UNIT_BYTES = 5_000  # some thirty units a task, so that a kill finds some done and some not


@pytest.fixture(scope="module")
def environment(cluster):
    """As `set -a; . slurm/site.env` leaves it."""
    return {
        **cluster.environment,
        "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DEBERTA_HOME": str(ROOT),
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for path in sorted(Path(embedded_corpus()).rglob("*.txt")):
        shutil.copy(path, folder)
    return folder


def words(texts, tokenizer_folder, output):
    return {
        "SOURCES": str(texts),
        "TOKENIZER": str(tokenizer_folder),
        "OUTPUT": str(output),
        "PREP_WORDS": f"--txt-document line --unit-bytes {UNIT_BYTES}",
    }


@pytest.fixture(scope="module")
def alone(texts, tokenizer_folder, tmp_path_factory, environment):
    """Hashes of what one process makes of the texts."""
    output = tmp_path_factory.mktemp("alone") / "dataset"
    given = words(texts, tokenizer_folder, output)
    argv = ["deberta-prep", "build", given["SOURCES"], "--tokenizer", given["TOKENIZER"]]
    argv += ["--output", given["OUTPUT"], *given["PREP_WORDS"].split()]
    subprocess.run(argv, env=environment, check=True, capture_output=True, timeout=120)
    return hashes(output)


def hashes(folder):
    """The sha256 of every file but the manifest's own, which names how it was made."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_build(job_id, task, restart, ready=lambda: True, timeout_seconds=60):
    """Kill the process of a task's build once it has begun its start number `restart`."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["name", "cmdline"]):
            if "build" not in (process.info["cmdline"] or ())[:3]:
                continue
            try:
                variables = process.environ()
            except psutil.Error:
                continue
            mine = (variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID"))
            if mine != (job_id, str(task)):
                continue
            if variables.get("SLURM_RESTART_COUNT", "0") != str(restart):
                continue
            while not ready():
                assert process.is_running(), "the build had ended before it was to be killed"
                time.sleep(0.002)
            os.kill(process.pid, 9)
            return
        time.sleep(0.02)
    raise TimeoutError(f"start {restart} of task {task} was not seen")


def test_a_task_that_is_killed_twice_changes_no_byte(
    cluster, environment, texts, tokenizer_folder, alone, tmp_path, outcome
):
    output = tmp_path / "dataset"
    given = words(texts, tokenizer_folder, output)
    job_id = cluster.sbatch(
        ROOT / "slurm/prep.sbatch",
        env={**environment, **given},
        cwd=tmp_path,
        options=(f"--array=0-{TASKS - 1}", "--cpus-per-task=1"),
    )

    def has_some_units():
        return len(list(output.glob(".work/unit-??????"))) > 2

    kill_build(job_id, KILLED_TASK, 0)
    kill_build(job_id, KILLED_TASK, 1, ready=has_some_units)
    for task in range(TASKS):
        job = cluster.wait(f"{job_id}_{task}", timeout_seconds=120)
        assert job["JobState"] == "COMPLETED", (task, job)
        assert job["Restarts"] == ("2" if task == KILLED_TASK else "0")
    assert hashes(output) == alone
    (log,) = tmp_path.glob(f"*{job_id}_{KILLED_TASK}.out")
    assert log.read_text().count("exit code 137 of deberta-prep; queued again") == 2
    states = cluster.states_seen(f"{job_id}_{KILLED_TASK}")
    outcome("a task of an array of 8 killed twice", states=states, restarts=2, end="same hashes")


def test_ranks_of_mpi_on_two_nodes_make_the_same(
    cluster, environment, texts, tokenizer_folder, alone, tmp_path
):
    output = tmp_path / "dataset"
    given = {**words(texts, tokenizer_folder, output), "EXECUTOR": "mpi"}
    given["UCX_TLS"] = (
        "tcp,self"  # MPI sees one machine, whose shared memory the hosts do not share
    )
    job_id = cluster.sbatch(
        ROOT / "slurm/prep.sbatch",
        env={**environment, **given},
        cwd=tmp_path,
        options=(
            "--array=0",
            "--nodes=2",
            "--ntasks=4",
            "--ntasks-per-node=2",
            "--cpus-per-task=1",
        ),
    )
    job = cluster.wait(f"{job_id}_0", timeout_seconds=120)
    said = "".join(path.read_text() for path in tmp_path.glob("*.out"))
    assert job["JobState"] == "COMPLETED", said
    assert hashes(output) == alone


def test_wrong_input_is_told_and_not_tried_again(cluster, environment, tokenizer_folder, tmp_path):
    given = words(tmp_path / "nowhere", tokenizer_folder, tmp_path / "dataset")
    job_id = cluster.sbatch(
        ROOT / "slurm/prep.sbatch",
        env={**environment, **given},
        cwd=tmp_path,
        options=("--array=0", "--cpus-per-task=1"),
    )
    job = cluster.wait(f"{job_id}_0", timeout_seconds=60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    said = "".join(path.read_text() for path in tmp_path.glob("*.out"))
    assert "nowhere" in said
    assert "FAILED with exit code 2: deberta-prep build" in said
