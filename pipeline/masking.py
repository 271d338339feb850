"""Which positions the generator must predict: functions of (seed, sequence length, epoch, sample).

Every selected token becomes [MASK] (no 80/10/10 split in replaced token detection). Two laws:

    uniform   exactly round(mask_prob * length) of the maskable positions, each subset alike
    windowed  the released code's law (`mlm_task.py`, NGramMaskGenerator with n-grams of 1): one
              token in every window of int(1 / mask_prob) maskable tokens, left to right, until the
              count above is reached; the tail that is left over is never masked

Letters: B sequences, L sequence length, K masked slots per sequence.
"""

from typing import NamedTuple

import torch

from pipeline.counter_rng import Key, position_words

_NEVER = 1 << 62


class MaskedBatch(NamedTuple):
    """A micro batch with its masked slots; shapes do not depend on the data."""

    masked_ids_BL: torch.Tensor
    """int64 [B, L]: the tokens with [MASK] in the chosen slots."""
    positions_BK: torch.Tensor
    """int64 [B, K]: the slots in ascending order, then zeros where `valid_BK` is False."""
    valid_BK: torch.Tensor
    """bool [B, K]: False for the slots that a short sequence does not have."""
    targets_BK: torch.Tensor
    """int64 [B, K]: the original tokens of the slots."""


def num_masked_slots(sequence_length: int, mask_prob: float) -> int:
    """Count the slots of a full sequence: round(mask_prob * L), at least one.

    Args:
        sequence_length: Tokens, [CLS] and [SEP] included.
        mask_prob: Share to predict.

    Returns:
        K; 77 for 512 tokens at 0.15.
    """
    return max(1, round(mask_prob * sequence_length))


def choose_masks(
    input_ids_BL: torch.Tensor,
    lengths_B: torch.Tensor,
    sample_words_B2: torch.Tensor,
    *,
    key: Key,
    mask_prob: float,
    law: str,
    special_ids: tuple[int, ...],
    mask_id: int,
) -> MaskedBatch:
    """Choose the slots of a micro batch.

    Args:
        input_ids_BL: int64 [B, L], tokens, padded behind each sequence's length.
        lengths_B: int64 [B], tokens of each sequence, [CLS] and [SEP] included.
        sample_words_B2: int64 [B, 2], the identities of the samples.
        key: The stream of masks for this sequence length.
        mask_prob: Share to predict.
        law: "uniform" or "windowed".
        special_ids: Ids that are never masked.
        mask_id: Id of [MASK].

    Returns:
        The masked batch, K slots wide.
    """
    length = input_ids_BL.shape[1]
    num_slots = num_masked_slots(length, mask_prob)
    maskable_BL = torch.arange(length, device=input_ids_BL.device)[None, :] < lengths_B[:, None]
    for special in special_ids:
        maskable_BL = maskable_BL & (input_ids_BL != special)
    quota_B = (lengths_B.double() * mask_prob).round().long().clamp(min=1, max=num_slots)
    words_BL = position_words(length, sample_words_B2, key)
    if law == "windowed":
        ranks_BL = _windowed_ranks(maskable_BL, words_BL, window=int(1 / mask_prob))
    else:
        ranks_BL = _uniform_ranks(maskable_BL, words_BL)
    chosen_BL = ranks_BL < quota_B[:, None]
    return _gather_slots(input_ids_BL, chosen_BL, num_slots, mask_id)


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


def _gather_slots(
    input_ids_BL: torch.Tensor, chosen_BL: torch.Tensor, num_slots: int, mask_id: int
) -> MaskedBatch:
    """List the chosen positions in ascending order in a fixed number of slots."""
    length = input_ids_BL.shape[1]
    position_L = torch.arange(length, device=input_ids_BL.device)
    sorted_BL = torch.where(chosen_BL, position_L, length + position_L).sort(dim=1).values
    listed_BK = sorted_BL[:, :num_slots]
    valid_BK = listed_BK < length
    positions_BK = torch.where(valid_BK, listed_BK, 0)
    return MaskedBatch(
        masked_ids_BL=input_ids_BL.masked_fill(chosen_BL, mask_id),
        positions_BK=positions_BK,
        valid_BK=valid_BK,
        targets_BK=input_ids_BL.gather(1, positions_BK),
    )
