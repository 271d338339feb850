"""Two runs of training steps at the width of large: equal bits of every loss and every gradient."""

import hashlib

import pytest
import torch

from pipeline.counter_rng import DropoutKey
from tests.gpu.networks_on_device import SIZES, MicroBatch, gradients, micro_step, pair

# The first product of a backward thread may find no context yet, and says so.
# Dynamo looks at every argument's gradient, and hides the warning where warnings are not errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

LARGE = {**SIZES, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}


def steps(device, count, sizes, sequences, length, dtype, **model):
    """Losses as hexadecimal and hashes of all gradients, step by step, with an update each."""
    networks = pair(device, dtype, sizes=sizes, **model)
    parameters = [p for network in networks for p in network.parameters()]
    adamw = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    batch, seen = MicroBatch.make(device, sequences, length), []
    for step in range(count):
        keys = [DropoutKey.derive(1, each, step, 0, 0, device) for each in ("g", "d")]
        adamw.zero_grad()
        losses = [each.loss_sum.item().hex() for each in micro_step(networks, batch, keys)]
        digest = hashlib.sha256()
        for gradient in gradients(networks).values():
            digest.update(gradient.numpy().tobytes())
        adamw.step()
        seen.append((*losses, digest.hexdigest()))
    return seen


@pytest.mark.parametrize(("backend", "compiled"), [("torch", "none"), ("triton", "layer")])
@pytest.mark.usefixtures("deterministic")
def test_two_runs_of_twenty_steps_at_the_width_of_large(cuda, backend, compiled):
    arguments = (cuda, 20, LARGE, 9, 512, torch.bfloat16)
    choice = {"attention_backend": backend, "compile": compiled}
    first, again = steps(*arguments, **choice), steps(*arguments, **choice)
    assert first == again
    assert len({step[2] for step in first}) == 20


@pytest.mark.usefixtures("deterministic")
def test_two_runs_on_a_cpu():
    """Holds the test above together where there is no GPU."""
    arguments = (torch.device("cpu"), 3, SIZES, 3, 32, torch.float32)
    first, again = steps(*arguments), steps(*arguments)
    assert first == again
    assert len({step[2] for step in first}) == 3
