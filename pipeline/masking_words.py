"""Which words are masked: whole words and n-grams of words, under both masking laws.

Only a sequence's maskable tokens count; the words are those runs of them that `word_starts_BL`
divides, so that a word may go on behind a special token, as in the release. Two laws:

    uniform   the words are divided into n-grams, left to right, with p(n) ~ 1/n; the n-grams are
              taken in random order until the quota of tokens is reached; one that would overshoot
              is skipped (whole word masking of BERT)
    windowed  the released code's (`mlm_task.py`, NGramMaskGenerator): n with p(n) ~ 1/n, a window
              of n int(1 / mask_prob) words, n words of it from a uniform start; the next window
              follows both; it ends with the word that reaches the quota, which may overshoot

The loops of the original depend on what they drew before. Here a draw belongs to the word at which
it happens, so that all are made at once, and the places that the loop would visit are followed by
doubling: log2(L) steps, no reading back to the host, shapes that do not depend on the data.

Letters: B sequences, L sequence length; W words, G n-grams of a sequence (both padded to L).
"""

import torch
from torch.nn import functional as F

MAX_WORD_PIECES = 8
"""Pieces of the longest run that is sure to be masked as one word. In the embedded English corpus
0.007 % of the words have more with a vocabulary of 4,000 pieces, 0.0004 % with 8,000."""

_NEVER = 1 << 62


def choose_words(
    maskable_BL: torch.Tensor,
    word_starts_BL: torch.Tensor,
    quota_B: torch.Tensor,
    place_words_BL: torch.Tensor,
    ngram_words_BL: torch.Tensor,
    *,
    law: str,
    window: int,
    max_ngram: int,
) -> torch.Tensor:
    """Choose the tokens of whole words.

    Args:
        maskable_BL: bool [B, L].
        word_starts_BL: bool [B, L]: the token begins a word.
        quota_B: int64 [B]: tokens to choose, at most L.
        place_words_BL: int64 [B, L] random words: the order of n-grams, or places in windows.
        ngram_words_BL: int64 [B, L] random words of another stream: sizes of n-grams.
        law: "uniform" or "windowed".
        window: Words for one masked word under "windowed".
        max_ngram: Largest n.

    Returns:
        bool [B, L]. "uniform": at most the quota, and less only where no n-gram fits into the rest;
        words of more than `MAX_WORD_PIECES` pieces (or than the quota) are taken in parts of that
        many, so that each position can be chosen. "windowed": the last word may overshoot.
    """
    starts_BL = _starts(maskable_BL, word_starts_BL)
    if law == "uniform":
        starts_BL = _divide_long_words(maskable_BL, starts_BL, quota_B)
    word_BL = (starts_BL.long().cumsum(1) - 1).clamp(min=0)
    num_words_B1 = starts_BL.long().sum(1, keepdim=True)
    before_BW = _tokens_before(maskable_BL, word_BL)
    sizes_BW = _ngram_sizes(ngram_words_BL, max_ngram)
    if law == "windowed":
        first_BG, end_BG = _windowed_runs(sizes_BW, num_words_B1, place_words_BL, window)
        is_chosen_BW = _cut_behind_quota(_covered(first_BG, end_BG, word_BL), before_BW, quota_B)
        return is_chosen_BW.gather(1, word_BL) & maskable_BL
    bounds_BG = _consecutive(sizes_BW, num_words_B1)
    tokens_BG = before_BW.gather(1, bounds_BG).diff(dim=1)
    is_chosen_BG = _take_in_random_order(tokens_BG, quota_B, place_words_BL)
    ngram_BL = torch.searchsorted(bounds_BG, word_BL, right=True) - 1
    # A sequence without words has no n-gram either; any index serves, for nothing is maskable.
    return is_chosen_BG.gather(1, ngram_BL.clamp(max=tokens_BG.shape[1] - 1)) & maskable_BL


def _starts(maskable_BL: torch.Tensor, word_starts_BL: torch.Tensor) -> torch.Tensor:
    """Mark the maskable tokens that begin a word; the first always does."""
    is_first_BL = maskable_BL.long().cumsum(1) == 1
    return maskable_BL & (word_starts_BL | is_first_BL)


def _divide_long_words(
    maskable_BL: torch.Tensor, starts_BL: torch.Tensor, quota_B: torch.Tensor
) -> torch.Tensor:
    """Let a word begin anew where it would have too many pieces to be chosen."""
    ordinal_BL = maskable_BL.long().cumsum(1)
    piece_BL = ordinal_BL - torch.where(starts_BL, ordinal_BL, 0).cummax(1).values
    limit_B1 = quota_B.clamp(max=MAX_WORD_PIECES)[:, None]
    return maskable_BL & (piece_BL % limit_B1 == 0)


def _tokens_before(maskable_BL: torch.Tensor, word_BL: torch.Tensor) -> torch.Tensor:
    """Count the maskable tokens in front of each word, [B, L + 1]; all of them behind the last."""
    batch, length = word_BL.shape
    ordinal_BW = torch.arange(length + 1, device=word_BL.device).expand(batch, -1).contiguous()
    first_BW = torch.searchsorted(word_BL, ordinal_BW)
    counts = F.pad(maskable_BL.long().cumsum(1), (1, 0))
    return counts.gather(1, first_BW)


def _ngram_sizes(words_BL: torch.Tensor, max_ngram: int) -> torch.Tensor:
    """Turn random words into sizes n = 1..max_ngram with p(n) ~ 1/n."""
    weights = [1.0 / n for n in range(1, max_ngram + 1)]
    sizes_BL = torch.ones_like(words_BL)
    for n in range(1, max_ngram):
        sizes_BL += words_BL >= round(sum(weights[:n]) / sum(weights) * 2**32)
    return sizes_BL


