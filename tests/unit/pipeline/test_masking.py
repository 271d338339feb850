"""The masking laws for single tokens."""

import random

import pytest
import torch

from data_prep.tokenizer import Tokenizer
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import position_words, sample_words, stream_key
from pipeline.masking import (
    MaskingVocabulary,
    MaskKeys,
    num_masked_slots,
)
from tests.masking_cases import (
    KEY,
    LAWS,
    MASK_ID,
    SPECIAL,
    VOCABULARY,
    full,
    masked,
    sequences,
    words,
)


@pytest.mark.parametrize(
    ("length", "mask_prob", "expected"),
    [(512, 0.15, 77), (256, 0.15, 38), (128, 0.15, 19), (8, 0.15, 1), (8, 0.01, 1), (10, 0.5, 5)],
)
def test_number_of_slots(length, mask_prob, expected):
    for law in LAWS:
        objective = ObjectiveSection(mask_prob=mask_prob, masking_law=law)
        assert num_masked_slots(length, objective) == expected


@pytest.mark.parametrize("law", LAWS)
def test_every_full_sequence_has_exactly_77_masks(law):
    assert (full(200, law=law).sum(1) == 77).all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mask_prob", [0.1, 0.15, 0.3, 0.5])
def test_the_batch_is_consistent(law, mask_prob):
    lengths = [40, 39, 22, 9, 3, 40]
    ids, lengths_B = sequences(lengths, 40, specials_inside=1)
    batch = masked(ids, lengths_B, words(range(6)), law, mask_prob)
    assert batch.positions_BK.shape == (
        6,
        num_masked_slots(40, ObjectiveSection(mask_prob=mask_prob)),
    )
    for row, length in enumerate(lengths):
        maskable = [p for p in range(length) if ids[row, p] not in SPECIAL]
        quota = max(1, round(mask_prob * length))
        if law == "windowed":
            quota = min(quota, -(-len(maskable) // int(1 / mask_prob)))
        chosen = batch.positions_BK[row][batch.valid_BK[row]].tolist()
        assert len(chosen) == min(quota, len(maskable))
        assert chosen == sorted(set(chosen) & set(maskable))
        expected = ids[row].clone()
        expected[chosen] = MASK_ID
        assert torch.equal(batch.masked_ids_BL[row], expected)
        assert batch.targets_BK[row][batch.valid_BK[row]].tolist() == ids[row, chosen].tolist()
    # Unused slots come last and point at a place that exists.
    assert (batch.valid_BK.long().diff(dim=1) <= 0).all()
    assert (batch.positions_BK[~batch.valid_BK] == 0).all()


def test_a_sequence_without_maskable_tokens_has_no_slot():
    ids = torch.tensor([[1, 3, 60, 2, 0, 0, 0, 0]])
    for law in LAWS:
        batch = masked(ids, torch.tensor([4]), words([0]), law)
        assert not batch.valid_BK.any()
        assert torch.equal(batch.masked_ids_BL, ids)


def test_uniform_reaches_every_position_equally_often():
    count, length = 20_000, 64
    chosen = full(count, length)
    maskable, slots = length - 2, num_masked_slots(length, ObjectiveSection())
    share = slots / maskable
    times = chosen[:, 1:-1].sum(0).double()
    assert not chosen[:, [0, -1]].any()
    deviation = (times - count * share) / (count * share * (1 - share)) ** 0.5
    assert deviation.abs().max() < 5
    # 62 correlated counts whose sum is fixed: chi-square of 61 degrees, mean 61, deviation 11.
    assert 61 - 5 * 11 < (deviation.square().sum() * 61 / 62).item() < 61 + 5 * 11


def test_uniform_chooses_neighbours_as_often_as_strangers():
    count, length = 20_000, 22
    chosen = full(count, length)[:, 1:-1].double()  # 3 of 20
    together = chosen.T @ chosen
    expected = count * 3 / 20 * 2 / 19
    off_diagonal = together[~torch.eye(20, dtype=torch.bool)]
    assert ((off_diagonal - expected).abs() < 5 * expected**0.5).all()


def test_windowed_never_masks_the_tail():
    chosen = full(4_000, law="windowed")
    times = chosen.sum(0)
    # 77 windows of 6 behind [CLS]: facts 3.1, positions 463 to 510 are never masked.
    assert (times[463:] == 0).all()
    assert times[0] == 0
    expected, sigma = 4_000 / 6, (4_000 * 1 / 6 * 5 / 6) ** 0.5
    assert ((times[1:463] - expected).abs() < 5 * sigma).all()


@pytest.mark.parametrize(("length", "first_bare"), [(512, 463), (256, 229), (128, 115)])
def test_windowed_tail_begins_where_the_original_s_does(length, first_bare):
    times = full(500, length, "windowed").sum(0)
    assert times[first_bare - 1] > 0
    assert times[first_bare:].sum() == 0


def released_law(tokens, mask_prob, rng):
    """NGramMaskGenerator.mask_tokens with n-grams of 1 (DeBERTa, mlm_task.py), statement for
    statement, with its `rng.randint` and without its replacement of the token."""
    max_predictions = -(-int(mask_prob * 512) // 10) * 10
    num_to_predict = min(max_predictions, max(1, round(mask_prob * len(tokens))))
    window = int(1 / mask_prob)
    unigrams = [index for index, token in enumerate(tokens) if token not in SPECIAL]
    is_chosen = [False] * len(unigrams)
    offset = 0
    while offset < len(unigrams):
        context = min(window, len(unigrams) - offset)
        is_chosen[offset + rng.randint(0, context - 1)] = True
        offset += context
    chosen = []
    for index, take in zip(unigrams, is_chosen, strict=True):
        if take:
            chosen.append(index)
            if len(chosen) >= num_to_predict:
                break
    return chosen


@pytest.mark.parametrize(
    ("length", "padded_to", "unknown"), [(30, 30, 0), (20, 30, 4), (9, 30, 0), (30, 30, 9)]
)
def test_windowed_is_the_released_law(length, padded_to, unknown):
    """Equal probability for every set of positions: with small counts all sets can be listed."""
    count = 12_000
    ids, _ = sequences([length], padded_to, unknown)
    batch = masked(
        ids.expand(count, -1), torch.full((count,), length), words(range(count)), "windowed"
    )
    ours, theirs = {}, {}
    for positions, valid in zip(batch.positions_BK.tolist(), batch.valid_BK.tolist(), strict=True):
        chosen = tuple(p for p, v in zip(positions, valid, strict=True) if v)
        ours[chosen] = ours.get(chosen, 0) + 1
    rng = random.Random(0)
    for _ in range(count):
        chosen = tuple(released_law(ids[0, :length].tolist(), 0.15, rng))
        theirs[chosen] = theirs.get(chosen, 0) + 1
    assert {len(chosen) for chosen in ours} == {len(chosen) for chosen in theirs}
    for position in range(padded_to):
        a, b = (
            sum(times for chosen, times in sets.items() if position in chosen)
            for sets in (ours, theirs)
        )
        assert abs(a - b) <= 5 * (a + b + 1) ** 0.5, position
    if len(ours) < 300:  # often enough each to be compared one by one
        for chosen in ours.keys() | theirs.keys():
            a, b = ours.get(chosen, 0), theirs.get(chosen, 0)
            assert abs(a - b) <= 5 * (a + b + 1) ** 0.5, chosen


def test_uniform_takes_the_smallest_words():
    ids, lengths = sequences([40, 23], 40, specials_inside=3)
    samples = words([0, 2**36])
    words_BL = position_words(40, samples, KEY).tolist()
    batch = masked(ids, lengths, samples)
    for row, quota in enumerate((6, 3)):
        maskable = [p for p in range(lengths[row]) if ids[row, p] not in SPECIAL]
        chosen = sorted(maskable, key=lambda p: (words_BL[row][p], p))[:quota]
        assert batch.positions_BK[row][batch.valid_BK[row]].tolist() == sorted(chosen)


@pytest.mark.parametrize("law", LAWS)
def test_a_sequence_s_masks_do_not_depend_on_its_batch(law):
    ids, lengths = sequences([24, 24, 17, 24], 24)
    samples, order = words([5, 2**35, 9, 1]), torch.tensor([2, 0, 3, 1])
    together = masked(ids, lengths, samples, law)
    shuffled = masked(ids[order], lengths[order], samples[order], law)
    for row in range(4):
        alone = masked(*(each[row : row + 1] for each in (ids, lengths, samples)), law)
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[row : row + 1], single)
    for whole, moved in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], moved)


