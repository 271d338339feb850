"""The masking laws for single tokens, and what stands in the masked slots."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_prep.tokenizer import Tokenizer
from pipeline import masking_host
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import position_words, sample_words, stream_key
from pipeline.masking import (
    MaskingVocabulary,
    MaskKeys,
    choose_masks,
    choose_on_device,
    choose_on_host,
    num_masked_slots,
)

SPECIAL = (0, 1, 2, 3, 60)  # pad, cls, sep, unk, mask
MASK_ID = 60
KEYS = MaskKeys.derive(7, "test", 0)._replace(place=stream_key(7, "mask/test"))
KEY = KEYS.place
VOCABULARY = MaskingVocabulary(MASK_ID)
LAWS = ["uniform", "windowed"]


def words(samples, epoch=0):
    return torch.tensor([sample_words(epoch, sample) for sample in samples])


def sequences(lengths, width, specials_inside=0):
    """[CLS], ordinary tokens with some [UNK] among them, [SEP], padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, MASK_ID, (len(lengths), width), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        inside = torch.randperm(length - 2, generator=generator)[:specials_inside] + 1
        row[inside] = 3
        row[0], row[length - 1] = 1, 2
        row[length:] = 0
    return ids, torch.tensor(lengths)


def masked(ids, lengths, samples, law="uniform", mask_prob=0.15, keys=KEYS, **objective):
    section = ObjectiveSection(masking_law=law, mask_prob=mask_prob, **objective)
    return choose_masks(ids, lengths, samples, section, keys, VOCABULARY)


def full(count, length=512, law="uniform", mask_prob=0.15):
    """The positions chosen in `count` full sequences, bool [count, length]."""
    ids, lengths = sequences([length] * count, length)
    batch = masked(ids, lengths, words(range(count)), law, mask_prob)
    return batch.masked_ids_BL == MASK_ID


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


def bert(mask=0.8, chance=0.1, count=4_000, **changes):
    """Sequences masked with replacements, and which of their positions were chosen."""
    ids, lengths = sequences([64] * count, 64, specials_inside=3)
    samples = words(range(count))
    batch = masked(ids, lengths, samples, mask_token_prob=mask, random_token_prob=chance, **changes)
    plain = masked(ids, lengths, samples)
    return ids, batch, plain.masked_ids_BL == MASK_ID


@pytest.mark.parametrize(("mask", "chance"), [(0.8, 0.1), (0.85, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_chosen_tokens_become_mask_a_random_token_or_stay(mask, chance):
    ids, batch, chosen = bert(mask, chance)
    assert torch.equal(batch.masked_ids_BL[~chosen], ids[~chosen])
    seen, original = batch.masked_ids_BL[chosen], ids[chosen]
    count = len(seen)
    # A random token is the original one once in 56 times.
    shares = {"mask": mask, "random": chance * 55 / 56, "same": 1 - mask - chance * 55 / 56}
    times = {"mask": int((seen == MASK_ID).sum()), "same": int((seen == original).sum())}
    times["random"] = count - sum(times.values())
    for name, share in shares.items():
        assert abs(times[name] - count * share) <= 5 * (count * share * (1 - share)) ** 0.5, name


def test_replacements_change_neither_slots_nor_targets():
    ids, batch, _ = bert()
    plain = masked(ids, torch.full((len(ids),), 64), words(range(len(ids))))
    assert torch.equal(batch.positions_BK, plain.positions_BK)
    assert torch.equal(batch.valid_BK, plain.valid_BK)
    assert torch.equal(batch.targets_BK, plain.targets_BK)
    assert not torch.equal(batch.masked_ids_BL, plain.masked_ids_BL)


def test_random_tokens_are_the_pieces_of_text_each_alike():
    _, batch, chosen = bert(mask=0.0, chance=1.0)
    times = torch.bincount(batch.masked_ids_BL[chosen], minlength=MASK_ID + 10)
    assert times[:4].sum() == times[MASK_ID:].sum() == 0
    assert stats.chisquare(times[4:MASK_ID].numpy()).pvalue > 1e-4


def test_a_replacement_does_not_tell_the_token_that_it_replaces_or_its_place():
    ids, batch, chosen = bert(mask=0.0, chance=1.0, count=20_000)
    tables = [(ids[chosen] % 8, batch.masked_ids_BL[chosen] % 8)]
    place = torch.arange(64).expand_as(ids)[chosen]
    tables.append((place % 8, batch.masked_ids_BL[chosen] % 8))
    for left, right in tables:
        table = torch.bincount(left * 8 + right, minlength=64).view(8, 8)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4


def test_replacements_are_a_function_of_sample_and_epoch():
    ids, lengths = sequences([64] * 3, 64)
    ids[:] = ids[0]
    samples = torch.tensor([sample_words(0, 5), sample_words(1, 5), sample_words(0, 5)])
    batch = masked(ids, lengths, samples, mask_token_prob=0.4, random_token_prob=0.3)
    first, second, again = batch.masked_ids_BL
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    alone = masked(ids[1:2], lengths[1:2], samples[1:2], mask_token_prob=0.4, random_token_prob=0.3)
    assert torch.equal(alone.masked_ids_BL[0], second)


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
