"""What GPU tests share: skipping without a device, and CPU variants that keep their code alive.

A test that takes `device` runs twice: on the GPU under `pytest -m gpu`, and on the CPU with the
rest of the suite, where it checks itself more than the code. A test that takes `cuda` or `on_gpu`
runs on a GPU only.
"""

import os

import pytest
import torch

# cuBLAS reads this when its first handle is made; training sets the same before that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_NEEDS_GPU)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=_NEEDS_GPU)])
def cuda(request):
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=_NEEDS_GPU)])
def on_gpu(request, monkeypatch):
    """Processes that the test starts train on the GPU; the suite keeps to the CPU otherwise."""
    monkeypatch.setenv("DS_ACCELERATOR", request.param)
    return torch.device(request.param)


@pytest.fixture
def deterministic():
    """Training's mode: an operation without a deterministic kernel raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
