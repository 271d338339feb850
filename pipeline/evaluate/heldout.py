"""Held-out figures of both networks: the same sequences, masks and draws at every evaluation.

The figures are those of training (losses without lambda, accuracies on replaced and on original
tokens) without dropout, and the area under the discriminator's ROC curve: 0.5 for one that cannot
tell, whatever the share of replaced tokens.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from pipeline.data import heldout_batches
from pipeline.masking import MaskedBatch
from pipeline.metrics import StepSums, ratios
from pipeline.modeling.pair import PairOutput
from pipeline.objective_keys import ObjectiveKeys
from pipeline.rtd import DrawKey
from pipeline.runtime import World
from pipeline.sample_order import Int64Array
from pipeline.sequences import SequenceBatch, SequenceStream

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
        self,
        logits_BL: torch.Tensor,
        is_replaced_BL: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
    ) -> None:
        """Count a batch.

        Args:
            logits_BL: fp32 [B, L].
            is_replaced_BL: bool [B, L].
            attention_mask_BL: bool [B, L], False on padding; None where there is none.
        """
        is_token_BL = (
            torch.ones_like(is_replaced_BL) if attention_mask_BL is None else attention_mask_BL
        )
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
    predict: Callable[[SequenceBatch, MaskedBatch, DrawKey | None], PairOutput],
    *,
    stream: SequenceStream,
    keys: ObjectiveKeys,
    chosen: Mapping[str, Int64Array],
    batch_size: int,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluate the networks on the held-out split; a collective.

    Args:
        predict: Computes both losses, in evaluation mode.
        stream: The held-out split.
        keys: Masks and draws of the held-out split.
        chosen: Source, or "" -> the sequences that all ranks read together, as
            `data.heldout_samples`.
        batch_size: Sequences in one forward pass.
        world: This process's place.
        should_stop: Asked before every batch, with the same answer on all ranks.

    Returns:
        The `eval/*` figures over all sequences, with those of each named source behind its name
        ("eval/mlm_loss/wiki"); None where evaluation was stopped.
    """
    roc = RocHistogram(world.device)
    total = StepSums(world.device).vector
    by_source: dict[str, float] = {}
    for source, samples in chosen.items():
        sums = StepSums(world.device)
        for host_batch, is_real in heldout_batches(
            stream, samples, batch_size, world.world_size, world.rank
        ):
            if should_stop():
                return None
            batch = host_batch.to(world.device)
            slots = keys.mask(batch)
            output = predict(batch, slots, keys.draw(batch))
            if is_real:
                _count(sums, roc, batch, slots, output)
        vector = sums.reduce()
        total += vector
        if source:
            named = ratios(vector, "eval").items()
            by_source |= {f"{figure}/{source}": value for figure, value in named}
    area = roc.area()
    auc = {} if area is None else {"eval/rtd_auc": area}
    return {**ratios(total, "eval"), **auc, **by_source}


def _count(
    sums: StepSums,
    roc: RocHistogram,
    batch: SequenceBatch,
    slots: MaskedBatch,
    output: PairOutput,
) -> None:
    mlm, rtd, corrupted = output
    sums.add_generator(mlm, slots.valid_BK)
    if rtd is not None and corrupted is not None:
        is_replaced_BL, mask_BL = corrupted.is_replaced_BL, batch.attention_mask()
        sums.add_discriminator(rtd, is_replaced_BL, mask_BL)
        roc.add(rtd.logits_BL, is_replaced_BL, mask_BL)
