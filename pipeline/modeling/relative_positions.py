"""Relative positions: from the distance of two tokens to a row of the relative table.

Distances up to a quarter of the table have a row each; farther ones share rows in logarithmic
buckets, which end at `max_relative_positions - 1`. Beyond that there are two rules:

    clamp          a farther distance counts as the last one, as in the released code; no pair
                   reads row 0
    transformers   the logarithm goes on and the row is clamped to the table; every key that is
                   farther ahead reads row 0, which shorter sequences never train

Letters: B sequences, L sequence length, Q query rows, E = 2 L distances.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

RelativePositionRule = Literal["clamp", "transformers"]


def relative_bucket(
    distance: torch.Tensor,
    position_buckets: int,
    max_position: int,
    rule: RelativePositionRule = "clamp",
) -> torch.Tensor:
    """Bucket signed distances: exact up to half of `position_buckets`, then logarithmic.

    With mid = position_buckets / 2, a distance n > mid falls into bucket
    mid + ceil(ln(n / mid) / ln((max_position - 1) / mid) * (mid - 1)), with the sign kept.

    Args:
        distance: int64 tensor, position of the query minus position of the key.
        position_buckets: Buckets of one sign, 256 in every released model.
        max_position: The last distance with a bucket of its own, plus one.
        rule: What happens to farther distances.

    Returns:
        int64 CPU tensor of the same shape; within (-position_buckets, position_buckets) where the
        rule is "clamp".

    Source:
        `make_log_bucket_position` in the released code (`da_utils.py`); its version 0.1.12 has the
        rule of transformers.
    """
    middle = position_buckets // 2
    distance = distance.cpu()
    if rule == "clamp":
        distance = distance.clamp(1 - max_position, max_position - 1)
    magnitude = distance.abs()
    if max_position - 1 <= middle:
        return distance
    # fp32 on the host whatever the device: a ceiling amplifies the last bit of a logarithm, and
    # exported weights are read by transformers, which computes it this way.
    span = torch.log(torch.tensor((max_position - 1) / middle))
    ratio = torch.log(magnitude.clamp(min=middle) / middle) / span
    logarithmic = (torch.ceil(ratio * (middle - 1)) + middle).long()
    return torch.where(magnitude <= middle, distance, logarithmic * distance.sign())


@dataclass(frozen=True)
class RelativePositions:
    """Which row of the relative table a query and a key meet in."""

    query_rows_E: torch.Tensor
    """int64 [2 L]: table row where key position - query position = e - (L - 1)."""
    key_rows_E: torch.Tensor
    """int64 [2 L]: table row where query position - key position = e - (L - 1)."""
    positions_BQ: torch.Tensor | None = None
    """int64 [B, Q]: positions of the query rows; None where the queries are all L positions."""

    def at(self, positions_BQ: torch.Tensor) -> "RelativePositions":
        """Restrict the queries to some positions.

        Args:
            positions_BQ: int64 [B, Q], positions within the sequence.

        Returns:
            The same geometry for these query rows.
        """
        return replace(self, positions_BQ=positions_BQ)

    def index(self) -> torch.Tensor:
        """Look up the table row of every pair.

        Returns:
            int64 [1, L, L], or [B, Q, L] for selected queries: row of position(q) - position(k).
        """
        length = self.key_rows_E.shape[0] // 2
        key_L = torch.arange(length, device=self.key_rows_E.device)
        query_BQ = key_L[None, :] if self.positions_BQ is None else self.positions_BQ
        return self.key_rows_E[query_BQ[:, :, None] - key_L + (length - 1)]


@functools.lru_cache(maxsize=32)
def relative_positions(
    length: int,
    position_buckets: int,
    max_position: int,
    device: torch.device,
    rule: RelativePositionRule = "clamp",
) -> RelativePositions:
    """Build the geometry of a sequence length, once for each device.

    Args:
        length: Tokens in a sequence, L.
        position_buckets: Buckets of one sign; the table has twice as many rows.
        max_position: The last distance with a bucket of its own, plus one.
        device: Where the scores are computed.
        rule: What happens to farther distances.

    Returns:
        The geometry with every position as a query.
    """
    # Evaluation may build it first: an inference tensor could not be saved for a backward pass.
    with torch.inference_mode(False):
        distance_E = torch.arange(2 * length) - (length - 1)
        last_row = 2 * position_buckets - 1
        ascending_E, descending_E = (
            (relative_bucket(d, position_buckets, max_position, rule) + position_buckets)
            .clamp(0, last_row)
            .to(device)
            for d in (distance_E, -distance_E)
        )
    return RelativePositions(query_rows_E=descending_E, key_rows_E=ascending_E)
