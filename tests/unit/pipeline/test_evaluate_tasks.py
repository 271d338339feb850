"""Tasks: features, scores and baselines; spans by conlleval's rules."""

import pytest
from sklearn.metrics import f1_score

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.features import IGNORED
from pipeline.evaluate.labelled import Columns
from pipeline.evaluate.spans import are_bio_tags, span_f1, spans
from pipeline.evaluate.tasks import build_task, read_task


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def task_of(tmp_path, tokenizer):
    """(train text, test text, suffix) -> Task."""

    def build(train, test, suffix, max_length=32, max_train=None, columns=None):
        paths = [tmp_path / f"{name}{suffix}" for name in ("train", "test")]
        for path, text in zip(paths, (train, test), strict=True):
            path.write_text(text, encoding="utf-8")
        kind = "tagging" if suffix == ".conll" else "classification"
        files = read_task(kind, *paths, columns or Columns(), max_train)
        return build_task(files, tokenizer, max_length)

    return build


# By the rules of conlleval.pl (startOfChunk, endOfChunk), on paper: gold, predicted, F1.
CONLLEVAL = [
    ("B-A I-A O", "B-A I-A O", 1.0),
    ("B-A I-A O", "B-A O O", 0.0),
    ("I-A I-A O", "B-A I-A O", 1.0),  # IOB1 and IOB2 mean the same spans
    ("I-A B-A O", "B-A B-A O", 1.0),
    ("B-A I-B O", "B-A B-B O", 1.0),  # a change of type begins a span
    ("B-A O B-A", "B-A O O", 2 / 3),
    ("B-A I-A I-A", "B-A I-A B-A", 0.0),
    ("O O O", "O O O", 0.0),
    ("B-A B-A O", "B-A I-A O", 0.0),
]


@pytest.mark.parametrize(("gold", "predicted", "expected"), CONLLEVAL)
def test_span_f1(gold, predicted, expected):
    assert span_f1([gold.split()], [predicted.split()]) == pytest.approx(expected)


def test_spans_end_with_their_sentence():
    assert spans(["O", "B-A", "I-A", "I-B", "B-B"]) == [(1, 3, "A"), (3, 4, "B"), (4, 5, "B")]
    assert span_f1([["B-A"], ["I-A"]], [["B-A"], ["I-A"]]) == 1.0
    assert span_f1([["B-A", "I-A"]], [["B-A", "B-A"]]) == 0.0


def test_which_tags_mark_spans():
    assert are_bio_tags(["O", "B-A", "I-B-c"])
    assert not are_bio_tags(["O"])
    assert not are_bio_tags(["O", "NN"])
    assert not are_bio_tags(["O", "B-"])


def test_classification_features(task_of, tokenizer):
    task = task_of("text,label\nthe people,no\nAmerica,yes\n", "text,label\npeace,yes\n", ".csv")
    assert task.files.labels == ("no", "yes")
    assert [f.labels for f in task.train] == [(0,), (1,)]
    assert task.test[0].input_ids.tolist() == [1, *tokenizer.encode("peace"), 2]
    assert task.score([1]) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert task.baselines["majority class"]["accuracy"] == 0.0
    assert task.num_truncated == 0


def test_integer_labels_are_sorted_as_numbers(task_of):
    rows = "text,label\nx,10\ny,9\nz,-1\n"
    assert task_of(rows, rows, ".csv").files.labels == ("-1", "9", "10")


def test_scores_are_those_of_the_labels(task_of):
    train = "text,label\nx,a\ny,b\nz,c\n"
    task = task_of(train, "text,label\n1,a\n2,a\n3,b\n4,c\n", ".csv")
    scores = task.score([0, 1, 1, 2])
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_pairs_are_cut_at_the_longer_text(task_of, tokenizer):
    long, short = "government of the people by the people for the people", "peace"
    train = f"text\ttwo\tlabel\n{long}\t{short}\ta\n{short}\t{long}\tb\n{long}\t{long}\tb\n"
    task = task_of(train, train, ".tsv", 12, columns=Columns(text_pair="two"))
    ids, few = tokenizer.encode(long), tokenizer.encode(short)
    assert len(ids) + len(few) > 9 > len(few)
    assert task.num_truncated == 6
    room = 9 - len(few)
    assert task.train[0].input_ids.tolist() == [1, *ids[:room], 2, *few, 2]
    assert task.train[1].input_ids.tolist() == [1, *few, 2, *ids[:room], 2]
    assert task.train[2].input_ids.tolist() == [1, *ids[:5], 2, *ids[:4], 2]


