"""Held-out figures of both networks: the same sequences, masks and draws at every evaluation.

The figures are those of training (losses without lambda, accuracies on replaced and on original
tokens) without dropout, and the area under the discriminator's ROC curve: 0.5 for one that cannot
tell, whatever the share of replaced tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data import SequenceStream, heldout_batches
from pipeline.metrics import StepSums, ratios
from pipeline.rtd import corrupt
from pipeline.runtime import World
from pipeline.step import ObjectiveKeys

_BINS = 8192
_LOGIT_RANGE = 16.0


class RocHistogram:
    """Area under the ROC curve from binned logits, so that ranks add counts and not lists."""

    def __init__(self, device: torch.device) -> None:
        """Start empty.

        Args:
            device: Where the logits live.
        """
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64, device=device)

    def add(
        self, logits_BL: torch.Tensor, is_replaced_BL: torch.Tensor, is_token_BL: torch.Tensor
    ) -> None:
        """Count a batch.

        Args:
            logits_BL: fp32 [B, L].
            is_replaced_BL: bool [B, L].
            is_token_BL: bool [B, L], False on padding.
        """
        scaled = (logits_BL + _LOGIT_RANGE) * (_BINS / (2 * _LOGIT_RANGE))
        bins_BL = scaled.long().clamp(0, _BINS - 1)
        for row, chosen in enumerate((is_token_BL & ~is_replaced_BL, is_token_BL & is_replaced_BL)):
            self.counts[row] += torch.bincount(bins_BL[chosen], minlength=_BINS)

    def area(self) -> float | None:
        """Add over all ranks and integrate; a collective.

        Returns:
            Probability that a replaced token scores above an original one (ties count half), or
            None where one of the kinds is absent.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.counts)
        original, replaced = self.counts.double().cpu()
        if not original.sum() or not replaced.sum():
            return None
        below = original.cumsum(0) - original / 2
        return float((replaced * below).sum() / (original.sum() * replaced.sum()))


@torch.no_grad()
def evaluate_heldout(
    generator: Callable[..., Any],
    token_embeddings: Callable[[torch.Tensor], torch.Tensor],
    discriminator: Callable[..., Any],
    *,
    stream: SequenceStream,
    keys: ObjectiveKeys,
    max_sequences: int,
    batch_size: int,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluate both networks on the held-out split; a collective.

    Args:
        generator: The generator or its engine, in evaluation mode.
        token_embeddings: E_G's lookup.
        discriminator: The discriminator or its engine, in evaluation mode.
        stream: The held-out split.
        keys: Masks and draws of the held-out split.
        max_sequences: How many sequences all ranks read together.
        batch_size: Sequences in one forward pass.
        world: This process's place.
        should_stop: Asked before every batch, with the same answer on all ranks.

    Returns:
        The `eval/*` figures, or None where evaluation was stopped.
    """
    sums, roc = StepSums(world.device), RocHistogram(world.device)
    for host_batch, is_real in heldout_batches(
        stream, max_sequences, batch_size, world.world_size, world.rank
    ):
        if should_stop():
            return None
        batch = host_batch.to(world.device)
        slots, mask_BL = keys.mask(batch), batch.attention_mask()
        mlm = generator(
            slots.masked_ids_BL,
            mask_BL,
            slots.positions_BK,
            slots.valid_BK,
            slots.targets_BK,
            keys.draw(batch),
            None,
        )
        ids_BL, is_replaced_BL = corrupt(
            batch.input_ids_BL, slots.positions_BK, slots.valid_BK, mlm.drawn_BK
        )
        rtd = discriminator(ids_BL, token_embeddings(ids_BL), mask_BL, is_replaced_BL.float(), None)
        if is_real:
            is_token_BL = torch.ones_like(is_replaced_BL) if mask_BL is None else mask_BL
            sums.add(
                mlm_loss_sum=mlm.loss_sum,
                mlm_correct=mlm.correct_sum,
                masked_tokens=slots.valid_BK.sum(),
                rtd_loss_sum=rtd.loss_sum,
            )
            sums.add_discriminator(rtd.logits_BL, is_replaced_BL, is_token_BL)
            roc.add(rtd.logits_BL, is_replaced_BL, is_token_BL)
    figures = ratios(sums.reduce(), "eval")
    area = roc.area()
    return figures if area is None else {**figures, "eval/rtd_auc": area}
