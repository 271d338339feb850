"""Kinds of tasks that predict tokens: tagging, and spans that answer a question.

Letters: B examples, C tags, L sequence length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.features import IGNORED, Batch, Feature, make_sequence
from pipeline.evaluate.kind import Limits
from pipeline.evaluate.places import tokens_of, windows

_BEST = 20
"""Starts and ends that are combined, as in BERT's run_squad.py."""


class Tagging:
    """A tag of every word.

    A word's tag is on its first piece; a long sentence is cut between words, so that every word is
    predicted. Neighbours of a document share sequences, as many whole sentences as fit.
    """

    head = "AutoModelForTokenClassification"
    label_dtype = torch.int64

    def __init__(self, labels: Sequence[str]):
        self._labels = tuple(labels)
        self._numbers = {label: number for number, label in enumerate(self._labels)}

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize sentences word by word."""
        filler = _SequenceFiller(tokenizer, limits.max_length)
        previous = None
        for number, example in enumerate(examples):
            # An empty piece list (a word of zero-width characters) must not lose its tag.
            pieces = [ids or [tokenizer.unk_id] for ids in tokenizer.encode_batch(example.words)]
            names = example.tag_names
            # Without public tags any number but IGNORED marks the pieces to predict.
            labels = [self._numbers[n] for n in names] if names else [0] * len(pieces)
            goes_on = number > 0 and previous is not None and previous == example.document
            filler.add(pieces, labels, number, goes_on)
            previous = example.document
        return filler.finish()

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Give [B, L, C]."""
        return model(batch.input_ids, attention_mask=batch.mask).logits

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the cross-entropy of the words' first pieces."""
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED
        )

    def distributions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Give one distribution a word."""
        return logits[batch.labels != IGNORED]

    def predictions(
        self, outputs: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]
    ) -> list[list[str]]:
        """Choose the best tag of every word."""
        tags: list[str] = []
        for output, feature in zip(outputs, features, strict=True):
            places = [i for i, label in enumerate(feature.labels) if label != IGNORED]
            tags += [self._labels[i] for i in output[places].argmax(-1)]
        # Sequences hold the words of all sentences in order, wherever they are cut.
        ends = np.cumsum([len(example.words) for example in examples]).tolist()
        return [tags[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class _SequenceFiller:
    """Puts sentences into sequences that fit, and cuts between words where one does not.

    Args:
        tokenizer: Knows the special ids.
        max_length: Tokens of a sequence, special ones included.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        self._tokenizer, self._room = tokenizer, max_length - 2
        self._features: list[Feature] = []
        self._begin(0)

    def _begin(self, example: int) -> None:
        self._ids: list[int] = []
        self._targets: list[int] = []
        self._num_cut, self._example = 0, example

    def _close(self, example: int) -> None:
        """Keep the sequence, and begin one of an example."""
        if self._ids:
            sequence = make_sequence(self._tokenizer, self._ids)
            labels = (IGNORED, *self._targets, IGNORED)
            self._features.append(
                Feature((sequence,), labels, self._example, num_cut=self._num_cut)
            )
        self._begin(example)

    def add(
        self, pieces: Sequence[list[int]], labels: Sequence[int], example: int, goes_on: bool
    ) -> None:
        """Add a sentence.

        Args:
            pieces: Token ids of each word.
            labels: Number of each word's tag.
            example: Number of the sentence.
            goes_on: Whether it is of the document of the one before.
        """
        size = sum(min(len(word), self._room) for word in pieces)
        if not goes_on or len(self._ids) + size > self._room:
            self._close(example)
        for word, label in zip(pieces, labels, strict=True):
            kept = word[: self._room]
            if len(self._ids) + len(kept) > self._room:
                self._close(example)
            self._num_cut += len(word) > self._room
            self._ids += kept
            self._targets += [label] + [IGNORED] * (len(kept) - 1)

    def finish(self) -> list[Feature]:
        """Give the sequences.

        Returns:
            Features in the order of the words; `example` is the first sentence in each.
        """
        self._close(0)
        return self._features


