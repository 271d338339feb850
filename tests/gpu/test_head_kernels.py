"""The fused vocabulary head on the GPU against torch's operations there and logits held whole."""

import pytest
import torch

from pipeline.modeling.kernels import serving
from pipeline.modeling.vocabulary_head import CHUNK_IDS
from pipeline.rtd import gumbel_noise
from tests.reference.fused_head import KEY, HeadBatch, kernel_noise

# The first product of a backward thread may find no context yet, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_serve(cuda, dtype):
    assert serving.head_refusal(cuda, dtype) is None


def test_noise_has_the_bits_of_torchs_operations(cuda):
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(512, (300,), generator=random).to(cuda)
    words = torch.randint(2**32, (300, 2), generator=random).to(cuda)
    found = kernel_noise(positions, words, KEY, 40_001, tile=(1, 512))
    expected = gumbel_noise(words, positions[:, None], 0, 40_001, KEY)[:, 0]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_and_hits_are_those_of_torchs_operations(cuda, dtype, temperature):
    batch = HeadBatch.make(4096, 40_001, dtype, cuda, sequences=8, temperature=temperature)
    fused, torchs = (batch.head(form) for form in ("fused", "torch"))
    assert torch.equal(fused.drawn_BK, torchs.drawn_BK)
    assert torch.equal(fused.correct_sum, torchs.correct_sum)
    torch.testing.assert_close(fused.loss_sum, torchs.loss_sum, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 64, 1_232])
@pytest.mark.parametrize("ids", [997, 4_099, 2 * CHUNK_IDS + 13_412])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_logits_held_whole(cuda, dtype, ids, rows):
    batch = HeadBatch.make(rows, ids, dtype, cuda)
    out, gradients = batch.found("fused")
    loss, _, correct, exact = batch.expected()
    assert out.loss_sum.item() == pytest.approx(loss.item(), rel=2e-6)
    # fp32 products on a GPU may sum in another order: a tie may go to another id.
    assert abs(out.correct_sum.item() - correct.item()) <= 1
    rounding = max(2 * torch.finfo(dtype).eps, 1e-5)
    for found, expected in zip(gradients, exact, strict=True):
        limit = rounding * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)


def test_the_same_inputs_give_the_same_bits(cuda):
    batch = HeadBatch.make(1_232, 40_001, torch.bfloat16, cuda)
    (one, ones), (two, twos) = (batch.found("fused") for _ in range(2))
    pairs = zip((*one, *ones), (*two, *twos), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_the_host_never_waits(cuda):
    batch = HeadBatch.make(64, 4_099, torch.bfloat16, cuda)
    batch.found("fused", 1_024)  # compiles, and copies the stream's key
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.found("fused", 1_024)
    finally:
        torch.cuda.set_sync_debug_mode("default")
