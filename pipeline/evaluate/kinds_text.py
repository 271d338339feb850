"""Kinds of tasks about whole texts: classes, numbers, and the best of several pairs.

Letters: B examples, C classes or choices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.features import IGNORED, Batch, Feature, cut_pair, make_sequence
from pipeline.evaluate.kind import Limits


def _text_features(examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits) -> list[Feature]:
    """Tokenize texts and pairs."""
    features = []
    for number, example in enumerate(examples):
        first = tokenizer.encode(example.text)
        if example.text_pair is None:
            room = limits.max_length - 2
            is_cut, cut = len(first) > room, (first[:room],)
        else:
            second, room = tokenizer.encode(example.text_pair), limits.max_length - 3
            is_cut, cut = len(first) + len(second) > room, cut_pair(first, second, room)
        label = IGNORED if example.label is None else example.label
        features.append(
            Feature((make_sequence(tokenizer, *cut),), (label,), number, num_cut=int(is_cut))
        )
    return features


class PerExample:
    """What kinds share whose model says one row of an example."""

    def distributions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Give one distribution an example."""
        return logits


class OneOfSome(PerExample):
    """What kinds share that choose one of some outputs."""

    label_dtype = torch.int64

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the cross-entropy."""
        return F.cross_entropy(logits.float(), batch.labels[:, 0])

    def predictions(
        self, outputs: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]
    ) -> list[int]:
        """Choose the largest output."""
        return [int(output.argmax()) for output in outputs]


class _Texts(PerExample):
    """What kinds share that read a text or a pair."""

    head = "AutoModelForSequenceClassification"

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize texts and pairs."""
        return _text_features(examples, tokenizer, limits)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Give [B, C]; of a number C is 1."""
        return model(batch.input_ids, attention_mask=batch.mask).logits


class Classification(_Texts, OneOfSome):
    """One of some classes."""


class Regression(_Texts):
    """A number."""

    label_dtype = torch.float32

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the mean squared error, as the original does."""
        return F.mse_loss(logits[:, 0].float(), batch.labels[:, 0])

    def predictions(
        self, outputs: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]
    ) -> list[float]:
        """Give the output."""
        return [float(output[0]) for output in outputs]


class MultipleChoice(OneOfSome):
    """The best of several pairs."""

    head = "AutoModelForMultipleChoice"

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize every choice as a pair."""
        features = []
        for number, example in enumerate(examples):
            pairs = [tokenizer.encode_batch(pair) for pair in example.choices]
            room = limits.max_length - 3
            num_cut = sum(len(first) + len(second) > room for first, second in pairs)
            sequences = tuple(
                make_sequence(tokenizer, *cut_pair(first, second, room)) for first, second in pairs
            )
            label = IGNORED if example.label is None else example.label
            features.append(Feature(sequences, (label,), number, num_cut=num_cut))
        return features

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Give [B, C]; a choice that an example does not have can not win."""
        logits_BC = model(batch.input_ids, attention_mask=batch.mask).logits
        # Not -inf, of which the divergence of SiFT would be undefined.
        lowest = torch.finfo(logits_BC.dtype).min
        return logits_BC.masked_fill(batch.mask.sum(-1) == 0, lowest)
