"""What stands in the masked slots: [MASK], a random token, or the token itself."""

import pytest
import torch
from scipy import stats

from pipeline.counter_rng import sample_words
from tests.masking_cases import MASK_ID, masked, sequences, words


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
