"""A labelled task as a model sees it: token ids with labels, scores, and trivial baselines.

    read_task      files -> TaskFiles, checked before a model is loaded
    build_task     TaskFiles -> Task, tokenized with the model's own spm.model
    Task.score     predictions -> accuracy, macro-F1, and span-F1 where the tags are BIO
    Task.baselines what can be had without a pre-trained model

Classification puts one label on a sequence, [CLS] text [SEP] or [CLS] text [SEP] pair [SEP].
Tagging puts a word's tag on its first piece; a long sentence is cut between words, so that every
word is predicted.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.labelled import (
    Columns,
    LabelledText,
    TaggedSentence,
    TaskKind,
    read_sentences,
    read_texts,
)
from pipeline.evaluate.spans import are_bio_tags, span_f1

IGNORED = -100
Scores = dict[str, float]
ExampleT = TypeVar("ExampleT")


@dataclass(frozen=True)
class Feature:
    """One input sequence."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """Classification: one label. Tagging: one a token, IGNORED but on first pieces."""


@dataclass(frozen=True)
class Task:
    """A labelled task, ready to train on."""

    kind: TaskKind
    labels: tuple[str, ...]
    """Label of each number: those of the training file, sorted."""
    train: tuple[Feature, ...]
    test: tuple[Feature, ...]
    test_sentence_lengths: tuple[int, ...]
    """Words of each test sentence, which may be several features; empty without BIO tags."""
    num_truncated: int
    """Texts (classification) or words (tagging) that lost their end to the maximal length."""
    baselines: dict[str, Scores]

    def score(self, predictions: Sequence[int]) -> Scores:
        """Compare predictions with the test labels.

        Args:
            predictions: A label number for every label of `test`, in order.

        Returns:
            Shares in [0, 1] by name.
        """
        gold = [label for f in self.test for label in f.labels if label != IGNORED]
        names = self.labels
        return _scores(
            [names[label] for label in gold],
            [names[label] for label in predictions],
            self.test_sentence_lengths,
        )


@dataclass(frozen=True)
class TaskFiles:
    """Both files of a task, read and compared, not yet tokenized."""

    kind: TaskKind
    numbers: dict[str, int]
    """Label -> number."""
    train: Sequence[Any]
    """LabelledText or TaggedSentence, by kind."""
    test: Sequence[Any]


def read_task(
    kind: TaskKind, train: Path, test: Path, columns: Columns, max_train: int | None
) -> TaskFiles:
    """Read both files of a task.

    Args:
        kind: Classification or tagging.
        train: Training file.
        test: Test file.
        columns: Names of the columns of a classification file.
        max_train: Use so many training examples, spread evenly over the file; all where None.

    Returns:
        Their examples.

    Raises:
        UserError: A file is unusable, or the test file has labels that training never sees.
    """
    if kind == "classification":
        texts, others = read_texts(train, columns), read_texts(test, columns)
        labels = {example.label for example in texts}
        lines = {example.label: example.line for example in reversed(others)}
        numbers = _number_labels(train, test, labels, lines)
        return TaskFiles(kind, numbers, _thinned(texts, max_train), others)
    sentences, other_sentences = read_sentences(train), read_sentences(test)
    labels = {tag for sentence in sentences for tag in sentence.tags}
    lines = {
        tag: sentence.line + place
        for sentence in reversed(other_sentences)
        for place, tag in reversed(list(enumerate(sentence.tags)))
    }
    numbers = _number_labels(train, test, labels, lines)
    return TaskFiles(kind, numbers, _thinned(sentences, max_train), other_sentences)


def build_task(files: TaskFiles, tokenizer: Tokenizer, max_length: int) -> Task:
    """Tokenize a task and score its baselines.

    Args:
        files: What was read.
        tokenizer: The model's.
        max_length: Longest sequence in tokens, special ones included.

    Returns:
        The task.
    """
    build = _classification if files.kind == "classification" else _tagging
    return build(files, tokenizer, max_length)


def _thinned(examples: list[ExampleT], max_train: int | None) -> list[ExampleT]:
    """Keep some examples, evenly spaced, because files are often sorted by label."""
    if max_train is None or max_train >= len(examples):
        return examples
    return [examples[i * len(examples) // max_train] for i in range(max_train)]


def _number_labels(
    train: Path, test: Path, labels: set[str], test_lines: dict[str, int]
) -> dict[str, int]:
    """Number the labels of the training file; refuse others in the test file."""
    if len(labels) < 2:
        raise UserError(
            f"{train}: every example has the label {min(labels)!r}; there is nothing to learn"
        )
    unseen = sorted((line, label) for label, line in test_lines.items() if label not in labels)
    if unseen:
        line, label = unseen[0]
        raise UserError(
            f"{test}, line {line}: {train} has no label {label!r}; its labels are "
            f"{', '.join(sorted(labels)[:20])}{' ...' if len(labels) > 20 else ''}"
        )
    numeric = all(re.fullmatch(r"-?[0-9]+", label) for label in labels)
    ordered = sorted(labels, key=int) if numeric else sorted(labels)
    return {label: number for number, label in enumerate(ordered)}


def _classification(files: TaskFiles, tokenizer: Tokenizer, max_length: int) -> Task:
    """Tokenize texts or pairs of texts."""
    num_truncated = 0

    def features(examples: Sequence[LabelledText]) -> Iterator[Feature]:
        nonlocal num_truncated
        for example in examples:
            ids, is_cut = _sequence(tokenizer, example, max_length)
            num_truncated += is_cut
            yield Feature(ids, (files.numbers[example.label],))

    train, test = tuple(features(files.train)), tuple(features(files.test))
    majority = Counter(e.label for e in files.train).most_common(1)[0][0]
    gold = [e.label for e in files.test]
    baselines = {
        "majority class": _scores(gold, [majority] * len(gold), ()),
        "TF-IDF + logistic regression": _scores(gold, _tfidf(files.train, files.test), ()),
    }
    return Task("classification", tuple(files.numbers), train, test, (), num_truncated, baselines)


def _sequence(
    tokenizer: Tokenizer, example: LabelledText, max_length: int
) -> tuple[tuple[int, ...], bool]:
    """Build one input; the longer text of a pair loses its end first."""
    first = tokenizer.encode(example.text)
    if example.text_pair is None:
        room = max_length - 2
        return (tokenizer.cls_id, *first[:room], tokenizer.sep_id), len(first) > room
    second = tokenizer.encode(example.text_pair)
    room = max_length - 3
    is_cut = len(first) + len(second) > room
    kept = min(len(first), max(room - len(second), (room + 1) // 2))
    first, second = first[:kept], second[: room - kept]
    return (tokenizer.cls_id, *first, tokenizer.sep_id, *second, tokenizer.sep_id), is_cut


def _tfidf(train: Sequence[LabelledText], test: Sequence[LabelledText]) -> list[str]:
    """Predict with a linear model over words and pairs of words."""
    labels = [e.label for e in train]
    if len(set(labels)) == 1:  # a small part of a file that is sorted by label
        return labels[:1] * len(test)
    from sklearn.feature_extraction.text import TfidfVectorizer  # costs a second to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # One character of `\S` is enough, unlike by default: Chinese is written without spaces.
    model = make_pipeline(
        TfidfVectorizer(token_pattern=r"\w+|\S", ngram_range=(1, 2)),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    # The mark that separates the texts of a pair is also a word of an empty text.
    inputs = [[f"{e.text} [SEP] {e.text_pair or ''}" for e in part] for part in (train, test)]
    model.fit(inputs[0], labels)
    return list(model.predict(inputs[1]))


def _tagging(files: TaskFiles, tokenizer: Tokenizer, max_length: int) -> Task:
    """Tokenize sentences word by word."""
    room = max_length - 2
    num_truncated = 0

    def features(sentences: Sequence[TaggedSentence]) -> Iterator[Feature]:
        nonlocal num_truncated
        for sentence in sentences:
            # An empty piece list (a word of zero-width characters) must not lose its tag.
            pieces = [ids or [tokenizer.unk_id] for ids in tokenizer.encode_batch(sentence.words)]
            num_truncated += sum(len(ids) > room for ids in pieces)
            labels = [files.numbers[tag] for tag in sentence.tags]
            yield from _windows(tokenizer, pieces, labels, room)

    train, test = tuple(features(files.train)), tuple(features(files.test))
    gold = [tag for sentence in files.test for tag in sentence.tags]
    marks_spans = are_bio_tags(files.numbers)
    lengths = tuple(len(s.words) for s in files.test) if marks_spans else ()
    guesses = _most_frequent_tags(files.train, files.test)
    baselines = {"most frequent tag of the word": _scores(gold, guesses, lengths)}
    return Task("tagging", tuple(files.numbers), train, test, lengths, num_truncated, baselines)


def _windows(
    tokenizer: Tokenizer, pieces: Sequence[list[int]], labels: Sequence[int], room: int
) -> Iterator[Feature]:
    """Cut a sentence between words into sequences that fit."""
    ids: list[int] = []
    targets: list[int] = []
    for word, label in zip(pieces, labels, strict=True):
        word = word[:room]
        if len(ids) + len(word) > room:
            yield _framed(tokenizer, ids, targets)
            ids, targets = [], []
        ids += word
        targets += [label] + [IGNORED] * (len(word) - 1)
    yield _framed(tokenizer, ids, targets)


def _framed(tokenizer: Tokenizer, ids: list[int], targets: list[int]) -> Feature:
    return Feature((tokenizer.cls_id, *ids, tokenizer.sep_id), (IGNORED, *targets, IGNORED))


def _most_frequent_tags(
    train: Sequence[TaggedSentence], test: Sequence[TaggedSentence]
) -> list[str]:
    """Predict each word's most frequent tag, and for a new word the most frequent of all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word][tag] += 1
            overall[tag] += 1
    return [
        counts.get(word, overall).most_common(1)[0][0]
        for sentence in test
        for word in sentence.words
    ]


def _scores(gold: Sequence[str], predicted: Sequence[str], lengths: Sequence[int]) -> Scores:
    """Compute the figures of a task; those of spans where sentence lengths are given."""
    from sklearn.metrics import accuracy_score, f1_score  # costs a second to import

    scores = {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(f1_score(gold, predicted, average="macro")),
    }
    if lengths:
        scores["span_f1"] = span_f1(_divided(gold, lengths), _divided(predicted, lengths))
    return scores


def _divided(tags: Sequence[str], lengths: Sequence[int]) -> list[Sequence[str]]:
    """Give every sentence its tags."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return [tags[start:end] for start, end in itertools.pairwise(ends)]