@pytest.mark.parametrize("law", LAWS)
def test_masks_differ_by_sample_epoch_and_stream(law):
    ids, lengths = sequences([64] * 4, 64)
    ids[:] = ids[0]
    samples = torch.tensor([sample_words(*i) for i in ((0, 0), (0, 1), (1, 0), (0, 2**32))])
    here = masked(ids, lengths, samples, law).masked_ids_BL
    assert len({tuple(row) for row in here.tolist()}) == 4
    other = masked(ids, lengths, samples, law, keys=MaskKeys.derive(8, "test", 0)).masked_ids_BL
    assert not any(torch.equal(a, b) for a, b in zip(here, other, strict=True))


def test_the_streams_of_masks_are_all_different():
    keys = {
        key
        for seed in (1, 2)
        for split in ("train", "heldout")
        for length in (128, 512)
        for key in MaskKeys.derive(seed, split, length)
    }
    assert len(keys) == 4 * 8
    assert MaskKeys.derive(1, "train", 512).place == stream_key(1, "mask/train", 512)


def test_the_vocabulary_of_a_tokenizer(tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    vocabulary = MaskingVocabulary.from_tokenizer(tokenizer)
    assert vocabulary.mask_id == tokenizer.num_pieces
    assert vocabulary.text_ids == range(4, tokenizer.num_pieces)
    assert vocabulary.is_word_start_V is not None
    assert vocabulary.is_word_start_V.tolist() == tokenizer.is_word_start.tolist()
    assert vocabulary.to(torch.device("cpu")) is vocabulary
    moved = vocabulary.to(torch.device("meta"))
    assert moved.is_word_start_V is not None
    assert (moved.is_word_start_V.device.type, moved.mask_id) == ("meta", vocabulary.mask_id)
    assert VOCABULARY.to(torch.device("meta")) is VOCABULARY
