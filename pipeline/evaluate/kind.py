"""What a kind of task does: examples to inputs, outputs to a loss, outputs to predictions.

The kinds are in `kinds_text`, `kinds_tokens` and `kinds_marked`; `kinds` finds them by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.features import Batch, Feature


@dataclass(frozen=True)
class Limits:
    """How long inputs may be, in tokens."""

    max_length: int
    stride: int = 128
    """Tokens that neighbouring windows of a long text share."""
    max_question: int = 64
    """Of a question beside a long text."""
    max_answer: int = 30
    """Of an answer."""


class Kind(Protocol):
    """One kind of task."""

    head: str
    """The auto class of transformers, or a class of `heads`."""
    label_dtype: torch.dtype

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize examples; one may have several features, and sentences may share them."""
        ...

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Run the model; the classes of a choice are in the last dimension."""
        ...

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the training loss, a scalar in nats (regression: squared error)."""
        ...

    def distributions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Give the logits of each distribution over classes, [N, C]; of a regression [N, 1]."""
        ...

    def predictions(
        self, outputs: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]
    ) -> list[Any]:
        """Turn the logits of every feature into a prediction for every example."""
        ...