def test_linear_baseline_beats_the_majority(task_of):
    lines = [f"{w} {n} {w},{w}" for n in range(20) for w in ("war", "peace", "peace")]
    rows = "text,label\n" + "\n".join(lines) + "\n"
    baselines = task_of(rows, rows, ".csv").baselines
    assert baselines["majority class"]["accuracy"] == pytest.approx(2 / 3)
    assert baselines["TF-IDF + logistic regression"]["accuracy"] == 1.0


def test_few_training_examples_are_spread_over_the_file(task_of):
    rows = "text,label\n" + "".join(f"x{i},{i // 50}\n" for i in range(100))
    task = task_of(rows, rows, ".csv", max_train=10)
    assert [f.labels[0] for f in task.train] == [0] * 5 + [1] * 5
    assert len(task.test) == 100
    task_of(rows, rows, ".csv", max_train=1)  # one class is left: no crash


def test_tags_are_on_first_pieces(task_of, tokenizer):
    words = ["unprecedented", "\u200b", "peace"]
    text = "".join(f"{w}\t{t}\n" for w, t in zip(words, ("JJ", "X", "NN"), strict=True))
    task = task_of(text, text, ".conll")
    feature = task.train[0]
    first = tokenizer.encode(words[0])
    assert len(first) > 1
    assert tokenizer.encode(words[1]) == []
    expected_ids = [1, *first, tokenizer.unk_id, *tokenizer.encode(words[2]), 2]
    assert list(feature.input_ids) == expected_ids
    tags = [task.files.labels[label] for label in feature.labels if label != IGNORED]
    assert tags == ["JJ", "X", "NN"]
    assert feature.labels[:2] == (IGNORED, task.files.labels.index("JJ"))
    assert set(feature.labels[2 : 1 + len(first)]) == {IGNORED}


def test_long_sentences_are_cut_between_words(task_of):
    words = [f"w{i}" for i in range(40)]
    tags = ["B-A" if i % 3 == 0 else "O" for i in range(40)]
    text = "".join(f"{w} {t}\n" for w, t in zip(words, tags, strict=True)) + "\nw0 O\n"
    task = task_of(text, text, ".conll", max_length=16)
    assert all(len(f.input_ids) <= 16 for f in task.test)
    labels = [label for f in task.test for label in f.labels if label != IGNORED]
    assert [task.files.labels[label] for label in labels] == [*tags, "O"]
    assert [feature.example for feature in task.test] == [0] * (len(task.test) - 1) + [1]
    assert task.score([tags, ["O"]]) == {"accuracy": 1.0, "macro_f1": 1.0, "span_f1": 1.0}
    assert task.score([["O"] * 40, ["O"]])["span_f1"] == 0.0


def test_most_frequent_tag_baseline(task_of):
    train = "run V\nrun V\nrun N\ndog N\ncat N\n"
    test = "run N\ndog N\nbird N\nrun V\n"
    scores = task_of(train, test, ".conll").baselines["most frequent tag of the word"]
    assert scores["accuracy"] == 0.75  # run is V, the unknown bird N
    assert scores["macro_f1"] == pytest.approx(
        f1_score(["N", "N", "N", "V"], ["V", "N", "N", "V"], average="macro")
    )
    assert "span_f1" not in scores


@pytest.mark.parametrize(
    ("train", "test", "suffix", "message"),
    [
        (
            "text,label\nx,a\ny,b\n",
            "text,label\nx,a\ny,c\n",
            ".csv",
            r"test.csv, line 3: .*no labe",
        ),
        ("x A\ny B\n", "x A\n\nz B\ny C\n", ".conll", r"test.conll, line 4: .*train.conll has no"),
        (
            "text,label\nx,a\ny,a\n",
            "text,label\nx,a\n",
            ".csv",
            r"train.csv: every example has .*'a'",
        ),
    ],
)
def test_labels_that_cannot_be_learned(task_of, train, test, suffix, message):
    with pytest.raises(UserError, match=message):
        task_of(train, test, suffix)
