"""What must be predicted, and what stands there: functions of (seed, length, epoch, sample).

Two laws choose among the maskable tokens, all but the special ones:

    uniform   exactly round(mask_prob * length) of them, each subset alike
    windowed  the released code's law (`mlm_task.py`, NGramMaskGenerator): one in every window of
              int(1 / mask_prob), left to right, until the count above is reached; the tail that is
              left over is never masked

`pipeline.masking_words` has both laws for whole words and n-grams of words. A chosen token becomes
[MASK], a random token, or stays (BERT, arXiv:1810.04805, section 3.1); in replaced token detection
all become [MASK].

Letters: B sequences, L sequence length, K masked slots per sequence, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from data_prep.tokenizer import CONTROL_PIECES, Tokenizer
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
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked: [PAD], [CLS], [SEP], [UNK] and [MASK]."""
        return (*range(len(CONTROL_PIECES)), self.mask_id)

    @property
    def text_ids(self) -> range:
        """Ids of the pieces that text is made of."""
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
    length = input_ids_BL.shape[1]
    num_slots = num_masked_slots(length, objective)
    maskable_BL = torch.arange(length, device=input_ids_BL.device)[None, :] < lengths_B[:, None]
    for special in vocabulary.special_ids:
        maskable_BL = maskable_BL & (input_ids_BL != special)
    quota_B = (lengths_B.double() * objective.mask_prob).round().long()
    quota_B = quota_B.clamp(min=1, max=_quota(length, objective))
    place_words_BL = position_words(length, sample_words_B2, keys.place)
    window = int(1 / objective.mask_prob)
    if objective.whole_word_masking:
        if vocabulary.is_word_start_V is None:
            raise ValueError("whole_word_masking needs MaskingVocabulary.is_word_start_V")
        chosen_BL = choose_words(
            maskable_BL,
            vocabulary.is_word_start_V[input_ids_BL],
            quota_B,
            place_words_BL,
            position_words(length, sample_words_B2, keys.ngram),
            law=objective.masking_law,
            window=window,
            max_ngram=objective.max_ngram,
        )
        chosen_BL = chosen_BL & (chosen_BL.long().cumsum(1) <= num_slots)
    elif objective.masking_law == "windowed":
        chosen_BL = _windowed_ranks(maskable_BL, place_words_BL, window) < quota_B[:, None]
    else:
        chosen_BL = _uniform_ranks(maskable_BL, place_words_BL) < quota_B[:, None]
    hidden_BL = _replacements(input_ids_BL, sample_words_B2, objective, keys, vocabulary)
    return _gather_slots(input_ids_BL, chosen_BL, hidden_BL, num_slots)


def _quota(length: int, objective: ObjectiveSection) -> int:
    """Count the tokens to choose of a full sequence."""
    return max(1, round(objective.mask_prob * length))


def _uniform_ranks(maskable_BL: torch.Tensor, words_BL: torch.Tensor) -> torch.Tensor:
    """Rank the maskable positions in random order; the others rank last."""
    position_L = torch.arange(words_BL.shape[1], device=words_BL.device)
    # The position in the low bits breaks ties, so that the order is the same on every device.
    ticket_BL = torch.where(maskable_BL, (words_BL << 20) | position_L, _NEVER | position_L)
    ranks_BL = ticket_BL.argsort(dim=1).argsort(dim=1)
    return torch.where(maskable_BL, ranks_BL, _NEVER)


def _windowed_ranks(maskable_BL: torch.Tensor, words_BL: torch.Tensor, window: int) -> torch.Tensor:
    """Rank one maskable position a window by the window's place; the others rank last."""
    ordinal_BL = maskable_BL.long().cumsum(1) - 1
    window_BL = ordinal_BL.clamp(min=0) // window
    count_B1 = maskable_BL.long().sum(1, keepdim=True)
    # The winner of a window is fixed by the word of the window's first slot, not by its members.
    size_BL = (count_B1 - window_BL * window).clamp(max=window)
    word_BL = words_BL.gather(1, window_BL)
    winner_BL = (word_BL * size_BL) >> 32
    wins_BL = maskable_BL & (ordinal_BL - window_BL * window == winner_BL)
    return torch.where(wins_BL, window_BL, _NEVER)


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
    masks_BL = torch.full_like(input_ids_BL, vocabulary.mask_id)
    if objective.mask_token_prob == 1.0:
        return masks_BL
    length, text_ids = input_ids_BL.shape[1], vocabulary.text_ids
    fate_BL = position_words(length, sample_words_B2, keys.replacement)
    last_mask = round(objective.mask_token_prob * 2**32)
    last_random = round((objective.mask_token_prob + objective.random_token_prob) * 2**32)
    token_words_BL = position_words(length, sample_words_B2, keys.random_token)
    random_BL = text_ids.start + ((token_words_BL * len(text_ids)) >> 32)
    others_BL = torch.where(fate_BL < last_random, random_BL, input_ids_BL)
    return torch.where(fate_BL < last_mask, masks_BL, others_BL)


def _gather_slots(
    input_ids_BL: torch.Tensor, chosen_BL: torch.Tensor, hidden_BL: torch.Tensor, num_slots: int
) -> MaskedBatch:
    """List the chosen positions in ascending order in a fixed number of slots."""
    length = input_ids_BL.shape[1]
    position_L = torch.arange(length, device=input_ids_BL.device)
    sorted_BL = torch.where(chosen_BL, position_L, length + position_L).sort(dim=1).values
    listed_BK = sorted_BL[:, :num_slots]
    valid_BK = listed_BK < length
    positions_BK = torch.where(valid_BK, listed_BK, 0)
    return MaskedBatch(
        masked_ids_BL=torch.where(chosen_BL, hidden_BL, input_ids_BL),
        positions_BK=positions_BK,
        valid_BK=valid_BK,
        targets_BK=input_ids_BL.gather(1, positions_BK),
    )
