"""What `deberta doctor` says of CUDA, of kinds of GPUs, of Triton and of others who compute."""

import importlib.util
import os

import pytest
import torch

from pipeline.preflight import gpu_software
from pipeline.preflight.gpu_software import (
    look_at_abilities,
    look_at_build,
    look_at_processes,
    look_at_triton,
)

BUILT = ["sm_70", "sm_80", "sm_90", "compute_90"]


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """Pretends that torch has a CUDA build and GPUs of these names and capabilities."""
    device = tmp_path / "nvidia0"
    monkeypatch.setattr(gpu_software, "_DEVICE_FILE", device)

    def pretend(*kinds, built="12.8", has_device=True, works=True):
        device.touch() if has_device else device.unlink(missing_ok=True)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: works and bool(kinds))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: kinds[index][0])
        monkeypatch.setattr(
            torch.cuda,
            "get_device_capability",
            lambda device: kinds[getattr(device, "index", device)][1],
        )
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))

    return pretend


H100, V100, P100, B200 = (("H100", (9, 0)), ("V100", (7, 0)), ("P100", (6, 0)), ("B200", (10, 0)))


def test_builds_of_torch(cuda):
    cuda(H100)
    line = look_at_build("n", {}).line
    assert line.startswith(
        f"n cuda: ok, torch {torch.__version__} for CUDA 12.8, NCCL 2.27.3, cuDNN "
    )
    cuda(built=None, has_device=False)
    assert look_at_build("n", {}).text == f"torch {torch.__version__} for the CPU, and no GPU"
    cuda(built=None)
    line = look_at_build("n", {}).line
    assert "is built for the CPU, and there is an NVIDIA GPU; install torch for your driver" in line
    assert ": FAIL, " in line
    cuda(has_device=False)
    finding = look_at_build("n", {})
    assert finding.ok
    assert finding.text.endswith("; no NVIDIA device here, as on a login node")
    cuda()
    finding = look_at_build("n", {"CUDA_VISIBLE_DEVICES": ""})
    assert finding.ok
    assert "CUDA_VISIBLE_DEVICES is empty" in finding.text


def test_a_driver_that_is_too_old(cuda, monkeypatch):
    def refused():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nmore"
        )

    cuda()
    monkeypatch.setattr(torch.cuda, "init", refused)
    finding = look_at_build("n", {})
    assert not finding.ok
    assert finding.text.endswith(
        "does not reach the GPU: The NVIDIA driver on your system is too old (found version 11040)."
    )
    assert "compare the driver's CUDA" in finding.cure


def lines(*_):
    return [finding.line for finding in look_at_abilities("n")]


def test_kinds_of_gpus(cuda, monkeypatch):
    cuda()
    assert lines() == []
    monkeypatch.setattr(gpu_software, "head_refusal", lambda device, dtype: None)
    cuda(H100, H100)
    assert lines() == ["n H100: ok, compute capability 9.0, bf16; kernels with the tiles of sm_90"]
    cuda(B200)  # by the text for the driver's compiler
    assert lines()[0].startswith("n B200: ok, compute capability 10.0, bf16; kernels")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT[:-1])
    assert lines()[0].startswith(
        "n B200: FAIL, compute capability 10.0, and this torch is built for"
    )
    cuda(V100)
    assert lines() == [
        "n V100: warning, compute capability 7.0: no bf16, and none of our kernels; train with "
        "ds_configs/zero2_fp16.json and model.attention_backend=torch"
    ]
    cuda(P100)
    assert lines() == [
        f"n P100: FAIL, compute capability 6.0, and this torch is built for {', '.join(BUILT)}; "
        "install a torch that names it (pytorch.org)"
    ]
    cuda(H100, V100)
    assert lines()[-1].startswith("n gpus: warning, of several kinds: H100 and V100; train on one")


def test_kernels_that_cannot_be_had(cuda, monkeypatch):
    cuda(H100)
    reason = "Triton cannot be imported (none)"
    monkeypatch.setattr(gpu_software, "head_refusal", lambda device, dtype: reason)
    (line,) = lines()
    assert line.startswith(f"n H100: warning, compute capability 9.0, bf16; {reason}; pip install")


def test_triton(monkeypatch, cuda):
    cuda()
    assert look_at_triton("n").line.endswith(", and no GPU to compile for")
    cuda(H100)
    assert look_at_triton("n").line.startswith("n triton: ok, 3.")

    def broken(name):
        raise OSError("libtriton.so: undefined symbol")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_software.importlib, "import_module", broken)
        line = look_at_triton("n").line
    assert line.startswith("n triton: FAIL, cannot be imported: OSError: libtriton.so: undefined")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = look_at_triton("n").line
    assert line.startswith("n triton: warning, not installed; model.attention_backend=triton would")
    cuda()
    assert not look_at_triton("n").is_warning


def test_other_users(tmp_path, monkeypatch):
    def smi(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    path = f"{tmp_path}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    smi(f"printf 'GPU-1, 77, python, 1024\\nGPU-1, 78, julia, 5\\nGPU-2, {os.getpid()}, me, 9\\n'")
    (finding,) = look_at_processes("n", os.environ)
    assert finding.line == (
        "n gpu GPU-1: warning, is used by python (77, 1024 MiB), julia (78, 5 MiB); end them, or "
        "ask for GPUs of your own (--exclusive, --gpus-per-node)"
    )
    smi("exit 9")
    assert look_at_processes("n", os.environ) == []
    monkeypatch.setenv("PATH", "")
    assert look_at_processes("n", os.environ) == []
