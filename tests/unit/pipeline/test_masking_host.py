"""The host and a device choose the same tokens, and neither asks the device for a value."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import masking_host
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import position_words, sample_words
from pipeline.masking import (
    MaskingVocabulary,
    choose_masks,
    choose_on_device,
    choose_on_host,
    num_masked_slots,
)
from tests.masking_cases import KEY, KEYS, LAWS, MASK_ID, SPECIAL, VOCABULARY, sequences, words


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("uniform", [[1, 7, 9, 11, 18, 32], [2, 4, 9, 11, 16, 0]]),
        ("windowed", [[3, 7, 17, 21, 28, 32], [1, 9, 13, 24, 25, 0]]),
    ],
)
@pytest.mark.parametrize("choose", [choose_masks, choose_on_host, choose_on_device])
def test_golden_positions(law, expected, choose):
    """A change here changes every run: it needs a new major version."""
    ids, lengths = sequences([40, 31], 40)
    samples = torch.tensor([sample_words(0, 0), sample_words(3, 2**33 + 5)])
    objective = ObjectiveSection(masking_law=law)
    found = choose(ids, lengths, samples, objective, KEYS, VOCABULARY)
    assert found.positions_BK.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_host_chooses_what_a_device_chooses(data):
    width = data.draw(st.integers(3, 70))
    lengths = data.draw(st.lists(st.integers(3, width), min_size=1, max_size=6))
    if data.draw(st.booleans()):
        lengths = [width] * len(lengths)
    ids, lengths_B = sequences(lengths, width)
    share = data.draw(st.sampled_from([0.0, 0.1, 0.9]))
    noise = torch.rand(ids.shape, generator=torch.Generator().manual_seed(width))
    ids = torch.where(noise < share, data.draw(st.sampled_from(SPECIAL)), ids)
    objective = ObjectiveSection(
        masking_law=data.draw(st.sampled_from(LAWS)),
        mask_prob=data.draw(st.sampled_from([0.01, 0.15, 0.3, 0.5])),
        mask_token_prob=data.draw(st.sampled_from([1.0, 0.6])),
        random_token_prob=0.0,
    )
    samples = words(data.draw(st.lists(st.integers(0, 2**40 - 1), min_size=6, max_size=6)))
    arguments = (ids, lengths_B, samples[: len(ids)], objective, KEYS, VOCABULARY)
    before = ids.clone()
    for ours, theirs in zip(choose_on_host(*arguments), choose_on_device(*arguments), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(ids, before)


@pytest.mark.parametrize(("batch", "num_positions"), [(1, 1), (3, 7), (2, 512), (70, 512)])
def test_words_of_the_host_are_those_of_a_device(batch, num_positions):
    """The larger batch is evaluated in two parts."""
    samples = words([number * 2**33 + number for number in range(batch)], epoch=2**23)
    for key in (KEY, (0, 0), (2**32 - 1, 2**32 - 1)):
        found = masking_host.position_words(num_positions, samples.numpy(), key)
        assert found.dtype == np.uint32
        assert found.tolist() == position_words(num_positions, samples, key).tolist()


def test_threads_evaluate_words_in_memory_of_their_own():
    def evaluate(number):
        samples = words(range(number, number + 60))
        found = masking_host.position_words(512, samples.numpy(), (number, 1))
        return found.tolist() == position_words(512, samples, (number, 1)).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(evaluate, range(24)))


@pytest.mark.parametrize("highest", [0, 1, 3, 2**32 - 1])
@pytest.mark.parametrize("lowest", [0, 2**32 - 4])
def test_equal_words_are_taken_from_the_front(lowest, highest):
    """Ties are rare in 32 bits, so they are made here; the largest word is a word like others."""
    rng = np.random.default_rng(highest % 97)
    for _ in range(20):
        is_maskable = rng.random((5, 24)) < rng.choice([0.1, 0.6, 1.0])
        drawn = np.minimum(lowest + rng.integers(0, highest + 1, (5, 24)), 2**32 - 1)
        quota = rng.integers(1, 25, 5)
        expected = []
        for row in range(5):
            places = sorted(np.flatnonzero(is_maskable[row]), key=lambda p, r=row: (drawn[r, p], p))
            expected += sorted(24 * row + place for place in places[: quota[row]])
        found = masking_host.choose_uniform(is_maskable, quota, drawn.astype(np.uint32))
        assert found.tolist() == expected


def test_what_is_not_maskable_is_not_chosen_where_all_were_asked_for():
    is_maskable = np.array([[True, False, True]])
    drawn = np.array([[5, 1, 2**32 - 1]], np.uint32)
    assert masking_host.choose_uniform(is_maskable, np.array([3]), drawn).tolist() == [0, 2]


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_a_device_is_never_asked_for_a_value(law, whole_words):
    """Tensors without values: reading one, or a shape that depends on one, would fail."""
    objective = ObjectiveSection(
        masking_law=law, whole_word_masking=whole_words, mask_token_prob=0.8, random_token_prob=0.1
    )
    meta = torch.device("meta")
    ids = torch.empty((3, 40), dtype=torch.int64, device=meta)
    samples = torch.empty((3, 2), dtype=torch.int64, device=meta)
    vocabulary = MaskingVocabulary(MASK_ID, torch.zeros(70, dtype=torch.bool)).to(meta)
    found = choose_masks(ids, ids[:, 0], samples, objective, KEYS, vocabulary)
    slots = num_masked_slots(40, objective)
    shapes = [(3, 40), (3, slots), (3, slots), (3, slots)]
    assert [tuple(each.shape) for each in found] == shapes
    assert {each.device for each in found} == {meta}
