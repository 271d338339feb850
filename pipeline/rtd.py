"""Replaced token detection: draws from the generator, corrupted inputs and labels.

The generator's prediction at each masked slot is replaced by a draw from its softmax
(arXiv:2111.09543, section 3.1; ELECTRA, arXiv:2003.10555, section 2). The draw is a Gumbel-argmax
whose noise is a function of (seed, epoch, sample, position, vocabulary id): equal logits give equal
draws on any rank, and rounding of the logits moves a draw only where two candidates tie.

Letters: B sequences, L sequence length, K masked slots per sequence, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.counter_rng import Key, philox_bits


@dataclass(frozen=True)
class DrawKey:
    """What the draws of one micro batch depend on."""

    key: Key
    """The stream: two words."""
    sample_words_B2: torch.Tensor
    """int64 [B, 2]: epoch and index of every sample (`counter_rng.sample_words`)."""
    temperature: float = 1.0
    """Logits are multiplied by its reciprocal before the draw."""
    allowed_ids: range | None = None
    """Consecutive ids among which the draw is made; None allows all."""


class CorruptedBatch(NamedTuple):
    """What the discriminator reads."""

    input_ids_BL: torch.Tensor
    """int64 [B, L]: the original tokens with the draws in the masked slots."""
    is_replaced_BL: torch.Tensor
    """bool [B, L]: True where a draw differs from the original token."""


def gumbel_noise(
    sample_words_B2: torch.Tensor, positions_BK: torch.Tensor, first_id: int, num_ids: int, key: Key
) -> torch.Tensor:
    """Evaluate the noise of a run of vocabulary ids at the masked slots.

    Args:
        sample_words_B2: int64 [B, 2], the identities of the samples.
        positions_BK: int64 [B, K], positions of the slots in their sequences.
        first_id: First vocabulary id, a multiple of 4.
        num_ids: How many ids.
        key: The stream.

    Returns:
        fp32 [B, K, num_ids] of standard Gumbel noise, at most 22.9 (a word resolves 2^-32).

    Raises:
        ValueError: `first_id` is not a multiple of 4.
    """
    if first_id % 4:
        raise ValueError(f"first_id {first_id} is not a multiple of 4")
    quads = torch.arange(first_id // 4, (first_id + num_ids + 3) // 4, device=positions_BK.device)[
        None, None, :
    ]
    first, second = (word[:, None, None] for word in sample_words_B2.unbind(1))
    bits = philox_bits((quads, positions_BK[:, :, None], first, second), key)
    u_BKQ4 = torch.empty((*bits[0].shape, 4), device=positions_BK.device)
    for lane, each in enumerate(bits):
        u_BKQ4[..., lane] = each.view(torch.uint32)
    # -u of u = (word + 1/2) / 2^32, in one pass: scaling by 2^-32 rounds nothing.
    half = torch.full((), -(2.0**-33), device=positions_BK.device)
    minus_u = torch.add(half, u_BKQ4.flatten(2)[:, :, :num_ids], alpha=-(2.0**-32))
    # log1p keeps the upper tail exact; a word that rounds to u = 1 gives -inf, which never wins.
    return minus_u.log1p_().neg_().log_().neg_()


def corrupt(
    input_ids_BL: torch.Tensor,
    positions_BK: torch.Tensor,
    valid_BK: torch.Tensor,
    drawn_BK: torch.Tensor,
) -> CorruptedBatch:
    """Put the draws in place and label what they changed.

    A draw that happens to equal the original token counts as original, as in ELECTRA and in the
    released code (`rtd_task.py`, make_electra_data).

    Args:
        input_ids_BL: int64 [B, L], the original tokens.
        positions_BK: int64 [B, K], positions of the slots, ascending where valid.
        valid_BK: bool [B, K], False for the padding slots of short sequences, which come last.
        drawn_BK: int64 [B, K], the generator's draws.

    Returns:
        The corrupted ids and the labels.
    """
    length = input_ids_BL.shape[1]
    position_BL = torch.arange(length, device=input_ids_BL.device).expand_as(input_ids_BL)
    # Each position looks for its slot: a scatter has no fast deterministic kernel on CUDA.
    slots_BK = torch.where(valid_BK, positions_BK, length)
    slot_BL = torch.searchsorted(slots_BK, position_BL.contiguous()).clamp(
        max=slots_BK.shape[1] - 1
    )
    is_drawn_BL = slots_BK.gather(1, slot_BL) == position_BL
    corrupted_BL = torch.where(is_drawn_BL, drawn_BK.gather(1, slot_BL), input_ids_BL)
    return CorruptedBatch(corrupted_BL, corrupted_BL != input_ids_BL)
