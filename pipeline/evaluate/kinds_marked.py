"""Kinds of tasks about marked places: WiC and WSC (two places), ReCoRD (entities for a gap).

Letters: B examples, C classes, M marked places.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.features import IGNORED, Batch, Feature, cut_pair, make_sequence
from pipeline.evaluate.kind import Limits
from pipeline.evaluate.kinds_text import OneOfSome
from pipeline.evaluate.places import tokens_of, windows


class MarkedPair(OneOfSome):
    """A class of two marked places."""

    head = "MarkedPairModel"

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize texts and find the marked tokens."""
        return [
            _marked_feature(number, example, tokenizer, limits.max_length)
            for number, example in enumerate(examples)
        ]

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Give [B, C]."""
        return model(batch.input_ids, batch.mask, batch.marks_BM2)


def _marked_feature(number: int, example: Any, tokenizer: Tokenizer, max_length: int) -> Feature:
    """Tokenize one example; a text that is too long keeps the part with its last mark."""
    encoded = [tokenizer.encode_with_offsets(text) for text in example.texts]
    parts = [ids for ids, _ in encoded]
    room = max_length - 1 - len(parts)
    kept = cut_pair(parts[0], parts[1], room) if len(parts) == 2 else (parts[0][:room],)
    places = [(text, tokens_of(encoded[text][1], where)) for text, where in example.marks]
    # The first token of each part that is kept, and where that stands in the sequence.
    firsts, shifts, shift = [], [], 1
    for text, part in enumerate(kept):
        last = max((end for where, (_, end) in places if where == text), default=0)
        firsts.append(max(0, last - len(part)))
        shifts.append(shift - firsts[-1])
        shift += len(part) + 1
    cut = [ids[f : f + len(p)] for ids, f, p in zip(parts, firsts, kept, strict=True)]
    marks = tuple(
        (max(start, firsts[text]) + shifts[text], max(end, firsts[text]) + shifts[text])
        for text, (start, end) in places
    )
    label = IGNORED if example.label is None else example.label
    is_cut = sum(map(len, parts)) > room
    sequence = make_sequence(tokenizer, *cut)
    return Feature((sequence,), (label,), number, marks, num_cut=int(is_cut))


class Entity:
    """The entity of a passage that fills the gap of a query.

    As in the authors' code: [CLS] passage [SEP] query with [MASK] in the gap [SEP], a long passage
    in windows that overlap, every entity right or wrong by itself, and of an entity in several
    windows the mean of its log-probabilities.
    """

    head = "EntityModel"
    label_dtype = torch.float32

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize queries with windows of their passages."""
        features = []
        for number, example in enumerate(examples):
            query, gap = _query(example, tokenizer, limits)
            ids, offsets = tokenizer.encode_with_offsets(example.passage)
            entities = [tokens_of(offsets, where) for where in example.entities]
            texts = [example.passage[start:end] for start, end in example.entities]
            room = limits.max_length - 3 - len(query)
            for first, end in windows(len(ids), room, limits.stride):
                inside = [
                    i for i, (b, e) in enumerate(entities) if b < e and first <= b and e <= end
                ]
                place = end - first + 2 + gap
                marks = [(entities[i][0] - first + 1, entities[i][1] - first + 1) for i in inside]
                labels = [float(texts[i] in example.answers) for i in inside]
                sequence = make_sequence(tokenizer, ids[first:end], query)
                features.append(
                    Feature(
                        (sequence,),
                        (IGNORED, *labels),
                        number,
                        ((place, place + 1), *marks),
                        tuple(inside),
                    )
                )
        return features

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Give [B, M]; the first column means nothing."""
        return model(batch.input_ids, batch.mask, batch.marks_BM2)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the binary cross-entropy of all entities."""
        is_entity = batch.labels != IGNORED
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), batch.labels.clamp(min=0), reduction="none"
        )
        return (losses * is_entity).sum() / is_entity.sum().clamp(min=1)

    def distributions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Give right and wrong of every entity, [N, 2]."""
        chosen_N = logits[batch.labels != IGNORED]
        return torch.stack([chosen_N, torch.zeros_like(chosen_N)], dim=-1)

    def predictions(
        self, outputs: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]
    ) -> list[str]:
        """Choose the best entity of each example; "" where it has none."""
        scores: list[dict[int, list[float]]] = [{} for _ in examples]
        for output, feature in zip(outputs, features, strict=True):
            log_probabilities = -np.logaddexp(0.0, -output[1:].astype(np.float64))
            for entity, score in zip(feature.marked, log_probabilities, strict=False):
                scores[feature.example].setdefault(entity, []).append(float(score))
        found = []
        for example, by_entity in zip(examples, scores, strict=True):
            if not by_entity:
                found.append("")
                continue
            best = max(by_entity, key=lambda entity: np.mean(by_entity[entity]))
            start, end = example.entities[best]
            found.append(example.passage[start:end])
        return found


def _query(example: Any, tokenizer: Tokenizer, limits: Limits) -> tuple[list[int], int]:
    """Encode a query and find its gap; of a long one the tokens around the gap are kept."""
    before = tokenizer.encode(example.query[: example.gap[0]])
    after = tokenizer.encode(example.query[example.gap[1] :])
    # Short limits leave the passage at least half of the sequence.
    most = min(2 * limits.max_question, (limits.max_length - 3) // 2)
    if len(before) + 1 + len(after) > most:
        kept = min(len(before), max(most // 2, most - 1 - len(after)))
        before = before[len(before) - kept :]
    query = [*before, tokenizer.mask_id, *after][:most]
    return query, len(before)
