"""Deterministic kernels, host synchronisations and memory of a micro step."""

import json
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch

from pipeline.modeling.vocabulary_head import CHUNK_IDS, vocabulary_head
from pipeline.rtd import DrawKey
from tests.gpu.networks_on_device import (
    BACKENDS,
    MicroBatch,
    dropout_keys,
    gradients,
    micro_step,
    pair,
)
from tests.worlds import ROOT, environment

# The first product of a backward thread may find no context yet, and says so.
# Dynamo looks at every argument's gradient, and hides the warning where warnings are not errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

# 4,608 tokens: beyond 3,072 CUDA sums the gradient of an embedding by another kernel.
SEQUENCES = 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("deterministic")
def test_a_micro_step_has_deterministic_kernels_and_repeats_every_bit(device, backend):
    sequences, length = (SEQUENCES, 512) if device.type == "cuda" else (3, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runs = []
    for _ in range(2):
        networks = pair(device, dtype, attention_backend=backend)
        batch = MicroBatch.make(device, sequences, length)
        mlm, rtd = micro_step(networks, batch, dropout_keys(device))
        runs.append(([*mlm, *rtd], gradients(networks)))
    for left, right in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(left, right)
    for name, gradient in runs[0][1].items():
        assert torch.equal(runs[1][1][name], gradient), name


def count_synchronisations(function):
    """How often the host waited for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in caught)


def test_the_counter_of_synchronisations_counts(cuda):
    value = torch.ones(3, device=cuda)
    assert count_synchronisations(lambda: [value.sum().item() for _ in range(2)]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", ["none", "layer"])
def test_the_host_never_waits_in_a_micro_step(cuda, backend, compiled, record_property):
    networks = pair(cuda, torch.bfloat16, attention_backend=backend, compile=compiled)
    batch, keys = MicroBatch.make(cuda, SEQUENCES), dropout_keys(cuda)
    micro_step(networks, batch, keys)  # the table of relative positions is copied once
    fast = count_synchronisations(lambda: micro_step(networks, batch, keys))
    torch.use_deterministic_algorithms(True)
    try:
        micro_step(networks, batch, keys)
        deterministic = count_synchronisations(lambda: micro_step(networks, batch, keys))
    finally:
        torch.use_deterministic_algorithms(False)
    record_property("synchronisations", fast)
    # torch copies strides from the host for a deterministic scatter: the corrupted ids.
    record_property("synchronisations_of_deterministic_kernels", deterministic)
    assert fast == 0


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="not installed: deepspeed")
def test_the_host_waits_once_at_each_boundary_of_a_whole_step(device, record_property):
    """Decoupled twice a step, joint once; on a CPU, where nothing waits, the program is tried."""
    command = [sys.executable, "-m", "tests.gpu.whole_steps", "--device", device.type]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    waits = json.loads(done.stdout.splitlines()[-1])["waits"]
    record_property("waits", json.dumps(waits))
    assert len(waits) >= 4
    for cell, phases in waits.items():
        engines = ("joint",) if cell.startswith("joint") else ("generator", "discriminator")
        assert {f"{name} {part}" for name in engines for part in ("forward", "backward")} <= {
            *phases
        }
        expected = 1 if device.type == "cuda" else 0
        for phase, places in phases.items():
            assert len(places) == (expected if phase.endswith("update") else 0), (
                cell,
                phase,
                places,
            )


def peak_bytes(function):
    """Most memory that a call needs on top of what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def head_bytes(cuda, chunks):
    """Peak of the vocabulary head beside the gradient of its table."""
    slots, ids, width = 1024, chunks * CHUNK_IDS, 64
    hidden = torch.randn(1, slots, width, device=cuda, requires_grad=True)
    table = torch.randn(ids, width, device=cuda, requires_grad=True)
    bias = torch.zeros(ids, device=cuda, requires_grad=True)
    where = torch.arange(slots, device=cuda)[None]
    draw = DrawKey((1, 2), torch.tensor([[3, 4]], device=cuda))

    def train():
        out = vocabulary_head(hidden, table, bias, where >= 0, where, where, draw)
        torch.autograd.grad(out.loss_sum, [hidden, table, bias])

    return peak_bytes(train) - table.numel() * table.element_size()


def test_memory_of_the_vocabulary_head_does_not_grow_with_the_vocabulary(cuda):
    head_bytes(cuda, 1)  # cuBLAS takes its workspace
    small, large = head_bytes(cuda, 2), head_bytes(cuda, 6)
    assert large < 1.1 * small


def test_recomputation_saves_memory(cuda):
    def peak(recomputed):
        networks = pair(cuda, torch.bfloat16, layers=8, activation_checkpointing=recomputed)
        batch = MicroBatch.make(cuda, SEQUENCES)
        return peak_bytes(lambda: micro_step(networks, batch))

    peak("none")
    everything, attention, layers = peak("none"), peak("attention"), peak("full")
    assert layers < attention < everything
    assert layers < 0.6 * everything
