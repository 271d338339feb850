"""Draws that follow the softmax, noise that is a function of where, and labels of what changed."""

import math

import pytest
import torch
from scipy import stats

from pipeline.counter_rng import philox4x32, sample_words, stream_key
from pipeline.modeling.vocabulary_head import vocabulary_head
from pipeline.rtd import DrawKey, corrupt, gumbel_noise

KEY = stream_key(3, "draw/test")
EULER = 0.5772156649015329


def words(count, epoch=0):
    return torch.tensor([sample_words(epoch, sample) for sample in range(count)])


def draws(logits_V, count, temperature=1.0, key=KEY, chunk_ids=16, epoch=0, allowed=None):
    """Draw `count` times from one softmax through the head that training uses."""
    slots = 8
    hidden_BKD = torch.ones(count // slots, slots, 1)
    shape = hidden_BKD.shape[:2]
    positions_BK = torch.arange(slots).expand(shape)
    output = vocabulary_head(
        hidden_BKD,
        logits_V[:, None].contiguous(),
        torch.zeros_like(logits_V),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.int64),
        positions_BK,
        DrawKey(key, words(shape[0], epoch), temperature, allowed),
        chunk_ids,
    )
    assert output.drawn_BK is not None
    return output.drawn_BK.flatten()


LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0, 1.0, 0.0, 1.9, -0.5, 0.1])


def chi_square_p(drawn, probabilities):
    """Probability of so large a deviation if the draws follow these probabilities."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    return stats.chisquare(counts.numpy(), expected.numpy()).pvalue


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(temperature):
    drawn = draws(LOGITS, 80_000, temperature)
    assert chi_square_p(drawn, torch.softmax(LOGITS / temperature, 0)) > 1e-4
    # The test has power: neighbours of the right answer, and the argmax, are refused.
    assert chi_square_p(drawn, torch.softmax(LOGITS / (temperature * 1.1), 0)) < 1e-6
    assert drawn.unique().numel() == len(LOGITS), "an argmax would draw one id alone"


def test_special_and_dead_ids_can_be_drawn():
    """The original samples from all rows of the table, [CLS] and the padding of it included."""
    assert set(draws(torch.zeros(12), 4_000).tolist()) == set(range(12))


@pytest.mark.parametrize("allowed", [range(4, 9), range(1, 10), range(3, 4), range(2, 50)])
@pytest.mark.parametrize("chunk_ids", [4, 8, 16])
def test_draws_among_allowed_ids_follow_their_softmax(allowed, chunk_ids):
    drawn = draws(LOGITS, 40_000, 0.7, chunk_ids=chunk_ids, allowed=allowed)
    ids = [n for n in range(len(LOGITS)) if n in allowed]
    assert set(drawn.tolist()) == set(ids)
    if len(ids) > 1:
        expected = torch.softmax(LOGITS[ids] / 0.7, 0)
        assert chi_square_p(drawn - ids[0], expected) > 1e-4


def test_forbidding_ids_changes_only_their_draws():
    """The noise stays, so that a draw moves only where a forbidden id had won."""
    free = draws(LOGITS, 4_000)
    bound = draws(LOGITS, 4_000, allowed=range(4, 10))
    assert torch.equal(bound[free >= 4], free[free >= 4])
    assert (bound[free < 4] >= 4).all()
    assert (free < 4).any()


def test_draws_of_other_positions_samples_epochs_and_seeds_are_independent():
    flat = torch.zeros(500)
    first = draws(flat, 4_000, chunk_ids=256)
    for other in (
        draws(flat, 4_000, chunk_ids=256, key=stream_key(4, "draw/test")),
        draws(flat, 4_000, chunk_ids=256, epoch=1),
        first.roll(1),  # another position
        first.roll(8),  # another sample
    ):
        assert (first == other).sum() < 8 + 5 * 8**0.5
    assert torch.equal(first, draws(flat, 4_000, chunk_ids=256))


def test_a_draw_survives_rounding_of_the_logits():
    """Noise of 5e-7 flips a draw only where two candidates tie."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2048, generator=generator)
    moved = logits + 5e-7 * torch.randn(2048, generator=generator)
    flipped = draws(logits, 2_000, chunk_ids=512) != draws(moved, 2_000, chunk_ids=512)
    assert flipped.sum() <= 1


