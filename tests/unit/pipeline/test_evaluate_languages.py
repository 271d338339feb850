"""CoNLL-2003, XNLI in its three ways and ANLI, from files in their own formats."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.evaluate import figures
from pipeline.evaluate.catalogue import SUITES, TASKS, find_tasks
from pipeline.evaluate.features import IGNORED
from pipeline.evaluate.inference import LANGUAGES
from pipeline.evaluate.kind import Limits
from pipeline.evaluate.kinds import find_kind
from pipeline.evaluate.recipes import Overrides
from pipeline.evaluate.sources import DataSource
from pipeline.evaluate.suite import SuiteOptions, evaluate_tasks
from tests.planted import plant
from tests.task_files import write_inference, write_lines, write_ner


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals cost a second a figure; whether they are right is a test of figures."""
    monkeypatch.setattr(figures, "NUM_DRAWS", 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_ner(write_inference(tmp_path_factory.mktemp("languages")))


def run(exported, files, names, **options):
    source = DataSource(str(files))
    report = evaluate_tasks(
        exported.folder, find_tasks(names), source, SuiteOptions(device="cpu", **options)
    )
    assert report is not None
    return report


def test_tasks_are_trained(exported, files):
    overrides = Overrides(epochs=1, batch_size=8, max_length=24)
    names = "conll2003,xnli-zero-shot,xnli-translate-train-de,anli"
    report = run(exported, files, names, seeds=2, overrides=overrides)
    parts = {}
    for f in report.figures:
        parts.setdefault(f.task, []).append(f.part)
    assert parts == {
        "conll2003": ["dev", "test"],
        "xnli-zero-shot": list(LANGUAGES),
        "xnli-translate-train-de": [""],
        "anli": ["R1", "R2", "R3"],
    }
    assert dict(report.counts["anli"]) == {"train": 18, "R1": 7, "R2": 8, "R3": 9}
    means = [np.mean([f.by_seed[s] for f in report.figures if "zero" in f.task]) for s in (0, 1)]
    assert report.averages == {"xnli-zero-shot": {"pretrained": pytest.approx(tuple(means))}}


def test_planted_predictors(exported, files, tmp_path, monkeypatch):
    plant(monkeypatch)
    names = "ner,xnli,xnli-translate-train,anli"
    report = run(exported, files, names, seeds=1)
    assert {f.by_seed for f in report.figures} == {(1.0,)}
    assert report.averages["xnli-translate-train"] == {"pretrained": (1.0,)}
    folder = write_ner(write_inference(tmp_path, train=3, test=300), train=3, test=300)
    plant(monkeypatch, np.random.default_rng(0))
    report = run(exported, folder, "ner,anli,xnli-translate-train-fr", seeds=1)
    for f in report.figures:
        if f.task == "conll2003":
            # Of words 2 in 5 have a tag, one of two: a span of two is right by 1 in 25, and its
            # ends are right by less.
            assert f.mean < 0.06
        else:
            assert f.mean == pytest.approx(1 / 3, abs=0.1), f.task


def test_what_is_trained_on_and_tested(files):
    source = DataSource(str(files))

    def languages(examples):
        return sorted({example.text.split()[0] for example in examples})

    zero, together = TASKS["xnli-zero-shot"], TASKS["xnli-translate-train-all"]
    assert languages(source.read(zero, zero.train, True)) == ["en"]
    assert languages(source.read(together, together.train, True)) == sorted(LANGUAGES)
    for spec in (zero, together):
        assert list(spec.scored) == list(LANGUAGES)
        for language, split in spec.scored.items():
            assert languages(source.read(spec, [split], True)) == [language]
    assert len(SUITES["xnli-translate-train"]) == 15
    swahili = TASKS["xnli-translate-train-sw"]
    assert languages(source.read(swahili, swahili.train, True)) == ["sw"]
    assert [split.config for split in swahili.train] == ["sw"]
    labels = [e.label for e in source.read(swahili, swahili.train, True)]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2], "contradictory is contradiction"


def test_languages_as_datasets_keeps_them(tmp_path):
    spec, source = TASKS["xnli-zero-shot"], DataSource(str(tmp_path))
    for language in ("en", "de"):
        row = {"premise": language, "hypothesis": "so", "label": 2}
        write_lines(tmp_path / "XNLI" / language / "test.jsonl", [row])
    assert [e.text for e in source.read(spec, [spec.scored["de"]], True)] == ["de"]


def test_tags_of_datasets_and_wrong_ones(tmp_path):
    spec, source = TASKS["conll2003"], DataSource(str(tmp_path))
    path = tmp_path / "conll2003" / "train.jsonl"
    write_lines(path, [{"id": "0", "tokens": ["a", "b"], "ner_tags": [0, 5]}])
    (example,) = source.read(spec, spec.train, True)
    assert example.tag_names == ("O", "B-LOC")
    write_lines(path, [{"tokens": ["a", "b"], "ner_tags": [0]}])
    with pytest.raises(UserError, match=r"train.jsonl, line 1: 2 tokens, but 1 tags"):
        source.read(spec, spec.train, True)
    write_lines(path, [{"tokens": ["a"], "ner_tags": ["B-GENE"]}])
    with pytest.raises(UserError, match=r"ner_tags is 'B-GENE'; the classes are O, B-PER"):
        source.read(spec, spec.train, True)
    write_lines(path, [{"words": ["a"], "label": 1}])
    with pytest.raises(UserError, match=r"no column 'ner_tags' or 'tags'; there are 'words'"):
        source.read(spec, spec.train, True)


