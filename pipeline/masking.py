"""What must be predicted, and what stands there: functions of (seed, length, epoch, sample).

Two laws choose among the maskable tokens, all but the special ones:

    uniform   exactly round(mask_prob * length) of them, each subset alike
    windowed  the released code's law (`mlm_task.py`, NGramMaskGenerator): one in every window of
              int(1 / mask_prob), left to right, until the count above is reached; the tail that is
              left over is never masked

`pipeline.masking_words` has both laws for whole words and n-grams of words, `pipeline.masking_host`
a cheaper form of those for single tokens where the batch is on the host. A chosen token becomes
[MASK], a random token, or stays (BERT, arXiv:1810.04805, section 3.1); in replaced token detection
all become [MASK].

Letters: B sequences, L sequence length, K masked slots per sequence, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from data_prep.tokenizer import CONTROL_PIECES, Tokenizer
from pipeline import masking_host
from pipeline.config import ObjectiveSection
from pipeline.counter_rng import Key, position_words, stream_key
from pipeline.masking_words import MAX_WORD_PIECES, choose_words

_NEVER = 1 << 62


class MaskedBatch(NamedTuple):
    """A micro batch with its masked slots; shapes do not depend on the data."""

    masked_ids_BL: torch.Tensor
    """int64 [B, L]: the tokens with [MASK], or what replaces it, in the chosen slots."""
    positions_BK: torch.Tensor
    """int64 [B, K]: the slots in ascending order, then zeros where `valid_BK` is False."""
    valid_BK: torch.Tensor
    """bool [B, K]: False for the slots that a sequence does not have."""
    targets_BK: torch.Tensor
    """int64 [B, K]: the original tokens of the slots."""


@dataclass(frozen=True)
class MaskingVocabulary:
    """What masking must know of a tokenizer, whose ids are: special, pieces, [MASK], padding."""

    mask_id: int
    """Id of [MASK], the first behind the pieces."""
    is_word_start_V: torch.Tensor | None = None
    """bool [V], True where a piece begins a word; only whole word masking needs it."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "MaskingVocabulary":
        """Read it off a tokenizer.

        Args:
            tokenizer: The data's.

        Returns:
            The vocabulary, on the host.
        """
        return cls(tokenizer.mask_id, torch.tensor(tokenizer.is_word_start))

    @property
    def text_ids(self) -> range:
        """Ids of the pieces that text is made of; those below are special, as [MASK] is."""
        return range(len(CONTROL_PIECES), self.mask_id)

    def to(self, device: torch.device) -> "MaskingVocabulary":
        """Move to a device.

        Args:
            device: Where to.

        Returns:
            The vocabulary there; this one where it is there already.
        """
        table_V = self.is_word_start_V
        if table_V is None or table_V.device == device:
            return self
        return replace(self, is_word_start_V=table_V.to(device))


class MaskKeys(NamedTuple):
    """The streams of masks, for one sequence length."""

    place: Key
    """Which tokens, words or n-grams."""
    ngram: Key
    """Sizes of n-grams."""
    replacement: Key
    """[MASK], a random token, or the token itself."""
    random_token: Key
    """Which random token."""

    @classmethod
    def derive(cls, seed: int, split: str, sequence_length: int) -> "MaskKeys":
        """Derive the streams of (seed, split, sequence length).

        Args:
            seed: The run's seed.
            split: "train" or "heldout".
            sequence_length: L.

        Returns:
            The keys.
        """
        purposes = ("mask", "mask_ngram", "mask_replacement", "mask_random_token")
        return cls(*(stream_key(seed, f"{each}/{split}", sequence_length) for each in purposes))


def num_masked_slots(sequence_length: int, objective: ObjectiveSection) -> int:
    """Count the slots K of a sequence, which is what a micro batch costs.

    round(mask_prob * L), at least one. A whole word under "windowed" may overshoot: it has room for
    `MAX_WORD_PIECES` pieces in all, and a longer one is cut where the slots end.

    Args:
        sequence_length: Tokens, [CLS] and [SEP] included.
        objective: Share, law and unit.

    Returns:
        K; 77 for 512 tokens at 0.15, and 84 for whole words under "windowed".
    """
    quota = _quota(sequence_length, objective)
    if objective.whole_word_masking and objective.masking_law == "windowed":
        return min(sequence_length, quota + MAX_WORD_PIECES - 1)
    return quota


