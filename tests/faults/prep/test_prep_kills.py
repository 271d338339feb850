"""SIGKILL to a random process of a build under each executor, and the same command once more.

    pytest tests/faults/prep --seeds 20

A seed says when (after how many finished units, and some milliseconds) and whom: mpirun, the
process that hands out the work, or one that does it.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections import Counter

import psutil
import pytest

from tests.faults.prep.commands import (
    array_environments,
    build_command,
    contents,
    environment,
    write_lines,
)

TIMEOUT_SECONDS = 120
ARRAY_TASKS = 3
WORDS = {"processes": ("--workers", "2"), "mpi": (), "slurm-array": ()}


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("seeds", default=1)))


@pytest.fixture(scope="module")
def undisturbed(tokenizer_folder, corpus, tmp_path_factory):
    """A folder with a corpus and the dataset that two processes make of it, and its units."""
    folder = tmp_path_factory.mktemp("kills")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    write_lines(corpus, folder / "corpus", copies=3)
    build = Build(folder, "undisturbed", "processes")
    (code,), errors, (report,) = build.run(build.variables)
    assert code == 0, errors
    return folder, sum(report["units_of_worker"].values())


@pytest.fixture(scope="module")
def kills():
    """Executor -> whom the seeds have killed so far."""
    return {executor: [] for executor in WORDS}


class Build:
    """The processes of one build at work."""

    def __init__(self, folder, output, executor):
        self.folder, self.output, self.executor = folder, folder / output, executor
        self.variables = [{}] if executor != "slurm-array" else array_environments(ARRAY_TASKS)
        self.started = []

    def start(self, variables):
        process = subprocess.Popen(
            build_command(self.executor, self.output.name, *WORDS[self.executor], "--json"),
            cwd=self.folder,
            env={**environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, all_variables):
        """One process after another, each to its end."""
        ends = []
        for variables in all_variables:
            self.start(variables)
            ends.append(self.end())
        return (
            [code for codes, _, _ in ends for code in codes],
            "".join(errors for _, errors, _ in ends),
            [json.loads(out) for _, _, outs in ends for out in outs if out],
        )

    def finished_units(self):
        return {path.parent.name for path in self.output.glob(".work/unit-??????/done.json")}

    def everybody(self):
        """All processes of the build that are there."""
        found = []
        for started in self.started:
            if started.poll() is None:
                master = psutil.Process(started.pid)
                found += [master, *master.children(recursive=True)]
        return found

    def role(self, process):
        """What a process is; None for those that the system starts for itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            if process.pid in [started.pid for started in self.started]:
                return "mpirun" if self.executor == "mpi" else "the master"
            if "data_prep build" in words and "hydra" not in words:
                return "a rank"
            if "spawn_main" in words:
                return "a worker"
        return None

    def kill_at_random(self, rng, num_units):
        """Wait for a random moment and kill somebody; his role, and all that were there."""
        units, seconds = rng.randrange(num_units), rng.random() * 0.2
        while len(self.finished_units()) < units and None in [p.poll() for p in self.started]:
            time.sleep(0.002)
        time.sleep(seconds)
        everybody = self.everybody()
        victims = [(role, each) for each in everybody if (role := self.role(each))]
        if not victims:
            return "nobody", everybody
        role, victim = rng.choice(victims)
        victim.send_signal(signal.SIGKILL)
        return role, everybody

    def end(self):
        """Wait for what was started; the exit codes and all that was said to people."""
        ends = [process.communicate(timeout=TIMEOUT_SECONDS) for process in self.started]
        codes = [process.returncode for process in self.started]
        self.started = []
        return codes, "".join(err for _, err in ends), [out for out, _ in ends]

    def close(self):
        for process in self.started:
            if process.poll() is None:
                tree = psutil.Process(process.pid).children(recursive=True)
                for each in (process, *tree):
                    each.kill()
                process.communicate()


@pytest.mark.row(26)
@pytest.mark.parametrize("executor", WORDS)
def test_a_kill_leaves_no_trace(undisturbed, executor, seed, kills, note, request):
    folder, num_units = undisturbed
    rng = random.Random(f"{executor} {seed}")
    build = Build(folder, f"{executor}-{seed}", executor)
    try:
        for variables in build.variables:
            build.start(variables)
        role, everybody = build.kill_at_random(rng, num_units)
        codes, errors, _ = build.end()
        # Nobody outlives those who would wait for him, nor writes while the build goes on.
        assert psutil.wait_procs(everybody, timeout=30)[1] == []
        assert "Traceback" not in errors
        kept = build.finished_units()
        if any(codes):  # as SLURM would, only those that failed are started again
            again = [number for number, code in enumerate(codes) if code]
            codes, errors, reports = build.run([build.variables[number] for number in again])
            assert not any(codes), errors
            for number, report in zip(again, reports, strict=True):
                check_nothing_is_done_twice(report, kept, number, len(build.variables), num_units)
    finally:
        build.close()
    assert contents(build.output) == contents(folder / "undisturbed")
    shutil.rmtree(build.output)
    kills[executor].append(role)
    if seed == request.config.getoption("seeds", default=1) - 1:
        whom = ", ".join(f"{role} {n}" for role, n in sorted(Counter(kills[executor]).items()))
        note(f"{executor}: SIGKILL to {whom}", "equal byte for byte, nothing done twice")


def check_nothing_is_done_twice(report, kept, share, shares, num_units):
    """What was finished before the second start is found there, and the rest is made."""
    if report.get("already_complete"):
        return
    mine = [name for name in kept if int(name.removeprefix("unit-")) % shares == share]
    made = report.get("made_units", sum(report.get("units_of_worker", {}).values()))
    assert report["resumed_units"] == len(mine)
    assert made == len(range(share, num_units, shares)) - len(mine)
