"""Deduplication under each executor: the same bytes, undisturbed and after kills of anybody.

pytest tests/faults/prep --seeds 20
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from tests.faults.prep.commands import (
    MPIRUN,
    RANKS,
    array_environments,
    contents,
    environment,
    write_lines,
)

TIMEOUT_SECONDS = 120
ARRAY_TASKS = 8
WORDS = ["dedup", "corpus", "--unit-bytes", "100000", "--decontaminate", "questions.jsonl"]


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("seeds", default=1)))


def command(executor, output, *words):
    launcher = [str(MPIRUN), "-n", str(RANKS)] if executor == "mpi" else []
    program = [*launcher, sys.executable, "-m", "data_prep"]
    return [*program, *WORDS, "--output", output, "--executor", executor, "--json", *words]


def run(folder, executor, output, *words, variables=None):
    done = subprocess.run(
        command(executor, output, *words),
        cwd=folder,
        env={**environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """A folder with a corpus of near-copies, and the decisions that one process makes about it."""
    folder = tmp_path_factory.mktemp("dedup")
    write_lines(corpus, folder / "corpus", copies=2)
    lines = sorted(corpus.glob("*.txt"))[0].read_text().split("\n")
    text = next(line for line in lines if len(line.split()) > 40)
    (folder / "questions.jsonl").write_text(json.dumps({"text": text}) + "\n")
    report = run(folder, "processes", "undisturbed", "--workers", "1")
    assert report["removed"]["near duplicate"] > 50
    assert report["removed"]["evaluation overlap"] == 2
    return folder


def test_three_workers_decide_the_same(undisturbed):
    run(undisturbed, "processes", "three", "--workers", "3")
    assert contents(undisturbed / "three") == contents(undisturbed / "undisturbed")


def test_mpi_ranks_decide_the_same(undisturbed):
    run(undisturbed, "mpi", "ranks")
    assert contents(undisturbed / "ranks") == contents(undisturbed / "undisturbed")


def test_array_tasks_decide_the_same(undisturbed):
    reports = [
        run(undisturbed, "slurm-array", "tasks", variables=variables)
        for variables in array_environments(3)
    ]
    assert [report.get("finished_units", 0) < report.get("num_units", 0) for report in reports] == [
        True,
        True,
        False,
    ]
    assert contents(undisturbed / "tasks") == contents(undisturbed / "undisturbed")
    late = run(undisturbed, "slurm-array", "tasks", variables=array_environments(3)[0])
    assert late["already_complete"] is True


@pytest.mark.row(26)
@pytest.mark.parametrize("executor", ["processes", "mpi", "slurm-array"])
def test_kills_leave_no_trace(undisturbed, executor, seed):
    rng = random.Random(f"{executor} {seed}")
    output = undisturbed / f"killed-{executor}-{seed}"
    words = ["--workers", "2"] if executor == "processes" else []
    all_variables = array_environments(ARRAY_TASKS) if executor == "slurm-array" else [{}]
    started = [
        subprocess.Popen(
            command(executor, output.name, *words),
            cwd=undisturbed,
            env={**environment(), **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for variables in all_variables
    ]
    wait_for_steps(started, output, rng.randrange(16))
    everybody = [psutil.Process(each.pid) for each in started if each.poll() is None]
    for master in tuple(everybody):
        with contextlib.suppress(psutil.NoSuchProcess):
            everybody += master.children(recursive=True)
    if everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(everybody).kill()
    codes = [process.wait(TIMEOUT_SECONDS) for process in started]
    assert psutil.wait_procs(everybody, timeout=30)[1] == []
    # As SLURM would, only those that failed are started again; a last look changes nothing.
    again = [variables for code, variables in zip(codes, all_variables, strict=True) if code]
    for variables in again:
        run(undisturbed, executor, output.name, *words, variables=variables)
    last = run(undisturbed, executor, output.name, *words, variables=all_variables[-1])
    assert last["already_complete"] is True
    assert contents(output) == contents(undisturbed / "undisturbed")
    shutil.rmtree(output)


def wait_for_steps(processes, output, count):
    """Wait until so many folders of steps are there, or for the end."""
    while None in [process.poll() for process in processes]:
        with contextlib.suppress(OSError):
            names = [path.name for path in (output / ".work").iterdir()]
            if len([name for name in names if "-0" in name and "partial" not in name]) >= count:
                return
        time.sleep(0.002)
