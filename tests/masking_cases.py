"""Sequences of few pieces and what the masking of them is called with, for tests of masks."""

import torch

from pipeline.config import ObjectiveSection
from pipeline.counter_rng import sample_words, stream_key
from pipeline.masking import MaskedBatch, MaskingVocabulary, MaskKeys, choose_masks

SPECIAL = (0, 1, 2, 3, 60)  # pad, cls, sep, unk, mask
MASK_ID = 60
KEYS = MaskKeys.derive(7, "test", 0)._replace(place=stream_key(7, "mask/test"))
KEY = KEYS.place
VOCABULARY = MaskingVocabulary(MASK_ID)
LAWS = ["uniform", "windowed"]


def words(samples, epoch=0):
    """Identities of samples, int64 [B, 2]."""
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


def masked(
    ids, lengths, samples, law="uniform", mask_prob=0.15, keys=KEYS, **objective
) -> MaskedBatch:
    """Mask sequences with the choices that are named."""
    section = ObjectiveSection(masking_law=law, mask_prob=mask_prob, **objective)
    return choose_masks(ids, lengths, samples, section, keys, VOCABULARY)


def full(count, length=512, law="uniform", mask_prob=0.15):
    """The positions chosen in `count` full sequences, bool [count, length]."""
    ids, lengths = sequences([length] * count, length)
    batch = masked(ids, lengths, words(range(count)), law, mask_prob)
    return batch.masked_ids_BL == MASK_ID