class Span:
    """A part of a text that answers a question, or "" for none.

    A long text becomes windows that overlap. [CLS] stands for "no answer here"; a window without
    the answer is trained to point at it. By BERT's run_squad.py: the best of 20 starts and ends of
    all windows, against the lowest score for no answer.
    """

    head = "AutoModelForQuestionAnswering"
    label_dtype = torch.int64

    def __init__(self, *, allows_no_answer: bool):
        self._allows_no_answer = allows_no_answer
        self._max_answer = Limits(0).max_answer

    def features(
        self, examples: Sequence[Any], tokenizer: Tokenizer, limits: Limits
    ) -> list[Feature]:
        """Tokenize questions with windows of their texts."""
        features = []
        for number, example in enumerate(examples):
            # Short limits leave the text at least half of the sequence.
            most = min(limits.max_question, (limits.max_length - 3) // 2)
            question = tokenizer.encode(example.question)[:most]
            ids, offsets = tokenizer.encode_with_offsets(example.context)
            answer = _answer_tokens(example, offsets)
            room = limits.max_length - 3 - len(question)
            for window in windows(len(ids), room, limits.stride):
                features.append(_window(tokenizer, question, ids, offsets, window, answer, number))
        return features

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Give [B, 2, L]: of starts and of ends."""
        output = model(batch.input_ids, attention_mask=batch.mask)
        logits_B2L = torch.stack([output.start_logits, output.end_logits], dim=1)
        lowest = torch.finfo(logits_B2L.dtype).min
        return logits_B2L.masked_fill(batch.mask[:, None] == 0, lowest)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Compute the average cross-entropy of starts and ends."""
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())

    def distributions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Give the distributions of starts and ends, [2 B, L]."""
        return logits.flatten(0, 1)

    def predictions(
        self, outputs: Sequence[np.ndarray], features: Sequence[Feature], examples: Sequence[Any]
    ) -> list[str]:
        """Choose the best span of all windows of each example."""
        best = [(-np.inf, "")] * len(examples)
        none = [np.inf] * len(examples)
        for output, feature in zip(outputs, features, strict=True):
            number = feature.example
            none[number] = min(none[number], float(output[0, 0] + output[1, 0]))
            score, begin, end = self._best_span(output, feature)
            if score > best[number][0]:
                best[number] = (score, examples[number].context[begin:end].strip())
        return [
            "" if self._allows_no_answer and absent > score else text
            for (score, text), absent in zip(best, none, strict=True)
        ]

    def _best_span(self, output: np.ndarray, feature: Feature) -> tuple[float, int, int]:
        """Find the best span of one window: score, first character, and the one behind it."""
        assert feature.offsets is not None, "a window has offsets"
        is_text = feature.offsets[:, 0] >= 0
        starts, ends = output[:, : len(is_text)]
        best = (-np.inf, 0, 0)
        for start in np.argsort(-starts)[:_BEST]:
            for end in np.argsort(-ends)[:_BEST]:
                fits = is_text[start] and is_text[end] and 0 <= end - start < self._max_answer
                score = float(starts[start] + ends[end])
                if fits and score > best[0]:
                    begin, stop = feature.offsets[start, 0], feature.offsets[end, 1]
                    best = (score, int(begin), int(stop))
        return best


def _answer_tokens(example: Any, offsets: np.ndarray) -> tuple[int, int] | None:
    """Find the first and the last token of the answer to train on."""
    if example.start is None or not example.answers:
        return None
    stop = example.start + len(example.answers[0])
    first, end = tokens_of(offsets, (example.start, stop))
    return (first, end - 1) if first < end else None


def _window(
    tokenizer: Tokenizer,
    question: list[int],
    ids: list[int],
    offsets: np.ndarray,
    window: tuple[int, int],
    answer: tuple[int, int] | None,
    example: int,
) -> Feature:
    """Build [CLS] question [SEP] part of the text [SEP]."""
    first, end = window
    shift = len(question) + 2 - first
    labels = (0, 0)
    if answer is not None and first <= answer[0] and answer[1] < end:
        labels = (answer[0] + shift, answer[1] + shift)
    sequence = make_sequence(tokenizer, question, ids[first:end])
    places = np.full((len(sequence), 2), -1, dtype=np.int32)
    places[len(question) + 2 : -1] = offsets[first:end]
    return Feature((sequence,), labels, example, offsets=places)
