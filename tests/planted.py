"""Predictors that need no training: outputs made of the labels, right or shuffled."""

from contextlib import nullcontext

import numpy as np

from pipeline.evaluate import task_runs
from pipeline.evaluate.features import IGNORED


def _one_hot(index, size):
    row = np.zeros(size, dtype=np.float32)
    row[index] = 1.0
    return row


def outputs_of(task, feature, labels):
    """Logits that say `labels` of a feature, in the form that its kind gives them."""
    kind = task.spec.kind
    if kind == "regression":
        return np.array(labels, dtype=np.float32)
    if kind == "tagging":
        rows = [_one_hot(max(0, label), task.num_outputs) for label in labels]
        return np.stack(rows)
    if kind == "span":
        length = len(feature.input_ids)
        return np.stack([_one_hot(label, length) for label in labels])
    if kind == "entity":
        return np.array([float(label == 1) for label in labels], dtype=np.float32)
    size = len(feature.sequences) if kind == "multiple-choice" else task.num_outputs
    return _one_hot(labels[0], size)


def _shuffled_tags(labels, shuffle):
    """Every word gets the tag of another word of the split."""
    tags = [label for row in labels for label in row if label != IGNORED]
    drawn = iter(shuffle.permutation(tags))
    return [[label if label == IGNORED else next(drawn) for label in row] for row in labels]


def plant(monkeypatch, shuffle=None):
    """Put the predictor in the place of the model: nothing is trained.

    `shuffle` is a numpy generator: labels are those of another feature with as many.
    """
    current = {}
    run_task = task_runs.run_task

    def remembering(repository, task, name, **options):
        current["task"] = task
        return run_task(repository, task, name, **options)

    def planted(model, kind, features, batch_size, strategy, *, bf16=False):
        labels = [feature.labels for feature in features]
        if all(row == (IGNORED,) for row in labels):
            labels = [(0,)] * len(labels)  # a split without public labels
        if shuffle is not None and current["task"].spec.kind == "tagging":
            labels = _shuffled_tags(labels, shuffle)
        elif shuffle is not None:
            labels = [labels[i] for i in shuffle.permutation(len(labels))]
        pairs = zip(features, labels, strict=True)
        return [outputs_of(current["task"], feature, row) for feature, row in pairs]

    monkeypatch.setattr("pipeline.evaluate.suite.run_task", remembering)
    monkeypatch.setattr(task_runs, "fine_tuned", lambda *_: nullcontext())
    monkeypatch.setattr(task_runs, "outputs", planted)