def test_noise_of_a_chunk_is_a_part_of_the_noise_of_the_whole():
    samples, positions = words(3), torch.tensor([[1, 9], [4, 5], [500, 2]])
    whole = gumbel_noise(samples, positions, 0, 61, KEY)
    assert whole.shape == (3, 2, 61)
    assert whole.dtype == torch.float32
    for first, count in ((0, 1), (4, 7), (20, 41), (60, 1)):
        part = gumbel_noise(samples, positions, first, count, KEY)
        assert torch.equal(part, whole[:, :, first : first + count])
    alone = gumbel_noise(samples[1:2], positions[1:2, 1:], 0, 61, KEY)
    assert torch.equal(alone, whole[1:2, 1:])


@pytest.mark.parametrize("first", [1, 2, 3, 17])
def test_a_chunk_begins_at_a_multiple_of_four(first):
    with pytest.raises(ValueError, match=f"first_id {first} is not a multiple of 4"):
        gumbel_noise(words(1), torch.zeros(1, 1, dtype=torch.int64), first, 4, KEY)


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(words(64), torch.arange(16).expand(64, 16), 0, 1024, KEY).flatten()
    assert torch.isfinite(noise).all()
    noise, count = noise.double(), noise.numel()
    deviation = math.pi / 6**0.5
    assert abs(noise.mean().item() - EULER) < 5 * deviation / count**0.5
    assert noise.var().item() == pytest.approx(deviation**2, rel=0.01)
    assert stats.kstest(noise[:100_000].numpy(), "gumbel_r").pvalue > 1e-4
    assert noise.max().item() <= -math.log(-math.log1p(-(2.0**-33)))


def test_noise_against_the_formula_in_double_precision():
    """One element by hand: words of the counter (id // 4, position, sample words), lane id % 4."""
    sample, position, vocabulary_id = sample_words(2, 2**34 + 3), 17, 42
    counter = (torch.tensor([vocabulary_id // 4]), position, *sample)
    word = int(philox4x32(counter, KEY)[vocabulary_id % 4][0])
    expected = -math.log(-math.log1p(-(word + 0.5) * 2.0**-32))
    noise = gumbel_noise(torch.tensor([sample]), torch.tensor([[position]]), 0, 64, KEY)
    assert noise[0, 0, vocabulary_id].item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 2**7, 2**32 - 1])
def test_noise_at_the_ends_of_the_words(word, monkeypatch):
    bits = torch.full((1, 1, 1), word - (word >> 31 << 32), dtype=torch.int32)
    monkeypatch.setattr("pipeline.rtd.philox_bits", lambda counter, key: (bits,) * 4)
    noise = gumbel_noise(words(1), torch.zeros(1, 1, dtype=torch.int64), 0, 4, KEY)
    assert not noise.isnan().any()
    assert (noise < 22.9).all(), "a word of 0 is the largest noise"
    if word == 2**32 - 1:
        assert (noise == -torch.inf).all(), "it rounds to u = 1, which never wins"


def test_labels_say_what_changed():
    original = torch.tensor([[1, 10, 11, 12, 2, 0], [1, 20, 21, 2, 0, 0]])
    positions = torch.tensor([[1, 2, 3], [2, 0, 0]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    drawn = torch.tensor([[10, 99, 0], [1, 55, 56]])
    ids, is_replaced = corrupt(original, positions, valid, drawn)
    # A lucky draw (10) is original; [PAD] and [CLS] as draws are replacements like any other.
    assert ids.tolist() == [[1, 10, 99, 0, 2, 0], [1, 20, 1, 2, 0, 0]]
    assert is_replaced.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_unused_slots_change_nothing():
    original = torch.randint(0, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    positions, drawn = torch.zeros(5, 4, dtype=torch.int64), torch.full((5, 4), 61)
    ids, is_replaced = corrupt(original, positions, torch.zeros(5, 4, dtype=torch.bool), drawn)
    assert torch.equal(ids, original)
    assert not is_replaced.any()


@pytest.mark.parametrize("slots", [1, 7, 40])
def test_corrupted_inputs_against_a_plain_loop(slots):
    generator = torch.Generator().manual_seed(slots)
    original = torch.randint(0, 9, (20, 40), generator=generator)
    drawn = torch.randint(0, 9, (20, slots), generator=generator)
    counts = torch.randint(0, slots + 1, (20,), generator=generator)
    positions = torch.zeros(20, slots, dtype=torch.int64)
    valid = torch.arange(slots) < counts[:, None]
    expected = original.clone()
    for row, count in enumerate(counts.tolist()):
        places = torch.randperm(40, generator=generator)[:count].sort().values
        positions[row, :count] = places
        expected[row, places] = drawn[row, :count]
    ids, is_replaced = corrupt(original, positions, valid, drawn)
    assert torch.equal(ids, expected)
    assert torch.equal(is_replaced, expected != original)
