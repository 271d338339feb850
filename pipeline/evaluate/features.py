"""Inputs of a model: token ids with what the kinds of tasks put beside them, and batches of them.

Letters: B examples, C choices, L sequence length, M marked places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.tokenizer import Tokenizer

IGNORED = -100
"""Label of what is not predicted."""


@dataclass(frozen=True, eq=False)
class Feature:
    """One input."""

    sequences: tuple[np.ndarray, ...]
    """Token ids, int32; one sequence, or one a choice."""
    labels: tuple[float, ...]
    """As the kind of the task has them; IGNORED where unknown."""
    example: int = 0
    """Number of its example, which may have several features."""
    marks: tuple[tuple[int, int], ...] = ()
    """Marked places, tokens [start, end)."""
    marked: tuple[int, ...] = ()
    """Number of the entity at each marked place, but the first, which is the gap."""
    offsets: np.ndarray | None = None
    """int32 [L, 2]: characters of each token in its text; (-1, -1) where no answer can be."""
    num_cut: int = 0
    """Texts, pairs or words that lost their end to the maximal length."""

    @property
    def input_ids(self) -> np.ndarray:
        """Token ids of the only sequence, int32 [L]."""
        return self.sequences[0]


@dataclass(frozen=True)
class Batch:
    """Padded features on a device."""

    input_ids: torch.Tensor
    """int64 [B, L], or [B, C, L] of choices."""
    mask: torch.Tensor
    """int64 as `input_ids`: 1 for tokens, 0 for padding."""
    labels: torch.Tensor
    """[B, K]: int64, for regression float32; IGNORED where unknown or padded."""
    marks_BM2: torch.Tensor | None
    """int64: marked places, (0, 0) where a feature has fewer."""


def make_sequence(tokenizer: Tokenizer, *parts: Sequence[int]) -> np.ndarray:
    """Build [CLS] part [SEP] part [SEP] ...

    Args:
        tokenizer: Knows the special ids.
        parts: Token ids.

    Returns:
        int32 [L].
    """
    ids = [tokenizer.cls_id]
    for part in parts:
        ids += (*part, tokenizer.sep_id)
    return np.array(ids, dtype=np.int32)


def cut_pair(
    first: Sequence[int], second: Sequence[int], room: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Cut two texts to a common length; the longer loses its end first.

    Args:
        first: Token ids.
        second: Token ids.
        room: Tokens for both.

    Returns:
        What is left of both.
    """
    if len(first) + len(second) <= room:
        return first, second
    kept = min(len(first), max(room - len(second), (room + 1) // 2))
    return first[:kept], second[: room - kept]


def batches(
    features: Sequence[Feature], batch_size: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Batch]:
    """Pad neighbours to the longest of each batch.

    Args:
        features: In the order in which they are needed.
        batch_size: Features in a batch.
        device: Where to put them.
        dtype: Of the labels.

    Yields:
        The batches.
    """
    for first in range(0, len(features), batch_size):
        yield collate(features[first : first + batch_size], device, dtype)


def collate(chosen: Sequence[Feature], device: torch.device, dtype: torch.dtype) -> Batch:
    """Pad features to one batch.

    Args:
        chosen: Features with the same number of sequences, or of choices.
        device: Where to put them.
        dtype: Of the labels.

    Returns:
        The batch.
    """
    num_choices = max(len(f.sequences) for f in chosen)
    length = max(len(ids) for f in chosen for ids in f.sequences)
    ids = np.full((len(chosen), num_choices, length), Tokenizer.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, feature in enumerate(chosen):
        for choice, sequence in enumerate(feature.sequences):
            ids[row, choice, : len(sequence)] = sequence
            mask[row, choice, : len(sequence)] = 1
    if num_choices == 1:
        ids, mask = ids[:, 0], mask[:, 0]
    num_labels = max(len(f.labels) for f in chosen)
    labels = [[*f.labels, *[IGNORED] * (num_labels - len(f.labels))] for f in chosen]
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        torch.tensor(labels, dtype=dtype).to(device),
        _padded_marks(chosen, device),
    )


def _padded_marks(chosen: Sequence[Feature], device: torch.device) -> torch.Tensor | None:
    """Stack the marked places, if there are any."""
    most = max(len(f.marks) for f in chosen)
    if most == 0:
        return None
    rows = [[*f.marks, *[(0, 0)] * (most - len(f.marks))] for f in chosen]
    return torch.tensor(rows).to(device)
