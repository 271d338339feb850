"""Random functions give the same integers on the GPU as in NumPy on the CPU."""

import numpy as np
import pytest
import torch

from pipeline.counter_rng import DropoutKey, philox4x32, position_words
from pipeline.modeling.vocabulary_head import vocabulary_head
from pipeline.rtd import DrawKey, gumbel_noise
from tests.gpu.networks_on_device import MicroBatch

CPU = torch.device("cpu")


def test_philox_words(device):
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (4, 10_000))
    key = tuple(rng.integers(0, 2**32, 2).tolist())
    expected = philox4x32(tuple(counter), key)
    found = philox4x32(tuple(torch.from_numpy(counter).to(device)), key)
    for left, right in zip(found, expected, strict=True):
        assert np.array_equal(left.cpu().numpy(), right)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5, 7), (2, 2, 128, 128)])
def test_dropout_masks(device, shape):
    masks = [
        DropoutKey.derive(1, "generator", 2, 3, 4, where).site(5, 6).keep_mask(shape, 0.1)
        for where in (device, CPU)
    ]
    assert masks[0].device.type == device.type
    assert torch.equal(masks[0].cpu(), masks[1])


def test_position_words(device):
    words = torch.tensor([[0, 0], [2**32 - 1, 2**31]])
    expected = position_words(513, words, (1, 2))
    assert torch.equal(position_words(513, words.to(device), (1, 2)).cpu(), expected)


@pytest.mark.parametrize("law", ["uniform", "windowed"])
def test_masked_slots(device, law):
    found, expected = (MicroBatch.make(where, 7).choose(law) for where in (device, CPU))
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left.cpu(), right)
    assert expected.valid_BK.any(1).all()
    assert not expected.valid_BK.all()


def test_gumbel_noise_differs_by_rounding_alone(device):
    words, positions = torch.tensor([[7, 0], [8, 1]]), torch.tensor([[0, 511, 3], [1, 2, 4]])
    expected = gumbel_noise(words, positions, 64, 50_001, (3, 4))
    found = gumbel_noise(words.to(device), positions.to(device), 64, 50_001, (3, 4)).cpu()
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-6, atol=1e-6)


def test_equal_logits_give_equal_draws(device, record_property):
    # A hidden state that selects one column of the table: its logits are exact on every device, so
    # that only the rounding of two logarithms can flip a draw, where two candidates tie.
    slots, ids = 200, 40_000
    values = torch.Generator().manual_seed(0)
    table = torch.randn(ids, 8, generator=values)
    hidden = torch.eye(8).repeat(slots // 8, 1)[None]
    positions = torch.arange(slots)[None]
    drawn = []
    for where in (device, CPU):
        out = vocabulary_head(
            hidden.to(where),
            table.to(where),
            torch.zeros(ids, device=where),
            torch.ones(1, slots, dtype=torch.bool, device=where),
            positions.to(where),
            positions.to(where),
            DrawKey((1, 2), torch.tensor([[3, 4]], device=where)),
        )
        drawn.append(out.drawn_BK.cpu())
    flips = int((drawn[0] != drawn[1]).sum())
    record_property("flipped_draws", flips)
    assert len(drawn[1].unique()) > slots // 2
    assert flips <= 1
