"""Inputs and predictions of the kinds: windows, marks, answers and padding."""

import numpy as np
import pytest
import torch

from pipeline.evaluate.examples import (
    ChoiceExample,
    EntityExample,
    MarkedExample,
    SpanExample,
    TaggedExample,
)
from pipeline.evaluate.features import IGNORED, collate
from pipeline.evaluate.heads import mark_means
from pipeline.evaluate.kind import Limits
from pipeline.evaluate.kinds import find_kind
from pipeline.evaluate.places import tokens_of, windows

CPU = torch.device("cpu")
CONTEXT = (
    "The people of America \ufb01nd hope \U0001f600 in 1066, and peace in 1900. Unprecedented "
    "years of great constitutional questions followed those memorable days."
)


def test_offsets_are_characters(tokenizer):
    ids, offsets = tokenizer.encode_with_offsets(CONTEXT)
    assert ids == tokenizer.encode(CONTEXT)
    assert offsets.shape == (len(ids), 2)
    assert "".join(CONTEXT[a:b] for a, b in offsets) == CONTEXT
    at = CONTEXT.index("1066")
    first, end = tokens_of(offsets, (at, at + 4))
    assert CONTEXT[offsets[first, 0] : offsets[end - 1, 1]].strip() == "1066"
    empty, none = tokenizer.encode_with_offsets("")
    assert (empty, none.shape) == ([], (0, 2))


def test_windows_cover_a_text():
    assert windows(10, 20, 5) == [(0, 10)]
    assert windows(0, 20, 5) == [(0, 0)]
    assert windows(10, 4, 1) == [(0, 4), (3, 7), (6, 10)]
    assert windows(10, 4, 100) == [(0, 4), (2, 6), (4, 8), (6, 10)]


def span_example(answer=None):
    start = None if answer is None else CONTEXT.index(answer)
    return SpanExample("q", "when", CONTEXT, (answer,) if answer else (), start)


def planted_outputs(features):
    return [
        np.stack([np.eye(len(f.input_ids), dtype=np.float32)[label] for label in f.labels])
        for f in features
    ]


@pytest.mark.parametrize("answer", ["1066", "America", "\ufb01nd hope \U0001f600", "1900", None])
def test_answers_come_back_from_windows(tokenizer, answer):
    kind, num_outputs = find_kind("span", allows_no_answer=True)
    assert num_outputs == 2
    example = span_example(answer)
    features = kind.features([example], tokenizer, Limits(30, stride=12))
    assert len(features) > 2
    assert all(len(f.input_ids) <= 30 for f in features)
    has_answer = [f.labels != (0, 0) for f in features]
    assert any(has_answer) == (answer is not None)
    if answer is not None:
        outputs = planted_outputs(features)
        outputs = [out * (2 if ok else 0) for out, ok in zip(outputs, has_answer, strict=True)]
        assert kind.predictions(outputs, features, [example]) == [answer]
    else:
        assert kind.predictions(planted_outputs(features), features, [example]) == [""]


def test_no_answer_is_for_squad_2_only(tokenizer):
    example = span_example(None)
    for allows, expected in ((True, ""), (False, "The")):
        kind, _ = find_kind("span", allows_no_answer=allows)
        (feature,) = kind.features([example], tokenizer, Limits(80))
        output = np.zeros((2, len(feature.input_ids)), dtype=np.float32)
        output[:, 0] = 5.0
        place = int(np.flatnonzero(feature.offsets[:, 0] >= 0)[0])
        output[:, place] = 1.0
        assert kind.predictions([output], [feature], [example]) == [expected]


def test_answers_stay_in_the_text_in_order_and_short(tokenizer):
    kind, _ = find_kind("span")
    example = span_example("1066")
    (feature,) = kind.features([example], tokenizer, Limits(80))
    places = np.flatnonzero(feature.offsets[:, 0] >= 0)
    output = np.zeros((2, len(feature.input_ids)), dtype=np.float32)
    output[0, 1], output[1, 1] = 9.0, 9.0  # the question
    output[0, places[30]], output[1, places[2]] = 8.0, 8.0  # end before start
    output[0, places[0]], output[1, places[31]] = 2.0, 3.0  # 32 tokens: too long
    found = kind.predictions([output], [feature], [example])[0]
    begin, end = feature.offsets[places[30], 0], feature.offsets[places[31], 1]
    assert found == CONTEXT[begin:end].strip()


