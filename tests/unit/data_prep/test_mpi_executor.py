"""MPI as an executor: what is refused, and how real ranks end after errors."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from data_prep.errors import UserError
from data_prep.executor_choice import open_executor
from data_prep.executors import ProcessExecutor
from data_prep.mpi_executor import (
    MpiExecutor,
    rank_in_environment,
    refuse_foreign_launcher,
    refuse_uncounted_ranks,
)

ROOT = Path(__file__).parents[3]


def test_any_pool_of_concurrent_futures_will_do():
    drawn = []

    def items():
        for item in range(100):
            drawn.append(item)
            yield item

    with ThreadPoolExecutor(2) as pool:
        results = MpiExecutor(pool, 2).run(math.sqrt, items())
        first = [next(results)]
        assert len(drawn) <= 10
        assert sorted(first + list(results)) == [math.sqrt(item) for item in range(100)]


def test_ranks_that_do_not_know_of_each_other_are_refused():
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        with pytest.raises(UserError, match=f"{name}=4, but this process is alone.*mpirun beside"):
            refuse_foreign_launcher(1, {name: "4"})
        refuse_foreign_launcher(4, {name: "4"})
        refuse_foreign_launcher(1, {name: "1"})
    refuse_foreign_launcher(1, {})


def test_mpirun_without_the_executor_is_refused():
    with pytest.raises(UserError, match=r"mpirun has started 3 processes.*add --executor mpi, or"):
        refuse_uncounted_ranks("processes", {"PMI_SIZE": "3"})
    refuse_uncounted_ranks("processes", {"PMI_SIZE": "1"})
    refuse_uncounted_ranks("processes", {})


def test_ranks_of_all_launchers():
    assert rank_in_environment({}) == 0
    assert rank_in_environment({"PMI_RANK": "2"}) == 2
    assert rank_in_environment({"OMPI_COMM_WORLD_RANK": "3"}) == 3


def test_workers_are_the_ranks():
    with (
        pytest.raises(UserError, match=r"--workers 8 does not go with.*type mpirun -n 9 deberta"),
        open_executor("mpi", 8),
    ):
        pass


def test_processes_are_one_unless_told():
    with open_executor("slurm-array", None) as executor:
        assert isinstance(executor, ProcessExecutor)
        assert list(executor.run(math.sqrt, [9])) == [3.0]


def test_without_mpi4py_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with (
        pytest.raises(UserError, match=r"mpi needs mpi4py.*pip install 'deberta-pretrain\[mpi\]'"),
        open_executor("mpi", None),
    ):
        pass


SCRIPT = """
import os, sys, time
from pathlib import Path
from data_prep import mpi_executor
from data_prep.mpi_executor import mpi_ranks
from data_prep.tokenizer import Tokenizer

mpi_executor.GRACE_SECONDS = float(sys.argv[1])

def work(item):
    if item == "sleep":
        Path(sys.argv[2]).touch()
        time.sleep(600)
    if item == "fail":
        while not Path(sys.argv[2]).exists() and "sleep" in sys.argv:
            time.sleep(0.01)
        Tokenizer.load(Path("no-such-folder"))
    return item

if __name__ == "__main__":
    if "missing" in sys.argv and os.environ["PMI_RANK"] == "1":
        sys.modules["mpi4py"] = None
    with mpi_ranks() as ranks:
        if ranks is None:
            print("served")
        else:
            print(sorted(ranks.run(work, sys.argv[3:])))
"""


@pytest.fixture
def ranks(tmp_path):
    """(number of ranks, grace, items) -> a started mpirun."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(count, grace_seconds, *items):
        mpirun = Path(sys.executable).with_name("mpirun")
        words = [mpirun, "-n", count, sys.executable, tmp_path / "script.py", grace_seconds]
        process = subprocess.Popen(
            [*map(str, words), str(tmp_path / "asleep"), *items],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_ranks_work_for_rank_0(ranks):
    process = ranks(3, 10, "c", "b", "a")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == ["['a', 'b', 'c']", "served", "served"]


def test_an_error_waits_for_ranks_that_are_nearly_done(ranks):
    process = ranks(3, 10, "fail", "a")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1  # the script does not catch what the command line does
    assert "UserError: tokenizer no-such-folder cannot be read" in err
    assert "MPI_Abort" not in err


def test_an_error_ends_ranks_that_are_not(ranks):
    began = time.monotonic()
    process = ranks(3, 0.3, "sleep", "fail")
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 2
    assert err.count("error: tokenizer no-such-folder cannot be read") == 1
    assert "Traceback" not in err


def test_a_rank_without_mpi_is_not_waited_for(ranks):
    process = ranks(3, 10, "missing")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count(f"error: {socket.gethostname()}: --executor mpi needs mpi4py and") == 1


def test_a_killed_rank_ends_the_world(ranks, tmp_path):
    process = ranks(3, 10, "sleep")
    while not (tmp_path / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.01)
    everybody = psutil.Process(process.pid).children(recursive=True)
    python = [each for each in everybody if "script.py" in " ".join(each.cmdline())]
    assert len(python) == 3
    python[-1].send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert psutil.wait_procs(everybody, timeout=20)[1] == []