def _visited(next_BW: torch.Tensor, count: int) -> torch.Tensor:
    """List where a walk from 0 comes: 0, next(0), next(next(0)), ..., [B, count]."""
    places_BN, jump_BW = torch.zeros_like(next_BW[:, :1]), next_BW
    while places_BN.shape[1] < count:
        places_BN = torch.cat([places_BN, jump_BW.gather(1, places_BN)], dim=1)
        jump_BW = jump_BW.gather(1, jump_BW)
    return places_BN[:, :count].contiguous()


def _windowed_runs(
    sizes_BW: torch.Tensor, num_words_B1: torch.Tensor, place_words_BL: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the first word, and the one behind the last, of the n-gram in each window."""
    length = sizes_BW.shape[1]
    offset_W = torch.arange(length, device=sizes_BW.device)
    context_BW = torch.minimum(sizes_BW * window, num_words_B1 - offset_W).clamp(min=0)
    first_BW = offset_W + ((place_words_BL * context_BW) >> 32)
    end_BW = torch.minimum(first_BW + sizes_BW, num_words_B1)
    next_BW = torch.maximum(offset_W + context_BW, end_BW)
    # Behind the last word the walk stays where it is, and its runs are empty.
    is_over_BW = offset_W >= num_words_B1
    first_BW, end_BW, next_BW = (
        F.pad(torch.where(is_over_BW, offset_W, each_BW), (0, 1), value=length)
        for each_BW in (first_BW, end_BW, next_BW)
    )
    visited_BN = _visited(next_BW, -(-length // window))
    return first_BW.gather(1, visited_BN), end_BW.gather(1, visited_BN)


def _covered(first_BG: torch.Tensor, end_BG: torch.Tensor, word_BL: torch.Tensor) -> torch.Tensor:
    """Mark the words inside of ascending runs [first, end), [B, L]."""
    ordinal_W = torch.arange(word_BL.shape[1], device=word_BL.device)
    ordinal_BW = ordinal_W.expand(word_BL.shape[0], -1).contiguous()
    begun_BW = torch.searchsorted(first_BG, ordinal_BW, right=True)
    return begun_BW > torch.searchsorted(end_BG, ordinal_BW, right=True)


def _cut_behind_quota(
    is_chosen_BW: torch.Tensor, before_BW: torch.Tensor, quota_B: torch.Tensor
) -> torch.Tensor:
    """Drop the chosen words that come after the one that reaches the quota."""
    chosen_tokens_BW = torch.where(is_chosen_BW, before_BW.diff(dim=1), 0)
    return is_chosen_BW & (chosen_tokens_BW.cumsum(1) - chosen_tokens_BW < quota_B[:, None])


def _consecutive(sizes_BW: torch.Tensor, num_words_B1: torch.Tensor) -> torch.Tensor:
    """Divide the words into n-grams that follow each other; their bounds, [B, L + 1]."""
    length = sizes_BW.shape[1]
    ordinal_W = torch.arange(length, device=sizes_BW.device)
    next_BW = torch.minimum(ordinal_W + sizes_BW, num_words_B1)
    return _visited(F.pad(next_BW, (0, 1), value=length), length + 1)


def _take_in_random_order(
    tokens_BG: torch.Tensor, quota_B: torch.Tensor, words_BL: torch.Tensor
) -> torch.Tensor:
    """Take n-grams in the order of their random words, each that still fits into the quota."""
    ordinal_G = torch.arange(tokens_BG.shape[1], device=tokens_BG.device)
    # The ordinal in the low bits breaks ties, so that the order is the same on every device.
    ticket_BG = torch.where(tokens_BG > 0, (words_BL << 20) | ordinal_G, _NEVER | ordinal_G)
    order_BG = ticket_BG.argsort(dim=1)
    is_taken_BG = _first_fit(tokens_BG.gather(1, order_BG), quota_B)
    return is_taken_BG.gather(1, order_BG.argsort(dim=1))


def _first_fit(sizes_BG: torch.Tensor, quota_B: torch.Tensor) -> torch.Tensor:
    """Go through sizes in order and take each that the rest of the quota has room for.

    A round ends with the first item by which at least half of the room is filled: before it come
    items of at most half the room, which all fit, and larger ones, which then did not. The rounds
    are therefore as many as the sequence length has bits.
    """
    room_B1, place_G = quota_B[:, None], torch.arange(sizes_BG.shape[1], device=sizes_BG.device)
    is_taken_BG = torch.zeros_like(sizes_BG, dtype=torch.bool)
    is_left_BG = sizes_BG > 0
    for _ in range(sizes_BG.shape[1].bit_length()):
        is_small_BG = is_left_BG & (2 * sizes_BG <= room_B1)
        small_BG = torch.where(is_small_BG, sizes_BG, 0)
        filled_BG = small_BG.cumsum(1) - small_BG + sizes_BG
        is_big_BG = is_left_BG & ~is_small_BG & (filled_BG <= room_B1)
        ends_BG = is_big_BG | (is_small_BG & (2 * filled_BG >= room_B1))
        end_B1 = torch.where(ends_BG, place_G, sizes_BG.shape[1]).amin(1, keepdim=True)
        taken_BG = (is_small_BG & (place_G < end_B1)) | (ends_BG & (place_G == end_B1))
        room_B1 = room_B1 - torch.where(taken_BG, sizes_BG, 0).sum(1, keepdim=True)
        is_taken_BG |= taken_BG
        is_left_BG = is_left_BG & (place_G > end_B1)
    return is_taken_BG
