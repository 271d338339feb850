"""Ranks from the variables that srun gives its tasks, as a live SLURM 22.05 set them."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from data_prep.errors import UserError
from pipeline.runtime import World
from pipeline.slurm_ranks import (
    FIRST_PORT,
    NUM_PORTS,
    expand_node_list,
    is_task_of_a_step,
    launcher_variables,
    rank_in_step,
    speaks_for_its_host,
)

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_DISTRIBUTION": "block",
}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def step(monkeypatch):
    """Pretend to be a task of a step; returns a function that changes its variables."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI", "OMPI_")) or name in (*LAUNCHED, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)

    def set_to(**changes):
        for name, value in {**STEP, **changes}.items():
            monkeypatch.setenv(name, value)
        for name in (*LAUNCHED, "LOCAL_WORLD_SIZE"):  # put back at the end, what is set meanwhile
            if name not in changes:
                monkeypatch.setenv(name, "")
                monkeypatch.delenv(name)

    return set_to


def test_all_that_deepspeed_looks_for():
    port = str(FIRST_PORT + 4711)
    assert launcher_variables(STEP) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n08",
        "MASTER_PORT": port,
    }


@pytest.mark.parametrize(
    ("per_node", "node", "expected"),
    [("4", "0", "4"), ("2(x2),1", "2", "1"), ("1,3(x2)", "1", "3")],
)
def test_tasks_of_this_node(per_node, node, expected):
    changed = {**STEP, "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_NODEID": node}
    assert launcher_variables(changed)["LOCAL_WORLD_SIZE"] == expected


def test_the_world_of_a_task(step):
    step()
    world = World.from_environment()
    assert (world.rank, world.local_rank, world.world_size) == (3, 1, 5)
    assert os.environ["MASTER_ADDR"] == "n08"
    assert World.from_environment() == world, "a second look finds what the first has set"


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": ""},  # a batch shell: it has SLURM_PROCID=0 too
        {"SLURM_STEP_ID": "4294967291"},  # the same, as newer versions say it
        {"SLURM_STEP_ID": "4294967290"},  # salloc's interactive shell
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "8"},
        {"RANK": "0"},
    ],
)
def test_who_else_starts_processes_inside_of_a_job(changes):
    assert launcher_variables({**STEP, **changes}) == {}


