"""Relative positions: from the distance of two tokens to a row of the relative table.

Distances up to a quarter of the table have a row each; farther ones share rows in logarithmic
buckets. A distance beyond `max_position_embeddings - 1` counts as that distance, as in the released
code (transformers does not clamp, and reads a row that is never trained).

Letters: B sequences, L sequence length, Q query rows, E = 2 L distances.
"""

import functools
from dataclasses import dataclass, replace

import torch


def relative_bucket(
    distance: torch.Tensor, position_buckets: int, max_position: int
) -> torch.Tensor:
    """Bucket signed distances: exact up to half of `position_buckets`, then logarithmic.

    With mid = position_buckets / 2, a distance n > mid falls into bucket
    mid + ceil(ln(n / mid) / ln((max_position - 1) / mid) * (mid - 1)), with the sign kept.

    Args:
        distance: int64 tensor, position of the query minus position of the key.
        position_buckets: Buckets of one sign, 256 in every released model.
        max_position: Distances are clamped to +-(max_position - 1).

    Returns:
        int64 CPU tensor of the same shape, within (-position_buckets, position_buckets).

    Source:
        `make_log_bucket_position` in the released code (`da_utils.py`).
    """
    middle = position_buckets // 2
    distance = distance.cpu().clamp(1 - max_position, max_position - 1)
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
    length: int, position_buckets: int, max_position: int, device: torch.device
) -> RelativePositions:
    """Build the geometry of a sequence length, once for each device.

    Args:
        length: Tokens in a sequence, L.
        position_buckets: Buckets of one sign; the table has twice as many rows.
        max_position: Distances are clamped to +-(max_position - 1).
        device: Where the scores are computed.

    Returns:
        The geometry with every position as a query.
    """
    # Evaluation may build it first: an inference tensor could not be saved for a backward pass.
    with torch.inference_mode(False):
        distance_E = torch.arange(2 * length) - (length - 1)
        last_row = 2 * position_buckets - 1
        ascending_E, descending_E = (
            (relative_bucket(d, position_buckets, max_position) + position_buckets)
            .clamp(0, last_row)
            .to(device)
            for d in (distance_E, -distance_E)
        )
    return RelativePositions(query_rows_E=descending_E, key_rows_E=ascending_E)
