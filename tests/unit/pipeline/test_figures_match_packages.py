"""Figures against packages of others, on random inputs and odd ones, and on paper.

torchmetrics, seqeval and scipy were written by others; where they leave a case undefined or decide
it otherwise than the task's own script, the test says so and holds the script's rule.
"""

import string
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import accuracy_score as seqeval_accuracy
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.scheme import IOB1, IOB2
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_matthews_corrcoef,
    multiclass_accuracy,
    multiclass_f1_score,
)
from torchmetrics.functional.text import squad

from pipeline.evaluate.examples import EntityExample, SpanExample, TaggedExample, TextExample
from pipeline.evaluate.figures import FIGURES
from pipeline.evaluate.spans import span_f1, spans


def value(name, examples, predictions):
    figure = FIGURES[name]
    return figure.value(figure.rows(examples, predictions))


def texts(labels, groups=None):
    groups = groups or [None] * len(labels)
    return [TextExample(0, "", None, y, g) for y, g in zip(labels, groups, strict=True)]


def two_lists(values, most=24):
    """Labels and predictions of the same number of examples, at least one."""
    return st.lists(st.tuples(values, values), min_size=1, max_size=most).map(
        lambda pairs: tuple(map(list, zip(*pairs, strict=True)))
    )


CLASSES = st.integers(0, 3)
BINARY = st.integers(0, 1)


@given(two_lists(CLASSES))
@example(([2], [2]))
@example(([0, 0, 0], [0, 0, 0]))
@example(([0, 1, 2], [3, 3, 3]))
def test_accuracy_and_macro_f1(lists):
    gold, guess = map(torch.tensor, lists)
    accuracy = multiclass_accuracy(guess, gold, num_classes=4, average="micro")
    assert value("accuracy", texts(lists[0]), lists[1]) == pytest.approx(float(accuracy))
    # Classes that neither side has do not count, in torchmetrics and here.
    macro = multiclass_f1_score(guess, gold, num_classes=4, average="macro")
    assert value("macro_f1", texts(lists[0]), lists[1]) == pytest.approx(float(macro), abs=1e-6)


@given(two_lists(BINARY))
@example(([0, 0], [0, 0]))
@example(([0, 0], [1, 1]))
@example(([1, 1], [0, 0]))
@example(([1], [1]))
def test_f1(lists):
    gold, guess = map(torch.tensor, lists)
    theirs = float(binary_f1_score(guess, gold))
    assert value("f1", texts(lists[0]), lists[1]) == pytest.approx(theirs)


@given(two_lists(BINARY))
@example(([0, 0, 0], [0, 0, 0]))
@example(([0, 1, 1], [1, 0, 0]))
@example(([0, 1, 0], [1, 1, 1]))
def test_matthews_correlation(lists):
    """It is Pearson's correlation of both columns; of one class GLUE's script says 0."""
    mine = value("matthews_correlation", texts(lists[0]), lists[1])
    if len(set(lists[0])) == 1 or len(set(lists[1])) == 1:
        assert mine == 0.0  # torchmetrics: 1 or -1 where all or none are right
        return
    gold, guess = map(torch.tensor, lists)
    assert mine == pytest.approx(float(binary_matthews_corrcoef(guess, gold)), abs=1e-5)
    assert mine == pytest.approx(pearsonr(*lists)[0])


QUARTERS = st.integers(-20, 20).map(lambda number: number / 4)  # many ties


@given(two_lists(QUARTERS))
@example(([1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 1.0]))
@example(([1.0], [2.0]))
@example(([5.0, 5.0, 5.0], [1.0, 2.0, 3.0]))
@example(([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]))
def test_correlations(lists):
    mine = {name: value(name, texts(lists[0]), lists[1]) for name in ("pearson", "spearman")}
    if len(set(lists[0])) == 1 or len(set(lists[1])) == 1:
        assert mine == {"pearson": 0.0, "spearman": 0.0}  # undefined for both packages
        return
    gold, guess = (torch.tensor(side, dtype=torch.float64) for side in lists)
    assert mine["pearson"] == pytest.approx(float(pearson_corrcoef(guess, gold)), abs=1e-6)
    assert mine["spearman"] == pytest.approx(float(spearman_corrcoef(guess, gold)), abs=1e-4)
    assert mine["pearson"] == pytest.approx(pearsonr(*lists)[0])
    assert mine["spearman"] == pytest.approx(spearmanr(*lists)[0])


