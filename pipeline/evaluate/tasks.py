"""A labelled task of two own files, as a model sees it, with scores and trivial baselines.

    read_task      files -> TaskFiles, checked before a model is loaded
    build_task     TaskFiles -> Task, tokenized with the model's own spm.model
    Task.score     predictions -> the figures of the kind
    Task.baselines what can be had without a pre-trained model

Classification puts one label on a sequence, [CLS] text [SEP] or [CLS] text [SEP] pair [SEP].
Tagging puts a word's tag on its first piece; a long sentence is cut between words, so that every
word is predicted.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.examples import TaggedExample, TextExample
from pipeline.evaluate.features import Feature
from pipeline.evaluate.figures import FIGURES, Figure
from pipeline.evaluate.kind import Kind, Limits
from pipeline.evaluate.kinds import find_kind
from pipeline.evaluate.labelled import Columns, TaskKind, read_sentences, read_texts
from pipeline.evaluate.own_files import guess_own, read_own_file
from pipeline.evaluate.spans import are_bio_tags

_OWN_FIGURES = {
    "regression": ("pearson", "spearman"),
    "multiple-choice": ("accuracy",),
    "span": ("exact_match", "token_f1"),
}

Scores = dict[str, float]
ExampleT = TypeVar("ExampleT")


@dataclass(frozen=True)
class TaskFiles:
    """Both files of a task, read and compared, not yet tokenized."""

    kind: TaskKind
    labels: tuple[str, ...]
    """Label of each number: those of the training file, sorted; none of other kinds."""
    train: Sequence[Any]
    """Examples of the kind."""
    test: Sequence[Any]

    def find_kind(self) -> tuple[Kind, int]:
        """Make the kind; a span may be missing where the training file has such questions.

        Returns:
            The kind, and the number of outputs of its head.
        """
        has_none = self.kind == "span" and not all(e.answers for e in self.train)
        return find_kind(self.kind, self.labels, allows_no_answer=has_none)


@dataclass(frozen=True)
class Task:
    """A labelled task, ready to train on."""

    files: TaskFiles
    train: tuple[Feature, ...]
    test: tuple[Feature, ...]
    num_truncated: int
    """Texts (classification) or words (tagging) that lost their end to the maximal length."""
    baselines: dict[str, Scores]

    def score(self, predictions: Sequence[Any]) -> Scores:
        """Compare predictions with the test labels.

        Args:
            predictions: Of every test example, as the kind predicts: the number of a class or a
            choice, a number, a text, or the tags of a sentence.

        Returns:
            Figures by name: shares in [0, 1], correlations in [-1, 1].
        """
        return score_files(self.files, predictions)


def figures_of(kind: TaskKind, labels: Sequence[str]) -> dict[str, Figure]:
    """Choose the figures of a task.

    Args:
        kind: Of the task.
        labels: Its classes or tags.

    Returns:
        Figures by name; F1 of the spans where the tags are BIO.
    """
    names = {"accuracy": "accuracy", "macro_f1": "macro_f1"}
    if kind == "tagging":
        names = {"accuracy": "tag_accuracy", "macro_f1": "tag_macro_f1"}
        if are_bio_tags(labels):
            names["span_f1"] = "span_f1"
    elif kind != "classification":
        names = {name: name for name in _OWN_FIGURES[kind]}
    return {name: FIGURES[key] for name, key in names.items()}


def score_files(files: TaskFiles, predictions: Sequence[Any]) -> Scores:
    """Compare predictions with the labels of a test file.

    Args:
        files: What was read.
        predictions: Of every test example, as the kind predicts.

    Returns:
        The values of `figures_of`.
    """
    return {
        name: figure.value(figure.rows(files.test, predictions))
        for name, figure in figures_of(files.kind, files.labels).items()
    }


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
    if kind in ("regression", "multiple-choice", "span"):
        parts = [read_own_file(kind, path, columns) for path in (train, test)]
        return TaskFiles(kind, (), _thinned(parts[0], max_train), parts[1])
    if kind == "classification":
        texts, others = read_texts(train, columns), read_texts(test, columns)
        labels = {example.label for example in texts}
        lines = {example.label: example.line for example in reversed(others)}
        names = _sorted_labels(train, test, labels, lines)
        numbers = {name: number for number, name in enumerate(names)}
        parts = [
            [TextExample(e.line, e.text, e.text_pair, numbers[e.label]) for e in part]
            for part in (_thinned(texts, max_train), others)
        ]
        return TaskFiles(kind, names, *parts)
    sentences, other_sentences = read_sentences(train), read_sentences(test)
    labels = {tag for sentence in sentences for tag in sentence.tags}
    lines = {
        tag: sentence.line + place
        for sentence in reversed(other_sentences)
        for place, tag in reversed(list(enumerate(sentence.tags)))
    }
    parts = [
        [TaggedExample(s.line, s.words, s.tags) for s in part]
        for part in (_thinned(sentences, max_train), other_sentences)
    ]
    return TaskFiles(kind, _sorted_labels(train, test, labels, lines), *parts)


def build_task(files: TaskFiles, tokenizer: Tokenizer, max_length: int) -> Task:
    """Tokenize a task and score its baselines.

    Args:
        files: What was read.
        tokenizer: The model's.
        max_length: Longest sequence in tokens, special ones included.

    Returns:
        The task.
    """
    kind, _ = files.find_kind()
    limits = Limits(max_length)
    train, test = (
        tuple(kind.features(part, tokenizer, limits)) for part in (files.train, files.test)
    )
    num_truncated = sum(feature.num_cut for feature in (*train, *test))
    if files.kind == "tagging":
        guesses: dict[str, list[Any]] = _tag_guesses(files)
    elif files.kind == "classification":
        guesses = _class_guesses(files)
    else:
        guesses = guess_own(files.kind, files.train, files.test)
    baselines = {name: score_files(files, guess) for name, guess in guesses.items()}
    return Task(files, train, test, num_truncated, baselines)


def _thinned(examples: list[ExampleT], max_train: int | None) -> list[ExampleT]:
    """Keep some examples, evenly spaced, because files are often sorted by label."""
    if max_train is None or max_train >= len(examples):
        return examples
    return [examples[i * len(examples) // max_train] for i in range(max_train)]


def _sorted_labels(
    train: Path, test: Path, labels: set[str], test_lines: dict[str, int]
) -> tuple[str, ...]:
    """Sort the labels of the training file; refuse others in the test file."""
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
    return tuple(sorted(labels, key=int) if numeric else sorted(labels))


def _class_guesses(files: TaskFiles) -> dict[str, list[Any]]:
    """Predict classes without a pre-trained model."""
    majority = Counter(e.label for e in files.train).most_common(1)[0][0]
    return {
        "majority class": [majority] * len(files.test),
        "TF-IDF + logistic regression": _tfidf(files.train, files.test),
    }


def _tfidf(train: Sequence[Any], test: Sequence[Any]) -> list[int]:
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


def _tag_guesses(files: TaskFiles) -> dict[str, list[Any]]:
    """Predict each word's most frequent tag, and for a new word the most frequent of all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for sentence in files.train:
        for word, tag in zip(sentence.words, sentence.tag_names, strict=True):
            counts[word][tag] += 1
            overall[tag] += 1
    guesses = [
        [counts.get(word, overall).most_common(1)[0][0] for word in sentence.words]
        for sentence in files.test
    ]
    return {"most frequent tag of the word": guesses}
