"""Training's numbers: summed on the device, reduced once a step, written once an interval.

    1. A step adds its sums (losses, hits, counts) to one fp64 vector on the device.
    2. `StepSums.reduce` adds the vectors of all ranks; every rank then holds the same totals. They
       come to the host with what the step's last update reads there anyway.
    3. `IntervalSums` accumulates totals until a row is due; a commit carries what is accumulated,
       so that a resumed run writes the same row.
    4. `pipeline.metrics_writer` writes a row under the same names everywhere.

A logged loss is global sum / global count over the interval, without lambda.
"""

import torch
import torch.distributed as dist

from pipeline.modeling.networks import RtdOutput
from pipeline.modeling.vocabulary_head import MlmOutput

FIELDS = (
    "mlm_loss_sum",
    "mlm_correct",
    "masked_tokens",
    "rtd_loss_sum",
    "rtd_correct_replaced",
    "replaced_tokens",
    "rtd_correct_original",
    "original_tokens",
    "tokens",
)
_INDEX = {name: position for position, name in enumerate(FIELDS)}


class StepSums:
    """Sums of one optimizer step, on the device; nothing here waits for it.

    Attributes:
        totals: What `reduce` returned, on the host; there once the step's last update has read it.
    """

    totals: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        """Start from zero.

        Args:
            device: Where the losses live.
        """
        self.vector = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)

    def add(self, **sums: torch.Tensor) -> None:
        """Add scalars under their names.

        Args:
            **sums: 0-dimensional tensors by field name.
        """
        for name, value in sums.items():
            self.vector[_INDEX[name]] += value.detach().double()

    def add_generator(self, output: MlmOutput, valid_BK: torch.Tensor) -> None:
        """Count the loss and the hits of masked language modelling.

        Args:
            output: What the generator reported.
            valid_BK: bool [B, K], False for slots that a short sequence does not have.
        """
        self.add(
            mlm_loss_sum=output.loss_sum,
            mlm_correct=output.correct_sum,
            masked_tokens=valid_BK.sum(),
        )

    def add_discriminator(
        self,
        output: RtdOutput,
        is_replaced_BL: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
    ) -> None:
        """Count the discriminator's loss, and its hits on replaced and on original tokens.

        Args:
            output: What it reported; a positive logit means "replaced".
            is_replaced_BL: bool [B, L].
            attention_mask_BL: bool [B, L], False on padding; None where there is none.
        """
        is_token_BL = (
            torch.ones_like(is_replaced_BL) if attention_mask_BL is None else attention_mask_BL
        )
        says_replaced_BL = output.logits_BL > 0
        original_BL = is_token_BL & ~is_replaced_BL
        self.add(
            rtd_loss_sum=output.loss_sum,
            rtd_correct_replaced=(says_replaced_BL & is_replaced_BL).sum(),
            replaced_tokens=is_replaced_BL.sum(),
            rtd_correct_original=(~says_replaced_BL & original_BL).sum(),
            original_tokens=original_BL.sum(),
            tokens=is_token_BL.sum(),
        )

    def reduce(self) -> torch.Tensor:
        """Add over all ranks.

        Returns:
            fp64 vector in the order of FIELDS, on the device.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.vector)
        return self.vector


def ratios(vector: torch.Tensor, prefix: str) -> dict[str, float]:
    """Turn global sums into the figures that people read.

    Args:
        vector: fp64 vector in the order of FIELDS.
        prefix: "train" or "eval".

    Returns:
        name -> value; a ratio over nothing is left out.
    """
    sums: dict[str, float] = dict(zip(FIELDS, vector.tolist(), strict=True))
    pairs = {
        "mlm_loss": ("mlm_loss_sum", "masked_tokens"),
        "mlm_accuracy": ("mlm_correct", "masked_tokens"),
        "rtd_loss": ("rtd_loss_sum", "tokens"),
        "rtd_accuracy_replaced": ("rtd_correct_replaced", "replaced_tokens"),
        "rtd_accuracy_original": ("rtd_correct_original", "original_tokens"),
        "replaced_fraction": ("replaced_tokens", "tokens"),
    }
    return {
        f"{prefix}/{name}": sums[above] / sums[below]
        for name, (above, below) in pairs.items()
        if sums[below] > 0
    }


class IntervalSums:
    """Global sums since the last row, on the host; equal on all ranks and part of every commit."""

    def __init__(self) -> None:
        """Start from zero."""
        self.vector = torch.zeros(len(FIELDS), dtype=torch.float64)

    def add(self, totals: torch.Tensor) -> None:
        """Add a step's global sums.

        Args:
            totals: `StepSums.totals`.
        """
        self.vector += totals

    def take(self) -> dict[str, float]:
        """Read the figures of the interval and start the next one.

        Returns:
            The `train/*` figures.
        """
        figures = ratios(self.vector, "train")
        self.vector.zero_()
        return figures

    def state(self) -> list[str]:
        """Serialise exactly.

        Returns:
            One hexadecimal float a field.
        """
        return [value.hex() for value in self.vector.tolist()]

    def load_state(self, state: list[str]) -> None:
        """Continue from a commit.

        Args:
            state: What `state` returned.
        """
        self.vector.copy_(torch.tensor([float.fromhex(v) for v in state], dtype=torch.float64))
