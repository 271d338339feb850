"""Figures against scikit-learn, scipy, published examples and examples on paper."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.evaluate.answers import exact_match, normalize_answer, token_f1
from pipeline.evaluate.examples import SpanExample, TaggedExample, TextExample
from pipeline.evaluate.figures import FIGURES, Figure, interval


def value(name, examples, predictions):
    figure = FIGURES[name]
    return figure.value(figure.rows(examples, predictions))


def texts(labels, groups=None):
    groups = groups or [None] * len(labels)
    return [
        TextExample(i, "x", None, y, g) for i, (y, g) in enumerate(zip(labels, groups, strict=True))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_class_figures_are_those_of_sklearn(seed):
    random = np.random.default_rng(seed)
    gold, guess = random.integers(0, 2, (2, 50)).tolist()
    examples = texts(gold)
    assert value("accuracy", examples, guess) == pytest.approx(accuracy_score(gold, guess))
    assert value("f1", examples, guess) == pytest.approx(f1_score(gold, guess))
    mcc = matthews_corrcoef(gold, guess)
    assert value("matthews_correlation", examples, guess) == pytest.approx(mcc)
    gold, guess = random.integers(0, 3, (2, 50)).tolist()
    macro = f1_score(gold, guess, average="macro")
    assert value("macro_f1", texts(gold), guess) == pytest.approx(macro)


def test_matthews_correlation_on_paper():
    # 6 true positives, 3 true negatives, 1 false positive, 2 false negatives:
    # (6 x 3 - 1 x 2) / sqrt(7 x 8 x 4 x 5)
    gold = [1] * 6 + [0] * 3 + [0] + [1] * 2
    guess = [1] * 6 + [0] * 3 + [1] + [0] * 2
    assert value("matthews_correlation", texts(gold), guess) == pytest.approx(16 / 1120**0.5)
    assert value("matthews_correlation", texts(gold), [1] * 12) == 0.0
    assert value("f1", texts([0, 0]), [0, 0]) == 0.0


def test_correlations():
    gold = [0.0, 1.5, 2.0, 4.0, 5.0]
    guess = [0.1, 2.0, 1.0, 4.5, 4.4]
    assert value("pearson", texts(gold), guess) == pytest.approx(pearsonr(gold, guess)[0])
    assert value("spearman", texts(gold), guess) == pytest.approx(spearmanr(gold, guess)[0])
    assert value("spearman", texts(gold), guess) == pytest.approx(1 - 6 * 4 / (5 * 24))  # by ranks
    assert value("pearson", texts(gold), [1.0] * 5) == 0.0


# By evaluate-v2.0.py, on paper: predicted, right, exact, F1.
ANSWERS = [
    ("the Denver Broncos", "Denver Broncos!", 1.0, 1.0),
    ("Broncos", "Denver Broncos", 0.0, 2 / 3),
    ("a gold gold cup", "gold cup", 0.0, 4 / 5),
    ("in 1066", "1066", 0.0, 2 / 3),
    ("", "", 1.0, 1.0),
    ("", "1066", 0.0, 0.0),
    ("The", "an", 1.0, 1.0),
    ("anthem", "them", 0.0, 0.0),
]


@pytest.mark.parametrize(("predicted", "answer", "exact", "f1"), ANSWERS)
def test_answers(predicted, answer, exact, f1):
    answers = [answer] if answer else []
    assert exact_match(predicted, answers, may_be_none=True) == exact
    assert token_f1(predicted, answers, may_be_none=True) == pytest.approx(f1)


def test_normalisation():
    assert normalize_answer("  The  U.S.-based  A an  THE\tteam. ") == "usbased team"


def test_best_of_the_right_answers_counts():
    example = SpanExample(1, "?", "text", ("Denver Broncos", "Broncos"), 0)
    nothing = SpanExample(2, "?", "text", (), None)
    assert value("exact_match", [example, nothing], ["the Broncos", ""]) == 1.0
    assert value("token_f1", [example, nothing], ["Denver", "Denver"]) == pytest.approx(1 / 3)


def test_multirc_on_paper():
    """Two questions: of the first all options are right, of the second one of three."""
    examples = texts([1, 0, 1, 1, 0], groups=[(0, 0), (0, 0), (0, 1), (0, 1), (0, 1)])
    guess = [1, 0, 0, 1, 1]
    assert value("exact_match_of_questions", examples, guess) == 0.5
    # 2 right of 3 predicted and 3 true, over all options at once
    assert value("f1_of_answers", examples, guess) == pytest.approx(2 / 3)
    flat = f1_score([e.label for e in examples], guess)
    assert value("f1_of_answers", examples, guess) == pytest.approx(flat)


def test_tag_figures():
    gold = [("B-A", "I-A", "O"), ("O", "B-B")]
    examples = [TaggedExample(i, ("w",) * len(tags), tags) for i, tags in enumerate(gold)]
    guess = [["B-A", "I-A", "O"], ["O", "O"]]
    assert value("tag_accuracy", examples, guess) == 4 / 5
    assert value("span_f1", examples, guess) == pytest.approx(2 * 1 / (2 + 1))
    flat = [[t for tags in side for t in tags] for side in (gold, guess)]
    macro = f1_score(*flat, average="macro", zero_division=0)
    assert value("tag_macro_f1", examples, guess) == pytest.approx(macro)


def test_interval_is_that_of_the_binomial():
    """Of 400 examples, 300 right: 0.75 +- 1.96 x sqrt(0.75 x 0.25 / 400)."""
    right = np.array([[1.0]] * 300 + [[0.0]] * 100)
    low, high = interval([right], FIGURES["accuracy"])
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - half, abs=0.01)
    assert high == pytest.approx(0.75 + half, abs=0.01)
    # Seeds that err on the same examples leave the interval; opposite ones have none.
    assert interval([right, right], FIGURES["accuracy"]) == (low, high)
    assert interval([right, 1 - right], FIGURES["accuracy"]) == (0.5, 0.5)


def test_interval_is_of_whole_units():
    """A question's options are drawn together."""
    figure = Figure(lambda *_: np.empty(0), lambda rows: float(rows[:, 0].sum() / len(rows)))
    rows = np.array([[2.0, 5.0], [2.0, 6.0]])
    assert interval([rows], figure) == (2.0, 2.0)
