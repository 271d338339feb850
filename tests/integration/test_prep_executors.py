"""The same dataset from processes, MPI ranks and array tasks, by the commands that users type.

SLURM is not here: its array tasks are told what they are by the variables that it would set.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.prep.commands import (
    array_environments,
    build_command,
    contents,
    environment,
    write_lines,
)


@pytest.fixture(scope="module")
def folder(tokenizer_folder, corpus, tmp_path_factory):
    """A corpus of some twenty units, and the dataset that one worker makes of it."""
    folder = tmp_path_factory.mktemp("executors")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    write_lines(corpus, folder / "corpus", copies=3)
    build(folder, "one", "processes", "--workers", "1")
    return folder


def build(folder, output, executor, *words, more_environment=None):
    """Run a build to its end, which must be a good one; its report."""
    done = subprocess.run(
        build_command(executor, output, *words, "--json"),
        cwd=folder,
        env={**environment(), **(more_environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_three_workers(folder):
    report = build(folder, "three", "processes", "--workers", "3")
    assert len(report["units_of_worker"]) > 1
    assert contents(folder / "three") == contents(folder / "one")


def test_four_ranks(folder):
    report = build(folder, "ranks", "mpi")
    made = report["units_of_worker"]
    assert len(made) >= 2  # rank 0 hands out, and at least two others have written shards
    assert sum(made.values()) > 10
    assert contents(folder / "ranks") == contents(folder / "one")


def test_one_rank_without_mpirun(folder):
    words = build_command("mpi", "lone", "--json")
    done = subprocess.run(
        words[words.index(sys.executable) :],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "note: there is one MPI rank" in done.stderr
    assert "mpirun -n 8 deberta-prep build" in done.stderr
    assert contents(folder / "lone") == contents(folder / "one")


def test_eight_array_tasks_at_once_and_one_of_them_twice(folder):
    variables = array_environments(8)
    tasks = [
        subprocess.Popen(
            build_command("slurm-array", "array", "--json"),
            cwd=folder,
            env={**environment(), **variables[number]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (*range(8), 3)
    ]
    made = []
    for task in tasks:
        out, err = task.communicate(timeout=120)
        assert task.returncode == 0, err
        report = json.loads(out)
        made.append(report.get("made_units", sum(report.get("units_of_worker", {}).values())))
    assert sum(number > 0 for number in made) >= 8  # the second 3 may have found nothing to do
    assert contents(folder / "array") == contents(folder / "one")


@pytest.mark.parametrize("executor", ["processes", "mpi", "slurm-array"])
def test_what_a_worker_meets_is_one_message(folder, executor):
    output = f"blocked-{executor}"
    unit = folder / output / ".work" / "unit-000005"
    unit.parent.mkdir(parents=True)
    unit.write_text("in the way: no unit can be put here")
    variables = array_environments(1)[0] if executor == "slurm-array" else {}
    done = subprocess.run(
        build_command(executor, output),
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("build: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {output}/.work/unit-000005: cannot be written (Not a dir")
    unit.unlink()
    build(folder, output, executor, more_environment=variables)
    assert contents(folder / output) == contents(folder / "one")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--no-such-option",), "No such option"),
        (("--heldout-fraction", "0.9"), "error: --heldout-fraction 0.9: must lie between"),
    ],
)
def test_ranks_complain_with_one_voice(folder, words, message):
    done = subprocess.run(
        build_command("mpi", "refused", *words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_told_once_and_the_build_goes_on(folder):

    process = subprocess.Popen(
        build_command("mpi", "interrupted"),
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((folder / "interrupted").glob(".work/unit-*/done.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("interrupted; run the same command to go on with interrupted") == 1
    assert "Traceback" not in err
    assert build(folder, "interrupted", "mpi")["resumed_units"] > 0
    assert contents(folder / "interrupted") == contents(folder / "one")
