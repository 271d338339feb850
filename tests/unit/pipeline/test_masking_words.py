"""Whole words and n-grams: the released law, the law in random order, and what both leave whole."""

import random

import pytest
import torch

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import position_words, sample_words
from pipeline.masking import MaskingVocabulary, MaskKeys, choose_masks, num_masked_slots
from pipeline.masking_words import MAX_WORD_PIECES

MASK_ID = 60
SPECIAL = (0, 1, 2, 3, MASK_ID)
KEYS = MaskKeys.derive(7, "test", 0)
STARTS = torch.tensor([4 <= value < 30 for value in range(64)])  # about half of the pieces
VOCABULARY = MaskingVocabulary(MASK_ID, STARTS)
LAWS = ["uniform", "windowed"]


def words_of(samples):
    return torch.tensor([sample_words(0, sample) for sample in samples])


def section(law, max_ngram=1, mask_prob=0.15, **changes):
    return ObjectiveSection(
        masking_law=law,
        max_ngram=max_ngram,
        mask_prob=mask_prob,
        whole_word_masking=True,
        **changes,
    )


def text(length, padded_to, seed, unknown=0, start_share=0.5):
    """[CLS], pieces of which a share begin words, some [UNK] among them, [SEP], padding."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(padded_to, generator=generator) < start_share
    ids = torch.where(
        begins,
        torch.randint(4, 30, (padded_to,), generator=generator),
        torch.randint(30, MASK_ID, (padded_to,), generator=generator),
    )
    ids[torch.randperm(length - 2, generator=generator)[:unknown] + 1] = 3
    ids[0], ids[length - 1], ids[length:] = 1, 2, 0
    return ids


def masked(texts, lengths, objective, samples=None, keys=KEYS):
    samples = words_of(range(len(texts))) if samples is None else samples
    return choose_masks(
        torch.stack(list(texts)), torch.tensor(lengths), samples, objective, keys, VOCABULARY
    )


def slots(batch):
    """The chosen positions of every sequence, as tuples."""
    listed = zip(batch.positions_BK.tolist(), batch.valid_BK.tolist(), strict=True)
    return [tuple(p for p, v in zip(*row, strict=True) if v) for row in listed]


def words_in(ids):
    """Positions of every word: maskable tokens, where one that begins no word joins the last."""
    found = []
    for place, token in enumerate(ids):
        if token in SPECIAL:
            continue
        if found and not STARTS[token]:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def released_law(ids, length, objective, choose_n, choose_place):
    """NGramMaskGenerator.mask_tokens of DeBERTa's mlm_task.py in plain loops, without its cap of
    80 predictions; how it draws is a parameter, by the offset and the number of places."""
    words, quota = words_in(ids[:length]), max(1, round(objective.mask_prob * length))
    window = int(1 / objective.mask_prob)
    is_masked, offset = [False] * len(words), 0
    while offset < len(words):
        n = choose_n(offset)
        context = min(n * window, len(words) - offset)
        start = offset + choose_place(offset, context)
        end = min(start + n, len(words))
        offset = max(offset + context, end)
        is_masked[start:end] = [True] * (end - start)
    chosen = []
    for take, word in zip(is_masked, words, strict=True):
        if take:
            chosen += word
            if len(chosen) >= quota:
                break
    return chosen


def size_of_ngram(word, max_ngram):
    """The n whose part of [0, 1) the random word lies in, parts being as 1 : 1/2 : 1/3 ..."""
    weights = [1 / n for n in range(1, max_ngram + 1)]
    below = [sum(weights[:n]) / sum(weights) for n in range(1, max_ngram + 1)]
    return next(n for n, end in enumerate(below, 1) if word / 2**32 < end)


def random_words(length, samples):
    return (position_words(length, samples, key).tolist() for key in (KEYS.place, KEYS.ngram))


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("mask_prob", [0.1, 0.15, 0.3, 0.5])
def test_windowed_is_the_released_loop_with_our_random_words(max_ngram, mask_prob):
    lengths = [64, 64, 51, 33, 9, 3, 64, 20]
    texts = [text(length, 64, seed, seed % 3) for seed, length in enumerate(lengths)]
    texts[6][1:63] = 3  # nothing to mask
    objective = section("windowed", max_ngram, mask_prob)
    places, sizes = random_words(64, words_of(range(8)))
    found = slots(masked(texts, lengths, objective))
    for row, length in enumerate(lengths):
        expected = released_law(
            texts[row].tolist(),
            length,
            objective,
            lambda offset, row=row: size_of_ngram(sizes[row][offset], max_ngram),
            lambda offset, count, row=row: places[row][offset] * count >> 32,
        )
        assert list(found[row]) == expected[: num_masked_slots(64, objective)], row


@pytest.mark.parametrize(
    ("length", "padded_to", "unknown", "max_ngram"),
    [(30, 30, 0, 3), (24, 30, 4, 2), (40, 40, 0, 3), (26, 30, 0, 1)],
)
def test_windowed_is_the_released_law(length, padded_to, unknown, max_ngram):
    """Equal probability for every set of positions: with small counts all sets can be listed."""
    count, objective = 12_000, section("windowed", max_ngram, 0.2)
    ids = text(length, padded_to, 1, unknown)
    ours, theirs, rng = {}, {}, random.Random(0)
    for chosen in slots(masked([ids] * count, [length] * count, objective)):
        ours[chosen] = ours.get(chosen, 0) + 1
    for _ in range(count):
        chosen = released_law(
            ids.tolist(),
            length,
            objective,
            lambda _: rng.choices(
                range(1, max_ngram + 1), [1 / n for n in range(1, max_ngram + 1)]
            )[0],
            lambda _, places: rng.randint(0, places - 1),
        )
        theirs[tuple(chosen)] = theirs.get(tuple(chosen), 0) + 1
    assert len(theirs) > 5
    for position in range(padded_to):
        a, b = (
            sum(times for chosen, times in sets.items() if position in chosen)
            for sets in (ours, theirs)
        )
        assert abs(a - b) <= 5 * (a + b + 1) ** 0.5, position
    for chosen in ours.keys() | theirs.keys():
        a, b = ours.get(chosen, 0), theirs.get(chosen, 0)
        assert abs(a - b) <= 5 * (a + b + 1) ** 0.5, chosen


def divided(words, limit):
    """Words with more pieces than the limit in parts of that many."""
    return [word[n : n + limit] for word in words for n in range(0, len(word), limit)]


def random_order_law(ids, length, objective, places, sizes):
    """N-grams from left to right, then each in random order that does not overshoot."""
    quota = max(1, round(objective.mask_prob * length))
    words = divided(words_in(ids[:length]), min(quota, MAX_WORD_PIECES))
    ngrams, offset = [], 0
    while offset < len(words):
        n = size_of_ngram(sizes[offset], objective.max_ngram)
        ngrams.append([place for word in words[offset : offset + n] for place in word])
        offset += n
    chosen = []
    for number in sorted(range(len(ngrams)), key=lambda number: (places[number], number)):
        if len(chosen) + len(ngrams[number]) <= quota:
            chosen += ngrams[number]
    return sorted(chosen)


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 16])
@pytest.mark.parametrize("mask_prob", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("start_share", [0.0, 0.2, 0.5, 1.0])
def test_uniform_takes_ngrams_in_random_order_while_they_fit(max_ngram, mask_prob, start_share):
    lengths = [64, 64, 51, 33, 9, 3, 64, 20] * 5
    texts = [
        text(length, 64, seed, seed % 3 * (length > 9), start_share)
        for seed, length in enumerate(lengths)
    ]
    texts[6][1:63] = 3  # nothing to mask
    objective = section("uniform", max_ngram, mask_prob)
    places, sizes = random_words(64, words_of(range(40)))
    found = slots(masked(texts, lengths, objective))
    for row, length in enumerate(lengths):
        expected = random_order_law(texts[row].tolist(), length, objective, places[row], sizes[row])
        assert list(found[row]) == expected, row


def test_uniform_reaches_every_position():
    """Also inside of a word longer than the quota, and the last token of a text."""
    for start_share, max_ngram in ((0.0, 1), (0.02, 3), (0.5, 3), (1.0, 3)):
        ids = text(40, 40, 3, 2, start_share)
        batch = masked([ids] * 3_000, [40] * 3_000, section("uniform", max_ngram))
        times = (batch.masked_ids_BL == MASK_ID).sum(0)
        maskable = torch.tensor([token not in SPECIAL for token in ids.tolist()])
        assert (times[maskable] > 100).all(), times
        assert not times[~maskable].any()


def test_uniform_chooses_words_of_one_size_equally_often():
    ids = torch.tensor([1] + [4, 40] * 20 + [2])
    count, objective = 6_000, section("uniform")
    chosen = masked([ids] * count, [42] * count, objective).masked_ids_BL == MASK_ID
    assert (chosen.sum(1) == 6).all()
    times = chosen[:, 1:41:2].sum(0)
    share = 3 / 20
    assert ((times - count * share).abs() < 5 * (count * share * (1 - share)) ** 0.5).all()


@pytest.mark.parametrize("law", LAWS)
def test_ngrams_are_as_one_over_n(law):
    """Runs of chosen words in a long text with few of them, so that runs seldom touch."""
    length, count = 512, 1_500
    objective = section(law, 4, 0.02)
    ids = torch.tensor([1] + [4] * (length - 2) + [2])
    is_chosen = masked([ids] * count, [length] * count, objective).masked_ids_BL == MASK_ID
    runs = {}
    for row in is_chosen.tolist():
        text_of_row = "".join("x" if take else " " for take in row)
        # The last run of "windowed" may be cut by the quota; the first is never.
        run = len(text_of_row.split()[0])
        runs[run] = runs.get(run, 0) + 1
    total = sum(1 / n for n in range(1, 5))
    for n in range(1, 5):
        expected = count / n / total
        assert abs(runs[n] - expected) < 5 * expected**0.5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("max_ngram", [1, 3])
def test_no_word_is_broken(law, max_ngram):
    lengths = [128, 128, 90, 128]
    texts = [text(length, 128, seed, 3, start_share=0.7) for seed, length in enumerate(lengths)]
    objective = section(law, max_ngram)
    for row, chosen in enumerate(slots(masked(texts, lengths, objective))):
        assert chosen
        words = words_in(texts[row].tolist()[: lengths[row]])
        assert max(map(len, words)) <= MAX_WORD_PIECES
        for word in words:
            assert len(set(word) & set(chosen)) in (0, len(word))
        quota = round(0.15 * lengths[row])
        if law == "uniform":
            assert len(chosen) == quota, "there are words of one piece for the last gap"
        else:
            assert len(chosen) < quota + MAX_WORD_PIECES


@pytest.mark.parametrize(
    ("law", "length", "expected"),
    [("uniform", 512, 77), ("windowed", 512, 84), ("windowed", 128, 26), ("windowed", 8, 8)],
)
def test_number_of_slots(law, length, expected):
    objective = section(law, 3)
    assert num_masked_slots(length, objective) == expected
    batch = masked([text(length, length, 0)], [length], objective)
    assert batch.positions_BK.shape == batch.valid_BK.shape == (1, expected)


def test_a_word_that_is_longer_than_the_slots_is_cut_under_windowed():
    ids = text(128, 128, 0, start_share=0.0)
    (chosen,) = slots(masked([ids], [128], section("windowed", 3)))
    assert chosen == tuple(range(1, 27))


def test_the_batch_is_consistent():
    lengths = [40, 31, 40]
    texts = [text(length, 40, seed) for seed, length in enumerate(lengths)]
    ids = torch.stack(texts)
    for law in LAWS:
        objective = section(law, 3, mask_token_prob=0.8, random_token_prob=0.1)
        batch = masked(texts, lengths, objective)
        assert torch.equal(batch.targets_BK, ids.gather(1, batch.positions_BK))
        is_slot = torch.zeros_like(ids, dtype=torch.bool)
        for row, chosen in enumerate(slots(batch)):
            is_slot[row, list(chosen)] = True
            assert chosen == tuple(sorted(set(chosen)))
        assert torch.equal(batch.masked_ids_BL[~is_slot], ids[~is_slot])
        assert not torch.equal(batch.masked_ids_BL[is_slot], ids[is_slot])


@pytest.mark.parametrize("law", LAWS)
def test_masks_depend_on_the_sample_alone(law):
    texts = [text(64, 64, 5)] * 4
    samples = torch.tensor([sample_words(*i) for i in ((0, 0), (0, 1), (1, 0), (0, 2**32))])
    together = masked(texts, [64] * 4, section(law, 3), samples)
    assert len(set(slots(together))) == 4
    for row in range(4):
        alone = masked(texts[:1], [64], section(law, 3), samples[row : row + 1])
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[row : row + 1], single)
    other = masked(texts, [64] * 4, section(law, 3), samples, MaskKeys.derive(8, "test", 0))
    assert not set(slots(other)) & set(slots(together))


def test_words_need_a_table():
    with pytest.raises(ValueError, match=r"whole_word_masking needs .*is_word_start_V"):
        choose_masks(
            text(8, 8, 0)[None],
            torch.tensor([8]),
            words_of([0]),
            section("uniform"),
            KEYS,
            MaskingVocabulary(MASK_ID),
        )


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("uniform", [[11, 12, 29, 30, 31, 32], [6, 7, 8, 20, 21]]),
        ("windowed", [[12, 13, 14, 15, 16, 17], [2, 3, 15, 16, 17, 18, 19]]),
    ],
)
def test_golden_positions(law, expected):
    """A change here changes every run: it needs a new major version."""
    texts, lengths = [text(40, 40, 0), text(31, 40, 1)], [40, 31]
    samples = torch.tensor([sample_words(0, 0), sample_words(3, 2**33 + 5)])
    batch = masked(texts, lengths, section(law, 3), samples)
    assert [list(chosen) for chosen in slots(batch)] == expected