def test_spearman_with_ties_on_paper():
    """Ranks 1.5 1.5 3 4 and 1 2.5 2.5 4: 3.75 / 4.5."""
    gold, guess = [1.0, 1.0, 2.0, 9.0], [0.0, 1.0, 1.0, 2.0]
    assert value("spearman", texts(gold), guess) == pytest.approx(3.75 / 4.5)


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def tagged(*sentences):
    return [TaggedExample(0, ("w",) * len(tags), tuple(tags)) for tags in sentences]


@st.composite
def two_taggings(draw, tags=TAGS):
    """Right and predicted tags of some sentences."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    tag = st.sampled_from(tags)
    return [
        [draw(st.lists(tag, min_size=length, max_size=length)) for length in lengths]
        for _ in range(2)
    ]


def quiet(function, *arguments, **options):
    """seqeval speaks of files without spans, for which it gives 0 as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(*arguments, **options))


@given(two_taggings())
@example([[["O", "O"]], [["O", "O"]]])
@example([[["B-PER"]], [["O"]]])
@example([[["O", "I-PER", "I-PER"]], [["O", "B-PER", "I-PER"]]])  # I- after O
@example([[["B-PER", "I-LOC"]], [["B-PER", "B-LOC"]]])  # another type without B-
@example([[["I-PER"], ["I-PER"]], [["B-PER"], ["B-PER"]]])  # spans end with the sentence
def test_f1_of_any_tags_is_seqevals(taggings):
    """Its default reads tags as conlleval does, broken ones too."""
    gold, guess = taggings
    theirs = quiet(seqeval_f1, gold, guess)
    assert value("span_f1", tagged(*gold), guess) == pytest.approx(theirs)
    assert span_f1(gold, guess) == pytest.approx(theirs)
    right = quiet(seqeval_accuracy, gold, guess)
    assert value("tag_accuracy", tagged(*gold), guess) == pytest.approx(right)


def in_scheme(tags, scheme):
    """The same spans, written in IOB1 or IOB2."""
    written, previous = ["O"] * len(tags), None
    for span in spans(tags):
        written[span.start : span.end] = [f"I-{span.type}"] * (span.end - span.start)
        follows = previous is not None and (previous.end, previous.type) == (span.start, span.type)
        if scheme is IOB2 or follows:
            written[span.start] = f"B-{span.type}"
        previous = span
    return written


@pytest.mark.parametrize("scheme", [IOB1, IOB2])
@given(two_taggings())
@example([[["B-PER", "B-PER", "I-PER"]], [["B-PER", "I-PER", "B-PER"]]])
def test_f1_of_sound_tags_is_seqevals_by_either_scheme(scheme, taggings):
    gold, guess = ([in_scheme(tags, scheme) for tags in side] for side in taggings)
    assume(any(tag != "O" for tags in gold for tag in tags))
    strict = quiet(seqeval_f1, gold, guess, mode="strict", scheme=scheme, zero_division=0)
    assert value("span_f1", tagged(*gold), guess) == pytest.approx(strict)


def test_span_f1_on_paper():
    """Of 3 true spans 1 is found with its ends and type; 4 are predicted."""
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    guess = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC"]]
    assert value("span_f1", tagged(*gold), guess) == pytest.approx(2 * 1 / (3 + 3))
    guess[1] = ["I-PER", "I-LOC"]
    assert value("span_f1", tagged(*gold), guess) == pytest.approx(2 * 1 / (3 + 4))


WORDS = ("the", "An", "a", "cup", "Cup!", "gold", "U.S.", "-", "", "1066", "\u2014", "the\u00a0cup")
ANSWER = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
ANSWERS = st.lists(st.tuples(ANSWER, st.lists(ANSWER, min_size=1, max_size=3)), min_size=1)


def questions(answers):
    return [SpanExample(i, "?", "", tuple(right), 0) for i, right in enumerate(answers)]


