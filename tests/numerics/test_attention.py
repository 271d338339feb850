"""Every backend of the attention against `eager`, `triton` interpreted on a CPU.

Lengths around the edges of a tile, every head size, full, padded, packed, with and without dropout:
values and all five gradients. The interpreter pays for each operation on a tile, so that long
sequences have one head and large tiles.
"""

import pytest
import torch

from tests.attention_batches import (
    HEAD_SIZES,
    LAYOUTS,
    AttentionBatch,
    assert_no_fallback,
    errors,
)
from tests.interpreting import HAS_TRITON

pytestmark = pytest.mark.usefixtures("interpreter")

LENGTHS = (1, 17, 64, 127, 128, 129, 511, 512, 513, 700)
FP32_ROUNDING = 1e-5
BACKENDS = ("torch", "triton") if HAS_TRITON else ("torch",)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_backends_equal_eager(length, head_size, layout, dropout_p, tiles, caplog):
    tiles(128 if length <= 128 else 512 if length in (511, 512) else 256)
    batch = AttentionBatch(layout, length, head_size, heads=2 if length <= 64 else 1)
    expected = batch.value_and_gradients("eager", dropout_p)
    for backend in BACKENDS:
        found = batch.value_and_gradients(backend, dropout_p)
        assert max(errors(found, expected)) < FP32_ROUNDING, backend
    assert_no_fallback(caplog)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_of_one_length_have_the_bits_of_a_batch(backend, tiles):
    tiles(32)
    padded = AttentionBatch("padded", 24, 32, torch.float64)
    padded.mask[:] = True
    packed = AttentionBatch("packed", 24, 32, torch.float64)
    packed.starts = torch.tensor([0, 24, 48], dtype=torch.int32)
    packed.longest, packed.relative = 24, padded.relative
    in_a_row = [t.flatten(0, 1)[None] for t in padded.tensors[:3]]
    together = padded.attend(backend, 0.3, *padded.tensors)
    end_to_end = packed.attend(backend, 0.3, *in_a_row, *padded.tensors[3:])
    torch.testing.assert_close(end_to_end, together.flatten(1, 2)[:, None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_packed_sequences_do_not_see_each_other(backend, tiles):
    tiles(32)
    batch = AttentionBatch("packed", 30, 32)
    before = batch.attend(backend, 0.1, *batch.tensors)
    changed = [t.detach().clone() for t in batch.tensors]
    for rows in changed[:3]:
        rows[:, :3] += 1.0
    after = batch.attend(backend, 0.1, *changed)
    assert not torch.equal(before[:, :, :3], after[:, :, :3])
    assert torch.equal(before[:, :, 3:], after[:, :, 3:])
