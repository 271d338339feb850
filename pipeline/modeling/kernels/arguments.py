"""What the launcher hands to the kernels: groups of pointers and numbers, and the kind of kernel.

Triton passes a named tuple's fields one by one; a `Form` is part of the compiled kernel's name.

Letters: H heads, T tokens of all sequences, L longest sequence, R rows of the relative table,
C columns of the products with it, d head size; in the vocabulary head N masked slots, B sequences.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Rows(NamedTuple):
    """A tensor [H, T, d] or [H, R, d] whose last dimension is contiguous."""

    pointer: torch.Tensor
    stride_h: int
    stride_t: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Rows":
        """Take a tensor apart; see the class."""
        return cls(tensor, tensor.stride(0), tensor.stride(1))


class Extent(NamedTuple):
    """Where the sequences lie: L tokens each, or packed end to end."""

    starts: torch.Tensor
    """int32 [sequences + 1], first tokens and the end; read in packed kernels only."""
    num_tokens: int


class PositionTerms(NamedTuple):
    """Products of queries and keys with the relative table; read where there is one."""

    by_query: torch.Tensor
    """[H, T, C]: query rows times the table's key projection."""
    by_key: torch.Tensor
    """[H, T, C]: key rows times the table's query projection."""
    table_rows: torch.Tensor
    """int16 [2, 2 L]: rows of the table where key - query, and query - key, is e - (L - 1)."""


class Drop(NamedTuple):
    """A dropout site; read where there is dropout."""

    words_2: torch.Tensor
    """int64 [2], the key."""
    layer: int
    where: int
    first_head: int
    """Number of the launch's first head in the mask."""
    threshold: int
    """round(65536 p)."""
    keep_scale: float
    """1 / (1 - p)."""


class Sums(NamedTuple):
    """What the vocabulary head carries from chunk to chunk: contiguous [N], updated in place."""

    maximum: torch.Tensor
    """fp32."""
    total: torch.Tensor
    """fp32: sum of exponentials relative to the maximum."""
    target_logit: torch.Tensor
    """fp32."""
    best_id: torch.Tensor
    """int64: id of the maximum, the lowest at a tie."""
    best_score: torch.Tensor
    """fp32: highest logit / temperature + noise among the ids that may be drawn."""
    drawn_id: torch.Tensor
    """int64: its id, the lowest at a tie."""


class Noise(NamedTuple):
    """What the noise of draws depends on; read where there are draws."""

    key: torch.Tensor
    """int64 [2], the stream."""
    sample_words: torch.Tensor
    """int64 [B, 2], contiguous: identities of the samples."""
    positions: torch.Tensor
    """int64 [N], contiguous: positions of the slots in their sequences."""
    slots: int
    """Slots of a sequence: N / B."""
    factor: float
    """1 / temperature."""
    start: int
    """First id that may be drawn."""
    stop: int
    """Id before which those end."""


@dataclass(frozen=True)
class Form:
    """What is decided when a kernel is compiled."""

    head_size: int
    max_length: int
    """L; fixed, like the next, so that addresses are constants."""
    num_columns: int
    """C, 0 where there is no table."""
    by_row: bool
    """Columns of the products are rows of the table, not distances."""
    has_mask: bool
    packed: bool
    drops: bool
    aligned: bool
    """L is a multiple of eight: an octet of dropout bits stays in its row."""
    wide: Any
    """Triton's dtype of sums: fp32, or fp64 for fp64 inputs."""
    precision: str
    """How products of fp32 are computed; half precision has one way."""
