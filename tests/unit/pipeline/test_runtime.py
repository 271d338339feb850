"""Ranks from the launcher's variables, signals, and where messages go."""

import logging
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from data_prep.errors import UserError
from pipeline.runtime import World, configure_logging, environment

ROOT = Path(__file__).parents[3]
LAUNCHED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def launched():
    """Pretend that a launcher has set these variables, and no others that matter."""

    def set_to(variables):
        for name in (*LAUNCHED, "PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
            os.environ.pop(name, None)
        os.environ.update(variables)

    # All of it is put back, also what the code under test has set.
    with mock.patch.dict(os.environ):
        set_to({})
        yield set_to


def test_nothing_launched_us(launched):
    world = World.from_environment()
    assert (world.rank, world.local_rank, world.world_size) == (0, 0, 1)
    assert world.device == torch.device("cpu")
    assert world.is_main


def test_torchrun_launched_us(launched):
    launched(LAUNCHED)
    world = World.from_environment()
    assert (world.rank, world.local_rank, world.world_size) == (3, 1, 4)
    assert not world.is_main


def test_variables_without_a_rank_launch_nothing(launched):
    """A shell may have MASTER_PORT or WORLD_SIZE left over."""
    launched({name: value for name, value in LAUNCHED.items() if name != "RANK"})
    assert World.from_environment().world_size == 1


@pytest.mark.parametrize("missing", [name for name in LAUNCHED if name != "RANK"])
def test_a_launcher_that_forgot_something(launched, missing):
    launched({name: value for name, value in LAUNCHED.items() if name != missing})
    with pytest.raises(UserError) as caught:
        World.from_environment()
    assert f"RANK is set but {missing} is not" in str(caught.value)
    assert "unset RANK to train in one process" in str(caught.value)


def test_mpirun_without_mpi4py(launched, monkeypatch):
    launched({"PMI_RANK": "0"})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"pip install 'deberta-pretrain\[mpi\]'"):
        World.from_environment()


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_open_mpi_needs_no_mpi4py_where_rank_0_waits_at_a_known_address(launched, monkeypatch):
    for name in (*OPEN_MPI, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    launched({**OPEN_MPI, "MASTER_ADDR": "n1", "MASTER_PORT": "29500"})
    world = World.from_environment()
    assert (world.rank, world.local_rank, world.world_size) == (3, 1, 4)
    assert os.environ.pop("LOCAL_WORLD_SIZE") == "2"
    launched(OPEN_MPI)
    with pytest.raises(UserError, match="mpi4py is not installed"):
        World.from_environment()


def test_an_mpirun_of_another_mpi_than_mpi4pys(launched, monkeypatch):
    comm = types.SimpleNamespace(Get_size=lambda: 1, Get_rank=lambda: 0)
    monkeypatch.setitem(
        sys.modules, "mpi4py", types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=comm))
    )
    launched(OPEN_MPI)
    with pytest.raises(UserError) as caught:
        World.from_environment()
    assert "mpirun has started 4 ranks, and mpi4py sees 1" in str(caught.value)


def test_the_cpu_on_request(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched(LAUNCHED)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert World.from_environment().device == torch.device("cpu")
    monkeypatch.delenv("DS_ACCELERATOR")
    assert World.from_environment().device == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert World.from_environment().device == torch.device("cuda", 0), "one GPU a task"


def test_environment_names_what_a_bit_exact_resume_needs():
    found = environment()
    for name in ("torch", "deepspeed", "numpy", "python", "machine", "threads", "device"):
        assert found[name]
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())


@pytest.fixture
def root_logger():
    """The root logger, put back as pytest had it."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    for handler in before:
        root.removeHandler(handler)  # or configure_logging would close it
    yield root
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in before:
        root.addHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize(("rank", "heard"), [(0, ["a warning", "an error"]), (2, ["an error"])])
def test_messages(root_logger, tmp_path, capsys, rank, heard):
    configure_logging(rank, tmp_path)
    configure_logging(rank, tmp_path)  # a second time replaces the first
    for write, text in (
        (root_logger.info, "a detail"),
        (root_logger.warning, "a warning"),
        (root_logger.error, "an error"),
    ):
        write(text)
    terminal = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in terminal] == heard
    log = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in log] == ["a detail", "a warning", "an error"]
    assert all(f"rank {rank} " in line for line in log)


def test_without_a_folder_messages_go_to_the_terminal_alone(root_logger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configure_logging(0, None)
    assert len(root_logger.handlers) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_named():
    code = """
import sys, torch
from data_prep.errors import UserError
from pipeline.runtime import World, start_world
try:
    start_world(World(0, 0, 2, torch.device("cpu")))
except UserError as error:
    print(error)
"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables, "MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
    assert f"rank 0 of 2 cannot meet the others at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in (
        done.stdout
    ), done.stderr
    assert "a port that is free there" in done.stdout


def test_a_rank_that_waits_in_vain_for_the_others():
    code = """
import torch
from data_prep.errors import UserError
from pipeline.runtime import World, start_world
try:
    start_world(World(0, 0, 2, torch.device("cpu")), collective_timeout_seconds=1.5)
except UserError as error:
    print(error)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables, "MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=60,  # torch's own patience is 30 minutes
        cwd=ROOT,
    )
    assert "rank 0 of 2 cannot meet the others" in done.stdout, done.stderr