def choose_masks(
    input_ids_BL: torch.Tensor,
    lengths_B: torch.Tensor,
    sample_words_B2: torch.Tensor,
    objective: ObjectiveSection,
    keys: MaskKeys,
    vocabulary: MaskingVocabulary,
) -> MaskedBatch:
    """Choose the slots of a micro batch and hide their tokens.

    Args:
        input_ids_BL: int64 [B, L], tokens, padded behind each sequence's length.
        lengths_B: int64 [B], tokens of each sequence, [CLS] and [SEP] included.
        sample_words_B2: int64 [B, 2], the identities of the samples.
        objective: Share, law, unit and replacements.
        keys: The streams for this sequence length.
        vocabulary: Of the tokens, on their device.

    Returns:
        The masked batch, `num_masked_slots` wide.

    Raises:
        ValueError: Whole words are to be masked, but the vocabulary does not know where they begin.
    """
    on_host = input_ids_BL.device.type == "cpu" and not objective.whole_word_masking
    choose = choose_on_host if on_host else choose_on_device
    return choose(input_ids_BL, lengths_B, sample_words_B2, objective, keys, vocabulary)


def choose_on_device(
    input_ids_BL: torch.Tensor,
    lengths_B: torch.Tensor,
    sample_words_B2: torch.Tensor,
    objective: ObjectiveSection,
    keys: MaskKeys,
    vocabulary: MaskingVocabulary,
) -> MaskedBatch:
    """Choose with shapes that do not depend on the data, without reading anything back.

    Arguments, result and errors are those of `choose_masks`.
    """
    length = input_ids_BL.shape[1]
    num_slots = num_masked_slots(length, objective)
    maskable_BL = torch.arange(length, device=input_ids_BL.device)[None, :] < lengths_B[:, None]
    maskable_BL = maskable_BL & (input_ids_BL >= vocabulary.text_ids.start)
    maskable_BL = maskable_BL & (input_ids_BL != vocabulary.mask_id)
    quota_B = _quotas(lengths_B, length, objective)
    window = int(1 / objective.mask_prob)
    if objective.whole_word_masking:
        if vocabulary.is_word_start_V is None:
            raise ValueError("whole_word_masking needs MaskingVocabulary.is_word_start_V")
        chosen_BL = choose_words(
            maskable_BL,
            vocabulary.is_word_start_V[input_ids_BL],
            quota_B,
            position_words(length, sample_words_B2, keys.place),
            position_words(length, sample_words_B2, keys.ngram),
            law=objective.masking_law,
            window=window,
            max_ngram=objective.max_ngram,
        )
        chosen_BL = chosen_BL & (chosen_BL.long().cumsum(1) <= num_slots)
    elif objective.masking_law == "windowed":
        words_BW = position_words(-(-length // window), sample_words_B2, keys.place)
        chosen_BL = _choose_windowed(maskable_BL, quota_B, words_BW, window)
    else:
        words_BL = position_words(length, sample_words_B2, keys.place)
        chosen_BL = _choose_uniform(maskable_BL, quota_B, words_BL)
    if objective.mask_token_prob == 1.0:
        masked_ids_BL = input_ids_BL.masked_fill(chosen_BL, vocabulary.mask_id)
    else:
        hidden_BL = _replacements(input_ids_BL, sample_words_B2, objective, keys, vocabulary)
        masked_ids_BL = torch.where(chosen_BL, hidden_BL, input_ids_BL)
    return _gather_slots(input_ids_BL, chosen_BL, masked_ids_BL, num_slots)


def choose_on_host(
    input_ids_BL: torch.Tensor,
    lengths_B: torch.Tensor,
    sample_words_B2: torch.Tensor,
    objective: ObjectiveSection,
    keys: MaskKeys,
    vocabulary: MaskingVocabulary,
) -> MaskedBatch:
    """Choose the same single tokens with a look at the data.

    Arguments and result are those of `choose_masks`; the tensors are on the host.
    """
    ids_BL, (batch, length) = input_ids_BL.numpy(), input_ids_BL.shape
    words_B2 = sample_words_B2.numpy()
    maskable_BL = (ids_BL >= vocabulary.text_ids.start) & (ids_BL != vocabulary.mask_id)
    if (lengths_B.numpy() == length).all():
        quota_B = np.full(batch, _quota(length, objective))
    else:
        quota_B = _quotas(lengths_B, length, objective).numpy()
        maskable_BL &= np.arange(length) < lengths_B.numpy()[:, None]
    if objective.masking_law == "windowed":
        window = int(1 / objective.mask_prob)
        words_BW = masking_host.position_words(-(-length // window), words_B2, keys.place)
        chosen = masking_host.choose_windowed(maskable_BL, quota_B, words_BW, window)
    else:
        words_BL = masking_host.position_words(length, words_B2, keys.place)
        chosen = masking_host.choose_uniform(maskable_BL, quota_B, words_BL)
    num_slots = num_masked_slots(length, objective)
    positions_BK, valid_BK = masking_host.fill_slots(chosen, batch, length, num_slots)
    masked_ids_BL, targets = ids_BL.copy(), ids_BL.reshape(-1).take(chosen)
    if len(chosen) == batch * num_slots:
        targets_BK = targets.reshape(batch, num_slots)
    else:
        targets_BK = np.repeat(ids_BL[:, :1], num_slots, axis=1)
        targets_BK[valid_BK] = targets
    if objective.mask_token_prob == 1.0:
        masked_ids_BL.reshape(-1)[chosen] = vocabulary.mask_id
    else:
        hidden_BL = _replacements(input_ids_BL, sample_words_B2, objective, keys, vocabulary)
        masked_ids_BL.reshape(-1)[chosen] = hidden_BL.numpy().reshape(-1).take(chosen)
    return MaskedBatch(
        masked_ids_BL=torch.from_numpy(masked_ids_BL),
        positions_BK=torch.from_numpy(positions_BK),
        valid_BK=torch.from_numpy(valid_BK),
        targets_BK=torch.from_numpy(targets_BK),
    )


def _quotas(lengths_B: torch.Tensor, length: int, objective: ObjectiveSection) -> torch.Tensor:
    """Count the tokens to choose of each sequence."""
    quota_B = (lengths_B.double() * objective.mask_prob).round().long()
    return quota_B.clamp(min=1, max=_quota(length, objective))


def _quota(length: int, objective: ObjectiveSection) -> int:
    """Count the tokens to choose of a full sequence."""
    return max(1, round(objective.mask_prob * length))


def _choose_uniform(
    maskable_BL: torch.Tensor, quota_B: torch.Tensor, words_BL: torch.Tensor
) -> torch.Tensor:
    """Mark the maskable positions with the smallest words."""
    position_L = torch.arange(words_BL.shape[1], device=words_BL.device)
    # The position in the low bits breaks ties, so that the order is the same on every device.
    ticket_BL = torch.where(maskable_BL, (words_BL << 20) | position_L, _NEVER | position_L)
    last_B1 = ticket_BL.sort(dim=1).values.gather(1, quota_B[:, None] - 1)
    return maskable_BL & (ticket_BL <= last_B1)


def _choose_windowed(
    maskable_BL: torch.Tensor, quota_B: torch.Tensor, words_BW: torch.Tensor, window: int
) -> torch.Tensor:
    """Mark one maskable position a window by the window's word, up to the quota."""
    ordinal_BL = maskable_BL.long().cumsum(1) - 1
    window_BL = ordinal_BL.clamp(min=0) // window
    count_B1 = maskable_BL.long().sum(1, keepdim=True)
    size_BL = (count_B1 - window_BL * window).clamp(max=window)
    winner_BL = (words_BW.gather(1, window_BL) * size_BL) >> 32
    wins_BL = maskable_BL & (ordinal_BL - window_BL * window == winner_BL)
    return wins_BL & (window_BL < quota_B[:, None])


def _replacements(
    input_ids_BL: torch.Tensor,
    sample_words_B2: torch.Tensor,
    objective: ObjectiveSection,
    keys: MaskKeys,
    vocabulary: MaskingVocabulary,
) -> torch.Tensor:
    """Say for every token what it becomes if it is chosen.

    Random tokens are the pieces that text is made of, each alike. The release draws from those and
    the special ones, BERT too; they are 5 of 128,001 there.
    """
    length, text_ids = input_ids_BL.shape[1], vocabulary.text_ids
    fate_BL = position_words(length, sample_words_B2, keys.replacement)
    last_mask = round(objective.mask_token_prob * 2**32)
    last_random = round((objective.mask_token_prob + objective.random_token_prob) * 2**32)
    token_words_BL = position_words(length, sample_words_B2, keys.random_token)
    random_BL = text_ids.start + ((token_words_BL * len(text_ids)) >> 32)
    others_BL = torch.where(fate_BL < last_random, random_BL, input_ids_BL)
    return others_BL.masked_fill(fate_BL < last_mask, vocabulary.mask_id)


def _gather_slots(
    input_ids_BL: torch.Tensor,
    chosen_BL: torch.Tensor,
    masked_ids_BL: torch.Tensor,
    num_slots: int,
) -> MaskedBatch:
    """List the chosen positions in ascending order in a fixed number of slots."""
    length = input_ids_BL.shape[1]
    position_L = torch.arange(length, device=input_ids_BL.device)
    sorted_BL = torch.where(chosen_BL, position_L, length + position_L).sort(dim=1).values
    listed_BK = sorted_BL[:, :num_slots]
    valid_BK = listed_BK < length
    positions_BK = torch.where(valid_BK, listed_BK, 0)
    return MaskedBatch(
        masked_ids_BL=masked_ids_BL,
        positions_BK=positions_BK,
        valid_BK=valid_BK,
        targets_BK=input_ids_BL.gather(1, positions_BK),
    )
