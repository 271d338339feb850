"""What a run's seed, split and length make of masks and draws, and what the objective chooses."""

import pytest
import torch

from data_prep.tokenizer import Tokenizer
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import sample_words, stream_key
from pipeline.masking import MaskingVocabulary, MaskKeys, choose_masks
from pipeline.objective_keys import ObjectiveKeys
from pipeline.sequences import SequenceBatch

LENGTH, MASK_ID = 32, 60
VOCABULARY = MaskingVocabulary(MASK_ID)


def batch(sequences=4, high=MASK_ID):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, high, (sequences, LENGTH), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    samples = torch.tensor([sample_words(0, sample) for sample in range(sequences)])
    return SequenceBatch(ids, torch.full((sequences,), LENGTH), samples, is_full=True)


def keys(seed=3, length=LENGTH, split="train", vocabulary=VOCABULARY, **objective):
    return ObjectiveKeys(ObjectiveSection(**objective), seed, length, vocabulary, split)


def test_masks_are_those_of_the_run_s_streams():
    objective = ObjectiveSection(mask_token_prob=0.5, random_token_prob=0.5, mask_prob=0.3)
    data = batch()
    expected = choose_masks(
        data.input_ids_BL,
        data.lengths_B,
        data.sample_words_B2,
        objective,
        MaskKeys.derive(3, "train", LENGTH),
        VOCABULARY,
    )
    found = keys(mask_token_prob=0.5, random_token_prob=0.5, mask_prob=0.3).mask(data)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_draws_are_keyed_by_the_run_s_stream_and_the_samples():
    data = batch()
    draw = keys(sampling_temperature=0.7).draw(data)
    assert draw is not None
    assert draw.key == stream_key(3, "draw/train", LENGTH)
    assert torch.equal(draw.sample_words_B2, data.sample_words_B2)
    assert (draw.temperature, draw.allowed_ids) == (0.7, None)


def test_seeds_lengths_and_splits_have_their_own_masks_and_draws():
    data = batch()
    variants = [keys(), keys(seed=4), keys(length=64), keys(split="heldout")]
    assert len({each.draw(data).key for each in variants}) == 4
    masks = [each.mask(data).masked_ids_BL.flatten().tolist() for each in variants]
    assert len(set(map(tuple, masks))) == 4


def test_special_ids_may_be_drawn_or_not():
    draw = keys(draw_special_ids=False).draw(batch())
    assert draw is not None
    assert draw.allowed_ids == range(4, MASK_ID)


def test_masked_language_modelling_draws_nothing():
    assert keys(task="mlm").draw(batch()) is None


@pytest.mark.parametrize("law", ["uniform", "windowed"])
def test_whole_words_of_a_tokenizer(law, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    vocabulary = MaskingVocabulary.from_tokenizer(tokenizer)
    objective = {"whole_word_masking": True, "max_ngram": 3}
    data = batch(16, high=tokenizer.num_pieces)
    broken = []
    for whole in (True, False):
        changes = objective if whole else {}
        found = keys(vocabulary=vocabulary, masking_law=law, mask_prob=0.3, **changes).mask(data)
        is_masked_BL = found.masked_ids_BL == tokenizer.mask_id
        continues_BL = ~torch.tensor(tokenizer.is_word_start)[data.input_ids_BL]
        differs_BL = is_masked_BL.diff(dim=1) & continues_BL[:, 1:]
        broken.append(int(differs_BL[:, 1:-1].sum()))
    # These random pieces hold some words of more than eight, which alone may be divided.
    assert broken[0] * 5 < broken[1], broken