def test_span_loss_by_hand(tokenizer):
    kind, _ = find_kind("span")
    features = kind.features([span_example("1066"), span_example("1900")], tokenizer, Limits(80))
    batch = collate(features, CPU, kind.label_dtype)
    generator = torch.Generator().manual_seed(0)
    logits_B2L = torch.randn(2, 2, batch.mask.shape[1], generator=generator)
    expected = -torch.stack(
        [logits_B2L[b, k].log_softmax(-1)[features[b].labels[k]] for b in (0, 1) for k in (0, 1)]
    ).mean()
    assert kind.loss(logits_B2L, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_marks_of_two_texts(tokenizer):
    kind, _ = find_kind("marked", ("a", "b"))
    texts = ("The people of America", "in America there is peace")
    places = [(i, (t.index("America"), t.index("America") + 7)) for i, t in enumerate(texts)]
    example = MarkedExample(0, texts, tuple(places), 1)
    for max_length in (80, 10):
        (feature,) = kind.features([example], tokenizer, Limits(max_length))
        assert len(feature.input_ids) <= max_length
        for start, end in feature.marks:
            assert tokenizer.decode(feature.input_ids[start:end]) == "America"
        assert feature.num_cut == (max_length == 10)


def test_long_texts_keep_their_marked_place(tokenizer):
    kind, _ = find_kind("marked", ("a", "b"))
    for texts in ((CONTEXT, "America"), (CONTEXT,)):
        last = (0, (CONTEXT.index("memorable"), CONTEXT.index("memorable") + 9))
        example = MarkedExample(0, texts, (last, last), 1)
        (feature,) = kind.features([example], tokenizer, Limits(24))
        assert len(feature.input_ids) <= 24
        for start, end in feature.marks:
            assert tokenizer.decode(feature.input_ids[start:end]) == "memorable"


def test_mean_of_a_marked_place():
    states_BLD = torch.arange(12.0).reshape(1, 4, 3)
    means = mark_means(states_BLD, torch.tensor([[[1, 3], [0, 1], [0, 0]]]))
    assert means.tolist() == [[[4.5, 5.5, 6.5], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]]


def test_entities_of_all_windows_are_judged(tokenizer):
    kind, num_outputs = find_kind("entity")
    names = ("people", "America", "1066", "1900")
    places = tuple((CONTEXT.index(n), CONTEXT.index(n) + len(n)) for n in names)
    query = "They knew @placeholder then"
    gap = (query.index("@"), query.index("@") + len("@placeholder"))
    example = EntityExample(7, CONTEXT, places, query, gap, ("1066",))
    features = kind.features([example], tokenizer, Limits(36, stride=12))
    assert num_outputs == 1
    assert len(features) > 2
    seen = set()
    for feature in features:
        (start, end), *marks = feature.marks
        assert feature.input_ids[start:end].tolist() == [tokenizer.mask_id]
        assert len(marks) == len(feature.marked) == len(feature.labels) - 1
        assert feature.labels[0] == IGNORED
        for entity, (a, b), label in zip(feature.marked, marks, feature.labels[1:], strict=True):
            assert tokenizer.decode(feature.input_ids[a:b]).strip(" ,.") == names[entity]
            assert label == (names[entity] == "1066")
            seen.add(entity)
    assert seen == {0, 1, 2, 3}
    outputs = [np.array(f.labels, dtype=np.float32) for f in features]
    assert kind.predictions(outputs, features, [example]) == ["1066"]
    nothing = EntityExample(7, CONTEXT, (), query, gap, ("1066",))
    features = kind.features([nothing], tokenizer, Limits(80))
    assert kind.predictions([np.zeros(1)], features, [nothing]) == [""]


def test_entity_loss_ignores_the_gap_and_padding(tokenizer):
    kind, _ = find_kind("entity")
    two = EntityExample(0, CONTEXT, ((4, 10), (14, 21)), "a @", (2, 3), ("people",))
    one = EntityExample(1, CONTEXT, ((4, 10),), "a @", (2, 3), ("hope",))
    features = kind.features([two, one], tokenizer, Limits(80))
    batch = collate(features, CPU, kind.label_dtype)
    logits = torch.tensor([[9.0, 1.0, -2.0], [9.0, 0.5, 7.0]])
    chosen, labels = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(chosen, labels)
    assert kind.loss(logits, batch).item() == pytest.approx(expected.item())
    batch = collate(features[1:], CPU, kind.label_dtype)
    alone = torch.nn.functional.softplus(torch.tensor(0.5)).item()
    assert kind.loss(torch.tensor([[9.0, 0.5]]), batch).item() == pytest.approx(alone)


def test_choices_that_an_example_lacks_never_win(tokenizer):
    from types import SimpleNamespace

    kind, _ = find_kind("multiple-choice")
    pairs = (("war", "peace"), ("hope", "war"), ("we", "us"))
    examples = [ChoiceExample(0, pairs, 0), ChoiceExample(1, pairs[:2], 1)]
    features = kind.features(examples, tokenizer, Limits(20))
    batch = collate(features, CPU, kind.label_dtype)
    assert batch.input_ids.shape[:2] == (2, 3)
    model = lambda *_, **__: SimpleNamespace(logits=torch.tensor([[0.0, 1, 2], [0.0, 1, 2]]))  # noqa: E731
    logits = kind.logits(model, batch)
    assert kind.predictions(list(logits.numpy()), features, examples) == [2, 1]
    assert torch.isfinite(kind.loss(logits, batch))


def test_tags_without_public_labels(tokenizer):
    kind, _ = find_kind("tagging", ("O", "B-A"))
    example = TaggedExample(0, ("America", "unprecedented", "hope"), None)
    features = kind.features([example], tokenizer, Limits(40))
    outputs = [np.tile([0.0, 1.0], (len(f.input_ids), 1)) for f in features]
    assert kind.predictions(outputs, features, [example]) == [["B-A"] * 3]
