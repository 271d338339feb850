"""Where a backend does not serve a call: `torch` does, and one line in the log says why."""

import importlib.util
import sys

import pytest
import torch

from pipeline.modeling.kernels import serving
from tests.attention_batches import AttentionBatch
from tests.interpreting import forget_kernels, needs_triton

pytestmark = pytest.mark.usefixtures("interpreter")


def fall_back(caplog, backend="triton", *, batch):
    """Attend twice where the backend does not serve; the one line that was logged."""
    serving.say_once.cache_clear()
    caplog.clear()
    caplog.set_level("INFO")
    found = batch.value_and_gradients(backend, 0.1)
    batch.value_and_gradients(backend, 0.1)
    expected = batch.value_and_gradients("torch", 0.1)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    (record,) = caplog.records  # once
    return record.getMessage()


def test_another_head_size_falls_back(caplog):
    message = fall_back(caplog, batch=AttentionBatch("full", 9, 48))
    assert message.endswith("heads have 48 channels, and the kernels serve 32, 64, 128")


@needs_triton
def test_a_dtype_that_the_interpreter_cannot_multiply_falls_back(caplog):
    message = fall_back(caplog, batch=AttentionBatch("packed", 9, 32, torch.bfloat16))
    assert "the dtype is bfloat16, and Triton's interpreter can compute float16" in message


@needs_triton
def test_a_processor_without_the_interpreter_falls_back(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    forget_kernels()
    message = fall_back(caplog, batch=AttentionBatch("full", 9, 32))
    assert "Triton compiles for NVIDIA GPUs, and the tensors are on cpu" in message
    forget_kernels()


def test_a_machine_without_triton_falls_back(caplog, monkeypatch):
    forget_kernels()
    monkeypatch.setitem(sys.modules, "triton", None)
    message = fall_back(caplog, batch=AttentionBatch("full", 9, 32))
    assert "Triton cannot be imported" in message
    monkeypatch.undo()
    forget_kernels()


@needs_triton
def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(serving.host(), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = serving.refusal(torch.device("cuda"), torch.float16, 64)
    assert reason == "the GPU has compute capability 7.5, and the kernels need 8.0"


def test_selected_query_rows_are_computed_by_torch(caplog):
    batch = AttentionBatch("full", 12, 32)
    batch.relative = batch.relative.at(torch.tensor([[3, 7, 7]]))
    batch.tensors[0] = batch.tensors[0].detach()[:, :3].requires_grad_()
    batch.weights = batch.weights[:, :, :3]
    message = fall_back(caplog, batch=batch)
    assert message.endswith("triton: the decoder's selected rows are computed by torch")


def test_disentangled_flash_needs_its_package_and_a_gpu(caplog, monkeypatch):
    batch = AttentionBatch("full", 9, 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = fall_back(caplog, "disentangled_flash", batch=batch)
    assert "the package disentangled-flash is not installed" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    message = fall_back(caplog, "disentangled_flash", batch=batch)
    assert "disentangled-flash runs on CUDA devices, and the tensors are on cpu" in message
