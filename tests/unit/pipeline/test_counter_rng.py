"""The counter-based generator against its published vectors, and NumPy against torch."""

import numpy as np
import pytest
import torch

from pipeline.counter_rng import (
    DropoutKey,
    dropout,
    philox4x32,
    philox_bits,
    position_words,
    sample_words,
    stream_key,
)

# Random123's known-answer file, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_published_vectors(counter, key, expected, library):
    make = {"numpy": lambda v: np.array([v], np.int64), "torch": lambda v: torch.tensor([v])}[
        library
    ]
    words = philox4x32(tuple(make(value) for value in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


@pytest.mark.parametrize("as_tensors", [False, True])
def test_few_passes_give_the_same_bits(as_tensors):
    values = torch.Generator().manual_seed(0)
    shapes = ((1, 1000), (30, 1), (30, 1), (30, 1))
    counter = tuple(torch.randint(2**32, shape, generator=values) for shape in shapes)
    for key in ((0xFFFFFFFF, 0x80000000), (3, 0x7FFFFFFF)):
        given = tuple(torch.tensor(key).unbind()) if as_tensors else key
        expected = philox4x32(counter, given)
        for left, right in zip(philox_bits(counter, given), expected, strict=True):
            assert left.dtype == torch.int32
            assert torch.equal(left.view(torch.uint32).long(), right)
    some = (counter[0], 2**32 - 1, counter[2], 7)
    ours, theirs = philox_bits(some, (1, 2)), philox4x32(some, (1, 2))
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.view(torch.uint32).long(), right)


@pytest.mark.parametrize("p", [1e-9, 1e-5, 0.1, 0.9, 0.999999])
def test_a_keep_mask_compares_sixteen_bits_an_element(p):
    """Lower halves of words before upper ones; p rounds to 1/65536, and may round to 0 or 1."""
    site = DropoutKey.derive(1, "generator", 2, 3, 4, torch.device("cpu")).site(5, 6)
    octets = torch.arange(1251)
    words = philox4x32((octets, 0, torch.full_like(octets, 5), 6), site.words_2.unbind())
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    kept = site.keep_mask((10_001,), p)
    assert torch.equal(kept, halves.flatten()[:10_001] >= round(p * 65536))


def test_numpy_and_torch_give_the_same_words():
    counter = np.arange(1000, dtype=np.int64) * 2654435761 % 2**32
    ours = philox4x32((counter, counter[::-1].copy(), counter, counter), (123456789, 4042322160))
    t = torch.from_numpy(counter)
    theirs = philox4x32((t, t.flip(0), t, t), (torch.tensor(123456789), torch.tensor(4042322160)))
    for left, right in zip(ours, theirs, strict=True):
        assert np.array_equal(left, right.numpy())


def test_streams_differ_by_every_part():
    keys = {
        stream_key(1, "mask", 128),
        stream_key(2, "mask", 128),
        stream_key(1, "draw", 128),
        stream_key(1, "mask", 512),
        stream_key(1, "mask", 12, 8),
    }
    assert len(keys) == 5


def test_position_words_do_not_depend_on_the_batch():
    samples = torch.tensor([sample_words(0, 5), sample_words(3, 2**33 + 7)])
    both = position_words(10, samples, (1, 2))
    assert torch.equal(both[1:], position_words(10, samples[1:], (1, 2)))
    assert torch.equal(both[:, :7], position_words(7, samples, (1, 2)))
    assert both.min() >= 0
    assert both.max() < 2**32


def test_dropout_rate_scale_and_independence_of_sites():
    key = DropoutKey.derive(7, "generator", 3, 0, 1, torch.device("cpu"))
    x = torch.ones(200_000)
    first = dropout(x, 0.1, key.site(0, 0))
    second = dropout(x, 0.1, key.site(0, 1))
    share = (first == 0).double().mean().item()
    # Five standard deviations of a binomial proportion.
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / x.numel()) ** 0.5
    assert first.max().item() == pytest.approx(1 / 0.9)
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert abs(both - 0.01) < 5 * (0.01 * 0.99 / x.numel()) ** 0.5
    assert torch.equal(first, dropout(x, 0.1, key.site(0, 0)))
    assert dropout(x, 0.1, None) is x