def words_of(text):
    """SQuAD's normalisation, re-derived: no regular expression, no table of characters."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def f1_of_words(predicted, right):
    """Harmonic mean of precision and recall; 0 where nothing is shared."""
    left, shared = Counter(words_of(right)), 0
    for word in words_of(predicted):
        shared += left[word] > 0
        left[word] -= 1
    if shared == 0:
        return Fraction(0)
    precision = Fraction(shared, len(words_of(predicted)))
    recall = Fraction(shared, len(words_of(right)))
    return 2 * precision * recall / (precision + recall)


def torchmetrics_squad(predicted, answers):
    preds = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predicted)]
    target = [
        {"id": str(i), "answers": {"text": list(right), "answer_start": [0] * len(right)}}
        for i, right in enumerate(answers)
    ]
    return {name: float(figure) / 100 for name, figure in squad(preds, target).items()}


@given(ANSWERS)
@example([("The", ["an"])])
@example([("", ["cup"]), ("Cup!", ["the cup", "gold"])])
def test_squad_1_and_record(pairs):
    """evaluate-v1.1.py; ReCoRD's script has the same rules."""
    predicted, answers = zip(*pairs, strict=True)
    theirs = torchmetrics_squad(predicted, answers)
    exact = value("exact_match", questions(answers), predicted)
    assert exact == pytest.approx(theirs["exact_match"])
    f1 = [max(f1_of_words(p, r) for r in right) for p, right in pairs]
    mine = value("token_f1", questions(answers), predicted)
    assert mine == pytest.approx(float(sum(f1) / len(f1)))
    if all(words_of(text) for p, right in pairs for text in (p, *right)):
        assert mine == pytest.approx(theirs["f1"])  # nothing against nothing: 1 there
    entities = [EntityExample(0, "", (), "", (0, 0), tuple(right)) for right in answers]
    assert value("exact_match", entities, predicted) == exact
    assert value("token_f1", entities, predicted) == mine


@given(ANSWERS)
@example([("", ["the", "cup"])])
@example([("The", ["an"])])
def test_squad_2(pairs):
    """evaluate-v2.0.py: an answer of which nothing is left does not count beside others."""
    predicted, answers = zip(*pairs, strict=True)
    exact, f1 = [], []
    for text, right in pairs:
        counted = [answer for answer in right if words_of(answer)] or [""]
        exact.append(any(words_of(text) == words_of(answer) for answer in counted))
        is_none = not words_of(text) and counted == [""]
        f1.append(1 if is_none else max(f1_of_words(text, answer) for answer in counted))
    unanswerable = [*questions(answers), SpanExample(-1, "?", "", (), None)]
    for name, values in (("exact_match", exact), ("token_f1", f1)):
        for extra, text in ((1, ""), (0, "war")):
            expected = float(sum(values) + extra) / (len(values) + 1)
            assert value(name, unanswerable, [*predicted, text]) == pytest.approx(expected)


OPTIONS = st.lists(st.tuples(st.integers(0, 3), BINARY, BINARY), min_size=1, max_size=16)


@given(OPTIONS)
@example([(0, 0, 0), (1, 0, 0)])
@example([(0, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_multirc(options):
    """F1 over all options at once, and the share of questions without a mistake."""
    groups, gold, guess = zip(*options, strict=True)
    theirs = float(binary_f1_score(torch.tensor(guess), torch.tensor(gold)))
    examples = texts(gold, [("passage", group) for group in groups])
    assert value("f1_of_answers", examples, guess) == pytest.approx(theirs)
    wrong = {group for group, label, chosen in options if label != chosen}
    expected = 1 - len(wrong) / len(set(groups))
    assert value("exact_match_of_questions", examples, guess) == pytest.approx(expected)


def test_a_model_that_says_one_thing_has_figures():
    """Constant predictions are what a model gives that learned nothing."""
    gold = texts([0, 1, 1, 0])
    for name in ("accuracy", "f1", "macro_f1", "matthews_correlation", "pearson", "spearman"):
        assert np.isfinite(value(name, gold, [0, 0, 0, 0])), name
