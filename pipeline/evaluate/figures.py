"""The figures of the tasks, by scikit-learn, scipy and the official definitions.

A figure is made in two steps, so that its spread over the test examples can be had by resampling:

    rows     examples and predictions -> numbers of each unit, float64 [N, K]
    value    the numbers of any units -> the figure, in [0, 1] or [-1, 1]

A unit is an example; of MultiRC it is a question, of Winogender's parity a pair, and of tagging a
sentence. Matthews' correlation,
F1 and the correlations of Pearson and Spearman are functions of all units at once, the others
averages over units.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluate.answers import exact_match, token_f1
from pipeline.evaluate.spans import spans

Rows = np.ndarray
_LEVEL = 0.95
NUM_DRAWS = 1000
"""Of the test examples, for an interval."""


@dataclass(frozen=True)
class Figure:
    """One figure."""

    rows: Callable[[Sequence[Any], Sequence[Any]], Rows]
    """(examples, predictions of their kind) -> float64 [N, K]."""
    value: Callable[[Rows], float]


def interval(rows_by_seed: Sequence[Rows], figure: Figure) -> tuple[float, float]:
    """Estimate how far a figure's mean over seeds depends on the test examples drawn.

    The units are drawn with replacement, the same ones for every seed: the percentile bootstrap.

    Args:
        rows_by_seed: Rows of the same examples, for every seed.
        figure: What they are rows of.

    Returns:
        The ends of the middle 95 % of the means.
    """
    generator = np.random.default_rng(0)
    num_units = len(rows_by_seed[0])
    means = []
    for _ in range(NUM_DRAWS):
        drawn = generator.integers(0, num_units, num_units)
        means.append(np.mean([figure.value(rows[drawn]) for rows in rows_by_seed]))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _pairs(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Label and prediction of each example."""
    labels = [example.label for example in examples]
    return np.array([labels, list(predictions)], dtype=np.float64).T


def _correct(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Whether each prediction is the label."""
    pairs = _pairs(examples, predictions)
    return (pairs[:, :1] == pairs[:, 1:]).astype(np.float64)


def _mean(rows: Rows) -> float:
    """Average over the units."""
    return float(rows.mean())


def _f1(rows: Rows) -> float:
    """F1 of the class 1."""
    return _sklearn_f1(rows, average="binary", pos_label=1.0)


def _macro_f1(rows: Rows) -> float:
    """Average of the F1 of the classes that occur."""
    return _sklearn_f1(rows, average="macro")


def _sklearn_f1(rows: Rows, **options: Any) -> float:
    """F1 of labels and predictions; 0 of a class that nothing has or gets."""
    from sklearn.metrics import f1_score  # costs a second to import

    options["zero_division"] = 0
    return float(f1_score(rows[:, 0], rows[:, 1], **options))


def _matthews(rows: Rows) -> float:
    """Matthews' correlation; 0 where one side has one class only."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a resample with a single class
        return float(matthews_corrcoef(rows[:, 0], rows[:, 1]))


def _pearson(rows: Rows) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, rows)


def _spearman(rows: Rows) -> float:
    """Spearman's correlation; 0 where one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, rows)


def _correlation(function: Callable[..., Any], rows: Rows) -> float:
    """Correlate both columns; undefined where one is constant, which counts as 0."""
    if (np.ptp(rows, axis=0) == 0).any():
        return 0.0
    return float(function(rows[:, 0], rows[:, 1])[0])


def _question_rows(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Of each MultiRC question: right, predicted and true answers, and whether all options are."""
    by_question: dict[Any, list[tuple[float, int]]] = {}
    for example, predicted in zip(examples, predictions, strict=True):
        by_question.setdefault(example.group, []).append((example.label, predicted))
    return np.array(
        [
            (
                sum(label == guess == 1 for label, guess in options),
                sum(guess for _, guess in options),
                sum(label for label, _ in options),
                all(label == guess for label, guess in options),
            )
            for options in by_question.values()
        ],
        dtype=np.float64,
    )


def _same_rows(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Of each pair of Winogender: whether both predictions are the same."""
    by_pair: dict[Any, set[Any]] = {}
    for example, predicted in zip(examples, predictions, strict=True):
        by_pair.setdefault(example.group, set()).add(predicted)
    return np.array([[len(found) == 1] for found in by_pair.values()], dtype=np.float64)


def _span_rows(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Of each sentence: right, predicted and true spans, by conlleval's rules."""
    rows = []
    for example, predicted in zip(examples, predictions, strict=True):
        gold, found = set(spans(example.tag_names)), set(spans(predicted))
        rows.append((len(gold & found), len(found), len(gold)))
    return np.array(rows, dtype=np.float64)


def _micro_f1(rows: Rows) -> float:
    """F1 from counts of right, predicted and true things; 0 where there are none."""
    right, predicted, true = rows[:, :3].sum(axis=0)
    return float(2 * right / max(1.0, predicted + true))


def _all_right(rows: Rows) -> float:
    """Share of the MultiRC questions of which every option is right."""
    return float(rows[:, 3].mean())


def _token_rows(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Of each sentence: right tags and tags."""
    return np.array(
        [
            (sum(map(str.__eq__, example.tag_names, guess)), len(guess))
            for example, guess in zip(examples, predictions, strict=True)
        ],
        dtype=np.float64,
    )


def _tag_pairs(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
    """Numbers of the tag and of its prediction, for every word."""
    tags = [
        (tag, guess)
        for e, p in zip(examples, predictions, strict=True)
        for tag, guess in zip(e.tag_names, p, strict=True)
    ]
    numbers = {tag: number for number, tag in enumerate(sorted({t for both in tags for t in both}))}
    return np.array([[numbers[tag], numbers[guess]] for tag, guess in tags], dtype=np.float64)


def _ratio(rows: Rows) -> float:
    """Sum of the first column over that of the second."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _answer_rows(compare: Callable[..., float]) -> Callable[..., Rows]:
    """Compare each predicted text with the right ones."""

    def rows(examples: Sequence[Any], predictions: Sequence[Any]) -> Rows:
        # By the rules of SQuAD 2.0 where questions have no answer, else by those of 1.1 and ReCoRD.
        may_be_none = not all(example.answers for example in examples)
        return np.array(
            [
                [compare(predicted, example.answers, may_be_none=may_be_none)]
                for example, predicted in zip(examples, predictions, strict=True)
            ],
            dtype=np.float64,
        )

    return rows


FIGURES = {
    "accuracy": Figure(_correct, _mean),
    "f1": Figure(_pairs, _f1),
    "macro_f1": Figure(_pairs, _macro_f1),
    "matthews_correlation": Figure(_pairs, _matthews),
    "pearson": Figure(_pairs, _pearson),
    "spearman": Figure(_pairs, _spearman),
    "f1_of_answers": Figure(_question_rows, _micro_f1),
    "exact_match_of_questions": Figure(_question_rows, _all_right),
    "exact_match": Figure(_answer_rows(exact_match), _mean),
    "token_f1": Figure(_answer_rows(token_f1), _mean),
    "gender_parity": Figure(_same_rows, _mean),
    "span_f1": Figure(_span_rows, _micro_f1),
    "tag_accuracy": Figure(_token_rows, _ratio),
    "tag_macro_f1": Figure(_tag_pairs, _macro_f1),
}
"""By name."""