def test_srun_with_pmi_needs_no_mpi4py(step, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    step(PMI_RANK="3", PMI_SIZE="5", PMIX_RANK="3")
    assert World.from_environment().rank == 3
    step(SLURM_STEP_NUM_TASKS="1", PMI_RANK="0", PMI_SIZE="1", PMIX_RANK="0")
    assert World.from_environment().world_size == 1


def test_mpirun_inside_of_a_step_is_asked_itself(step, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    step(OMPI_COMM_WORLD_RANK="1")
    with pytest.raises(UserError, match="mpi4py is not installed"):
        World.from_environment()


def test_who_speaks_before_anything_is_known():
    assert rank_in_step(STEP) == 3
    assert rank_in_step({**STEP, "RANK": "7"}) == 7
    assert rank_in_step({"RANK": "nonsense"}) == 0
    assert rank_in_step({"SLURM_PROCID": "2"}) == 0
    assert not is_task_of_a_step({"SLURM_PROCID": "2"})


def test_who_speaks_if_the_first_rank_does_not():
    assert [n for n in range(6) if speaks_for_its_host({**STEP, "SLURM_PROCID": str(n)})] == [1]
    assert speaks_for_its_host({**STEP, "SLURM_LOCALID": "0"})
    assert speaks_for_its_host({"RANK": "8", "LOCAL_RANK": "0"})
    assert speaks_for_its_host({"RANK": "1", "LOCAL_RANK": "1"})
    assert not speaks_for_its_host({"RANK": "9", "LOCAL_RANK": "1"})
    assert not speaks_for_its_host({"RANK": "9", "SLURM_LOCALID": "0"})


def test_addresses_that_are_given_are_kept():
    given = {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29400"}
    assert launcher_variables({**STEP, **given}).items() >= given.items()


def test_one_node_needs_no_names():
    one = {"SLURM_STEP_NODELIST": "n08", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    assert launcher_variables({**STEP, **one})["MASTER_ADDR"] == "127.0.0.1"
    found = launcher_variables({**STEP, **one, "MASTER_ADDR": "localhost"})
    assert found["MASTER_ADDR"] == "localhost"


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1"])
def test_an_address_that_every_node_takes_for_its_own(address):
    with pytest.raises(UserError) as caught:
        launcher_variables({**STEP, "MASTER_ADDR": address})
    assert f"MASTER_ADDR={address} is another machine on each of this step's 3 nodes" in str(
        caught.value
    )
    assert "(n[08-10]): unset it" in str(caught.value)


def test_tasks_placed_by_hand():
    with pytest.raises(UserError, match="export MASTER_ADDR with its name before srun"):
        launcher_variables({**STEP, "SLURM_DISTRIBUTION": "arbitrary"})
    found = launcher_variables({**STEP, "SLURM_DISTRIBUTION": "arbitrary", "MASTER_ADDR": "n10"})
    assert found["MASTER_ADDR"] == "n10"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE=two is not what srun"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID=3 is not one of the 3 nodes"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM names no nodes"),
    ],
)
def test_variables_that_srun_does_not_set(changes, words):
    with pytest.raises(UserError) as caught:
        launcher_variables({**STEP, **changes})
    assert words in str(caught.value)
    assert "start training with srun" in str(caught.value)


def test_ports_of_neighbours_differ():
    def port(job, step):
        ids = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        return int(launcher_variables({**STEP, **ids})["MASTER_PORT"])

    ports = {port(job, step) for job in range(50) for step in range(3)}
    assert len(ports) == 150
    assert all(FIRST_PORT <= port(job, 0) < 32_768 for job in (1, NUM_PORTS, 10**9 + 7))


NODE_LISTS = {
    "n1": "n1",
    "n1,n2": "n1 n2",
    "n[1-3,7]": "n1 n2 n3 n7",
    "n[1-2,7],gpu-[009-011]-x": "n1 n2 n7 gpu-009-x gpu-010-x gpu-011-x",
    "rack[1-2]n[08-10]": "rack1n08 rack1n09 rack1n10 rack2n08 rack2n09 rack2n10",
    "a,b[99-101],c-d.e": "a b99 b100 b101 c-d.e",
    "n[5,1]": "n5 n1",
}


@pytest.mark.parametrize(("text", "names"), NODE_LISTS.items())
def test_node_lists(text, names):
    assert expand_node_list(text) == names.split()


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol")
# scontrol 22.05 refuses text behind the last bracket, as in gpu-[001-004]-x, which others write.
@pytest.mark.parametrize("text", [text for text in NODE_LISTS if "]-" not in text])
def test_node_lists_as_scontrol_writes_them_out(text, tmp_path):
    config = tmp_path / "slurm.conf"
    config.write_text("ClusterName=t\nSlurmctldHost=h\nNodeName=n1\nPartitionName=p Nodes=n1\n")
    done = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        env={**os.environ, "SLURM_CONF": str(config)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert expand_node_list(text) == done.stdout.split()


@pytest.mark.parametrize("text", ["n[1-3", "n1-3]", "n[a-b]", "n[]", "n[1-]"])
def test_what_is_no_node_list(text):
    with pytest.raises(UserError, match="is no list of nodes as SLURM writes it"):
        expand_node_list(text)


def test_more_ranks_than_gpus(step, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    step()
    for count, index in ((1, 0), (2, 1), (8, 1)):  # --gpus-per-task=1, then --gpus-per-node
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert World.from_environment().device == torch.device("cuda", index)
    step(SLURM_LOCALID="2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        World.from_environment()
    assert "rank 2 of this host has no GPU of its own: 2 are visible" in str(caught.value)
