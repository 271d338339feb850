"""What `deberta doctor --node` finds on one node, and what it says then."""

import json
import os
import subprocess

import pytest
import torch

from pipeline import cli
from pipeline.preflight import disk, gpu
from pipeline.preflight.disk import judge_clock, look_at_clock, look_at_folder
from pipeline.preflight.finding import Finding
from pipeline.preflight.gpu import arithmetic_error, look_at_driver, look_at_gpus, slow_ones
from pipeline.preflight.network import (
    _absent,
    _Peer,
    compare_clocks,
    compare_versions,
    look_at_interfaces,
    look_at_loopback,
)
from pipeline.runtime import World

CPU = torch.device("cpu")
SMALL = 1 << 20


def test_lines():
    assert Finding("n1", "gpu 0", True, "a GPU").line == "n1 gpu 0: ok, a GPU"
    line = Finding("n1", "gpu 0", False, "broken", "drain it").line
    assert line == "n1 gpu 0: FAIL, broken; drain it"


def test_a_right_answer_and_a_wrong_one(monkeypatch):
    assert arithmetic_error(CPU) < gpu._TOLERANCE
    honest = torch.Tensor.__matmul__

    def broken(left, right):
        product = honest(left, right)
        if product.dtype == torch.float32:
            product[17, 3] += 1.0
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert arithmetic_error(CPU) > gpu._TOLERANCE


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that the CPU is so many GPUs; returns what may be changed about them."""
    said = {"free": [78 << 30, 78 << 30], "error": [0.0, 0.0], "tflops": [700.0, 710.0]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(said["free"]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (said["free"][device.index], 80 << 30)
    )

    def error(device):
        if isinstance(problem := said["error"][device.index], Exception):
            raise problem
        return problem

    monkeypatch.setattr(gpu, "arithmetic_error", error)
    monkeypatch.setattr(gpu, "speed_tflops", lambda device: said["tflops"][device.index])
    monkeypatch.setattr(gpu, "look_at_driver", lambda node: [])
    return said


def test_gpus_that_are_well(gpus):
    findings = look_at_gpus("n1", 2)
    assert [finding.ok for finding in findings] == [True, True]
    assert findings[0].line == "n1 gpu 0: ok, a GPU, 78.0 of 80.0 GiB free, 700 TFLOP/s"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"error": [0.0, 1e-2]}, "gpu 1: FAIL, a GPU multiplies wrongly: 1.0e-02 off the CPU's"),
        (
            {"error": [0.0, RuntimeError("Xid 79\nmore")]},
            "gpu 1: FAIL, a GPU does not work (Xid 79)",
        ),
        ({"free": [78 << 30, 40 << 30]}, "gpu 1: FAIL, a GPU, 40.0 of 80.0 GiB free"),
        ({"tflops": [700.0, 400.0]}, "gpu 1: FAIL, 400 TFLOP/s where the GPUs of this node"),
    ],
)
def test_gpus_that_are_not(gpus, changes, words):
    gpus.update(changes)
    wrong = [finding for finding in look_at_gpus("n1", 2) if not finding.ok]
    assert len(wrong) == 1
    assert wrong[0].line.startswith(f"n1 {words}")
    assert wrong[0].cure


def test_a_gpu_that_is_missing(gpus):
    (finding,) = look_at_gpus("n1", 8)
    assert finding.line.startswith("n1 gpu: FAIL, 2 are visible and 8 were given to the job; ")


def test_no_gpu_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look_at_gpus("n1", None)[0].ok
    assert not look_at_gpus("n1", 4)[0].ok


def test_a_gpu_that_does_not_work_sets_no_standard():
    assert slow_ones("n", [0.0, 700.0, 690.0]) == []
    assert [each.check for each in slow_ones("n", [700.0, 700.0, 300.0])] == ["gpu 2"]
    assert slow_ones("n", [0.0]) == []


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name first on PATH."""

    def answer(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return answer


def test_the_driver(nvidia_smi, monkeypatch):
    nvidia_smi("printf '0, 570.1, 0\\n1, 570.1, [N/A]\\n'")
    assert look_at_driver("n1")[0].line == "n1 driver: ok, 570.1, no uncorrected memory errors"
    nvidia_smi("printf '0, 570.1, 0\\n1, 570.1, 3\\n'")
    assert look_at_driver("n1")[0].line == (
        "n1 gpu 1: FAIL, 3 uncorrected memory errors (ECC); reset the GPU; drain the node if they "
        "come again"
    )
    for script in ("exit 9", "echo nonsense", "exec sleep 60"):
        monkeypatch.setattr(gpu, "_SMI_SECONDS", 1)
        nvidia_smi(script)
        (finding,) = look_at_driver("n1")
        assert finding.line.startswith("n1 driver: FAIL, nvidia-smi does not answer")
    monkeypatch.setenv("PATH", "")
    assert look_at_driver("n1") == []


def test_a_disk(tmp_path):
    finding = look_at_folder("n1", "run folder", tmp_path / "not" / "yet", SMALL)
    assert finding.ok, finding
    assert finding.check == f"run folder {tmp_path / 'not' / 'yet'}"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written(monkeypatch, tmp_path):
    finding = look_at_folder("n1", "scratch", disk.Path("/proc/self"), SMALL)
    assert not finding.ok
    assert "mount or repair it" in finding.cure


def test_a_disk_that_reads_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_read_fully", lambda descriptor, count: b"other")
    finding = look_at_folder("n1", "run folder", tmp_path, SMALL)
    assert "other bytes are read back than were written" in finding.line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "rates", "cure"),
    [
        ("size=8m", (100, 100), "make room"),
        ("size=2g,nr_inodes=50", (100, 100), "make room"),
        ("size=2g", (100, 2), "checkpoints would take hours"),
    ],
)
def test_small_and_slow_disks(options, rates, cure, tmp_path, monkeypatch):
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        monkeypatch.setattr(disk, "_rates", lambda *_: rates)
        finding = look_at_folder("n1", "run folder", folder, SMALL)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert not finding.ok
    assert cure in finding.cure