def test_own_files_of_other_kinds(exported, tmp_path, capsys):
    from pipeline.commands_evaluate import evaluate_command

    def write(kind, make, suffix=".jsonl"):
        for name, count in (("train", 12), ("test", 6)):
            path = tmp_path / f"{kind}-{name}{suffix}"
            write_lines(path, [make(i) for i in range(count)])
        return {"train": tmp_path / f"{kind}-train{suffix}", "test": path, "kind": kind}

    def evaluate(arguments, **options):
        arguments = {**arguments, "seeds": 1, "epochs": 1, "max_length": 24, "device": "cpu"}
        evaluate_command(exported.folder, as_json=True, **arguments, **options)
        return json.loads(capsys.readouterr().out)["finetune"]

    def numbered(i):
        return {"text": f"war {i}", "other": "hope", "label": i / 2}

    result = evaluate(write("regression", numbered), text_pair_column="other")
    assert set(result["summary"]["pretrained"]) == {"pearson", "spearman"}
    assert result["baselines"] == {"mean of the training file": {"pearson": 0.0, "spearman": 0.0}}

    def chosen(i):
        return {"text": "war", "choices": ["a", "b", "c"][: 2 + i % 2], "label": i % 2}

    result = evaluate(write("multiple-choice", chosen), random_start=False)
    assert [run["start"] for run in result["runs"]] == ["pretrained"]
    assert result["baselines"]["most frequent place"]["accuracy"] == 0.5

    def asked(i):
        answers = [{"text": "war", "answer_start": 4}] if i % 2 else []
        return {"id": str(i), "context": "The war.", "question": "what", "answers": answers}

    result = evaluate(write("span", asked), bf16=True)
    assert set(result["summary"]["random"]) == {"exact_match", "token_f1"}
    assert result["baselines"]["no answer"]["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("regression", {"text": "a", "label": "high"}, r"a.jsonl, line 1: label is 'high', which"),
        ("regression", {"text": "a", "label": float("inf")}, r"label is inf, which is no number"),
        ("multiple-choice", {"text": "a", "choices": "b", "label": 0}, r"choices is 'b', which is"),
        ("multiple-choice", {"text": "a", "choices": ["b"], "label": 1}, r"label is 1, but there"),
        ("span", {"context": "a", "id": 1, "question": "b"}, r"no column 'answers'; there are"),
    ],
)
def test_wrong_own_files(tmp_path, kind, row, message):
    from pipeline.evaluate.labelled import Columns
    from pipeline.evaluate.tasks import read_task

    path = tmp_path / "a.jsonl"
    write_lines(path, [row])
    with pytest.raises(UserError, match=message):
        read_task(kind, path, path, Columns(), None)
    path.write_text("\n")
    with pytest.raises(UserError, match=r"a.jsonl: holds no examples"):
        read_task(kind, path, path, Columns(), None)


def test_sentences_of_a_document_are_read_together(tmp_path, tokenizer):
    """As many whole ones as fit; the tags of each sentence are found again."""
    path = tmp_path / "CoNLL-2003" / "eng.train"
    path.parent.mkdir()
    sentences = [["war", "peace"], ["hope"], ["the", "people", "of"], ["America"], ["war", "war"]]
    lines = ["-DOCSTART- -X- O O", ""]
    for number, words in enumerate(sentences):
        lines += ["-DOCSTART- -X- O O", ""] if number == 3 else []
        lines += [f"{word} NN I-NP {('O', 'I-LOC')[number % 2]}" for word in words] + [""]
    path.write_text("\n".join(lines))
    spec = TASKS["conll2003"]
    examples = DataSource(str(tmp_path)).read(spec, spec.train, True)
    assert [example.document for example in examples] == [1, 1, 1, 2, 2]
    kind, num_outputs = find_kind("tagging", spec.labels)

    def counts(features):
        return [sum(label != IGNORED for label in feature.labels) for feature in features]

    assert counts(kind.features(examples, tokenizer, Limits(128))) == [6, 3]
    size = [sum(map(len, tokenizer.encode_batch(words))) for words in sentences]
    # The third sentence does not fit beside the first two, by one token.
    features = kind.features(examples, tokenizer, Limits(2 + sum(size[:3]) - 1))
    assert counts(features) == [3, 3, 3]
    assert [feature.example for feature in features] == [0, 2, 3]
    outputs = [np.eye(num_outputs)[np.maximum(feature.labels, 0)] for feature in features]
    found = kind.predictions(outputs, features, examples)
    assert found == [list(example.tag_names) for example in examples]
    alone = [replace(example, document=None) for example in examples]
    assert counts(kind.features(alone, tokenizer, Limits(128))) == [2, 1, 3, 1, 2]
