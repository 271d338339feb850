"""Both networks on the GPU against fp64 on the CPU: losses and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.modeling.vocabulary_head import _product, vocabulary_head
from pipeline.rtd import CorruptedBatch, DrawKey
from tests.gpu.networks_on_device import (
    BACKENDS,
    MicroBatch,
    discriminator_loss,
    dropout_keys,
    generator_loss,
    gradients,
    pair,
)

# The first product of a backward thread may find no context yet, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")

CPU = torch.device("cpu")
LENGTHS = {"cpu": 64, "cuda": 512}


def losses_and_gradients(where, dtype, length, drops, **model):
    """One pass of both networks on fixed corrupted ids."""
    networks, batch = pair(where, dtype, **model), MicroBatch.make(where, length=length)
    slots = batch.choose()
    keys = dropout_keys(where) if drops else [None, None]
    every_third = torch.arange(length, device=where) % 3 == 0
    corrupted = CorruptedBatch(batch.ids, every_third.expand_as(batch.ids))
    mlm = generator_loss(networks[0], batch, slots, keys[0]).loss_sum
    rtd = discriminator_loss(networks[1], networks[0], batch, corrupted, keys[1]).loss_sum
    (mlm + rtd).backward()
    return [mlm.item(), rtd.item()], gradients(networks)


def relative_error(found, expected):
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_training_step(device, backend, drops):
    arguments = (LENGTHS[device.type], drops)
    found = losses_and_gradients(device, torch.float32, *arguments, attention_backend=backend)
    expected = losses_and_gradients(CPU, torch.float64, *arguments, attention_backend="eager")
    assert found[0] == pytest.approx(expected[0], rel=5e-6)
    for name, gradient in expected[1].items():
        if gradient.any():
            assert relative_error(found[1][name], gradient) < 2e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_training_step_stays_near_the_exact_one(device, backend):
    arguments = (LENGTHS[device.type], False)
    found = losses_and_gradients(device, torch.bfloat16, *arguments, attention_backend=backend)
    expected = losses_and_gradients(CPU, torch.float64, *arguments, attention_backend="eager")
    assert found[0] == pytest.approx(expected[0], rel=2e-3)
    everything, exact = (
        torch.cat([g.flatten() for g in side[1].values()]) for side in (found, expected)
    )
    # On a CPU 1e-2 at 64 tokens and 2e-2 to 4e-2 at 512, with either backend.
    assert relative_error(everything, exact) < 5e-2


@pytest.mark.parametrize("recomputed", ["attention", "full"])
@pytest.mark.usefixtures("deterministic")
def test_recomputation_repeats_every_bit(device, recomputed):
    arguments = (device, torch.float32, LENGTHS[device.type], True)
    kept = losses_and_gradients(*arguments, activation_checkpointing="none")
    again = losses_and_gradients(*arguments, activation_checkpointing=recomputed)
    assert kept[0] == again[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in kept[1].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_half_precision_are_accumulated_and_kept_in_fp32(device, dtype, transposed):
    values = torch.Generator().manual_seed(0)
    left, right = (torch.randn(96, 96, generator=values).to(dtype) for _ in range(2))
    left = left.mT if transposed else left
    found = _product(left.to(device), right.to(device).mT)
    assert found.dtype == torch.float32
    # A result rounded to half precision would be off by 2e-4 (fp16) or 2e-3 (bf16).
    assert relative_error(found.cpu().double(), left.double() @ right.double().mT) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vocabulary_head_of_several_chunks(device, dtype):
    slots, ids, width = 96, 40_001, 64
    values = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(shape, generator=values).to(dtype).double().requires_grad_()
        for shape in ((1, slots, width), (ids, width), (ids,))
    ]
    targets = torch.randint(ids, (1, slots), generator=values)
    valid = torch.arange(slots)[None] < slots - 5
    logits = exact[0] @ exact[1].mT + exact[2]
    losses = F.cross_entropy(logits[0], targets[0], reduction="none")
    expected = (losses * valid[0]).sum()
    weights = [w.detach().to(device, dtype).requires_grad_() for w in exact]
    where = torch.arange(slots, device=device)[None]
    draw = DrawKey((1, 2), torch.tensor([[3, 4]], device=device))
    out = vocabulary_head(*weights, valid.to(device), targets.to(device), where, draw)
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.correct_sum.item() == ((logits.argmax(-1) == targets) & valid).sum().item()
    rounding = max(2 * torch.finfo(dtype).eps, 1e-5)
    for found, reference in zip(
        torch.autograd.grad(out.loss_sum, weights),
        torch.autograd.grad(expected, exact),
        strict=True,
    ):
        assert found.dtype == dtype
        assert relative_error(found.cpu().double(), reference) < rounding