def test_a_clock(tmp_path, monkeypatch):
    assert look_at_clock("n1", tmp_path).ok
    now = disk.time.time() + 3600
    monkeypatch.setattr(disk.time, "time", lambda: now)
    finding = look_at_clock("n1", tmp_path)
    assert finding.line.startswith("n1 clock: FAIL, +36")
    assert "chronyd" in finding.cure
    assert not judge_clock("n1", -5.1, "x").ok
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "is_there"),
    [
        ({"GLOO_SOCKET_IFNAME": "lo"}, True),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, True),
        ({"NCCL_SOCKET_IFNAME": "l"}, True),  # NCCL takes the beginning of a name
        ({"NCCL_SOCKET_IFNAME": "^docker"}, True),
        ({"NCCL_SOCKET_IFNAME": "=l"}, False),
        ({"GLOO_SOCKET_IFNAME": "ib7"}, False),
        ({}, True),
    ],
)
def test_interfaces(variables, is_there):
    findings = look_at_interfaces("n1", variables)
    assert (findings == []) == is_there
    for finding in findings:
        ((name, value),) = variables.items()
        assert f"{name}={value}, and this node has lo" in finding.text


def test_one_process_sees_loopback_alone():
    finding = look_at_loopback("n1")
    assert finding.ok
    assert "loopback alone" in finding.text


VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def test_clocks_of_all_nodes():
    peers = [_Peer(f"n{n}", 100.0 + n / 10, VERSIONS) for n in range(3)]
    assert (
        compare_clocks(peers)[0].line == "n0 clock: ok, all 3 ranks within 0.10 s of their median"
    )
    peers[2] = _Peer("n2", 130.0, VERSIONS)
    (finding,) = compare_clocks(peers)
    assert finding.line.startswith("n2 clock: FAIL, +29.90 s against the others' median")


def test_versions_of_all_nodes():
    peers = [_Peer(f"n{n}", 0.0, VERSIONS) for n in range(3)]
    assert compare_versions(peers)[0].ok
    peers[0] = _Peer("n0", 0.0, {**VERSIONS, "torch": "2.11.0"})
    (finding,) = compare_versions(peers)
    assert finding.line.startswith("n0 versions: FAIL, torch 2.11.0 (elsewhere 2.13.0); use one")


def test_the_node_of_a_rank_that_did_not_come():
    variables = {"SLURM_STEP_NODELIST": "gpu[07-09]", "MASTER_ADDR": "gpu07"}
    finding = _absent(2, World(0, 0, 3, CPU), variables)
    assert finding.line.startswith("gpu09 network: FAIL, did not reach rank 0 at gpu07 in 25 s; ")
    assert _absent(2, World(0, 0, 6, CPU), variables).node == "rank 2", "several tasks a node"
    assert _absent(1, World(0, 0, 2, CPU), {"MASTER_ADDR": "n1"}).node == "rank 1"


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No launcher, no GPU, a folder of its own."""
    for name in ("RANK", "WORLD_SIZE", "RUN", "DEBERTA_SCRATCH", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(disk, "SAMPLE_BYTES", SMALL)
    monkeypatch.chdir(tmp_path)


def doctor(capsys, *words):
    """(exit code, lines) of `deberta doctor`."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *words])
    return caught.value.code, capsys.readouterr().out.splitlines()


def test_the_command(alone, capsys, monkeypatch):
    code, lines = doctor(capsys, "--node", "--scratch", ".")
    assert code == 0
    checks = [line.split(": ")[0].split(maxsplit=1)[1] for line in lines]
    assert checks == ["gpu", "run folder .", "scratch .", "clock", "network"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    code, lines = doctor(capsys, "--node", "--json")
    assert code == 1
    (wrong,) = [each for each in map(json.loads, lines) if not each["ok"]]
    assert wrong["check"] == "network"
    assert wrong["cure"]


def test_a_node_alone_builds_nothing(alone, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--node", "--build"])
    assert caught.value.code == 2
    assert "--build belongs to the installation: leave --node out" in capsys.readouterr().err


def test_variables_of_a_job(alone, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RUN", "runs/of-the-job")
    monkeypatch.setenv("DEBERTA_SCRATCH", "")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu17")
    code, lines = doctor(capsys, "--node")
    assert code == 0
    assert lines[1].startswith("gpu17 run folder runs/of-the-job: ok")
    assert not any("scratch" in line for line in lines)
