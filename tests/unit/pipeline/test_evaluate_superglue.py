"""SuperGLUE's eight tasks, SQuAD, RACE and SWAG from files in their own formats."""

import json

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.evaluate import figures
from pipeline.evaluate.catalogue import SUITES, TASKS, find_tasks
from pipeline.evaluate.recipes import Overrides
from pipeline.evaluate.sources import DataSource
from pipeline.evaluate.submissions import FORMATS
from pipeline.evaluate.suite import SuiteOptions, evaluate_tasks
from pipeline.evaluate.suite_report import suite_table
from tests.planted import plant
from tests.task_files import write_lines, write_reading, write_superglue

SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "superglue-rte", "wic", "wsc"]
READING = ["squad", "squad2", "race", "swag"]


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals cost a second a figure; whether they are right is a test of figures."""
    monkeypatch.setattr(figures, "NUM_DRAWS", 50)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superglue")
    return write_reading(write_superglue(folder))


def run(exported, files, names, **options):
    source = DataSource(str(files))
    report = evaluate_tasks(
        exported.folder, find_tasks(names), source, SuiteOptions(device="cpu", **options)
    )
    assert report is not None
    return report


def test_all_tasks_are_trained(exported, files, tmp_path):
    report = run(
        exported,
        files,
        "superglue,reading",
        seeds=2,
        overrides=Overrides(epochs=1, batch_size=4, max_length=40),
        predictions=tmp_path,
        bf16=True,
    )
    assert list(report.recipes) == SUPERGLUE + READING
    assert {f.task for f in report.figures} == set(SUPERGLUE + READING)
    for f in report.figures:
        assert len(f.by_seed) == 2
        assert (-1 if f.figure == "matthews_correlation" else 0) <= f.mean <= 1
    assert len(report.averages["superglue"]["pretrained"]) == 2
    assert "reading" not in report.averages, "figures of other kinds have no average"
    names = {"BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC", "SWAG"}
    names |= {"AX-b", "AX-g"}
    expected = {f"{name}.jsonl" for name in names} | {"SQuAD-1.1.json", "SQuAD-2.0.json"}
    for seed in (0, 1):
        assert {p.name for p in (tmp_path / f"pretrained-seed-{seed}").iterdir()} == expected
    assert suite_table(report).row_count == len(report.figures) + 1


def test_planted_predictor_is_perfect_everywhere(exported, files, tmp_path, monkeypatch):
    plant(monkeypatch)
    report = run(exported, files, "superglue,reading", seeds=1, predictions=tmp_path)
    for f in report.figures:
        if f.figure != "gender_parity":  # the labels of pairs differ
            assert f.by_seed == (1.0,), (f.task, f.figure)
    shown = [(f.part, f.figure) for f in report.figures if f.task == "superglue-rte"]
    diagnostics = [("AX-b", "matthews_correlation"), ("AX-g", "accuracy")]
    assert shown == [("", "accuracy"), *diagnostics, ("AX-g", "gender_parity")]
    assert report.averages["superglue"]["pretrained"] == (1.0,)
    written = tmp_path / "pretrained-seed-0"
    first = {p.name: json.loads(p.read_text().splitlines()[0]) for p in written.glob("*.jsonl")}
    assert first["BoolQ.jsonl"] == {"idx": 0, "label": "false"}
    assert first["CB.jsonl"] == {"idx": 0, "label": "entailment"}
    assert first["COPA.jsonl"] == {"idx": 0, "label": 0}
    assert first["WiC.jsonl"] == {"idx": 0, "label": "false"}
    assert first["WSC.jsonl"] == {"idx": 0, "label": "False"}
    assert first["ReCoRD.jsonl"]["label"] in ("people", "America")
    answers = [{"idx": 0, "label": 0}, {"idx": 1, "label": 0}]
    questions = [{"idx": 0, "answers": answers}]
    assert first["MultiRC.jsonl"] == {"idx": 0, "passage": {"questions": questions}}
    found = json.loads((written / "SQuAD-2.0.json").read_text())
    assert found == {f"q{i}": "" for i in range(6)}, "predicted without a look at the answers"
    spec = TASKS["squad2"]
    examples = DataSource(str(files)).read(spec, [spec.scored[""]], True)
    text = FORMATS["squad"](spec, examples, ["war"] * 6)
    assert json.loads(text) == {f"q{i}": "war" for i in range(6)}


def test_shuffled_predictor_is_chance_everywhere(exported, tmp_path, monkeypatch):
    folder = write_reading(write_superglue(tmp_path, train=3, dev=300), train=3, dev=300)
    plant(monkeypatch, np.random.default_rng(0))
    report = run(exported, folder, "superglue,race,swag,squad2", seeds=1)
    values = {(f.task, f.figure): f.mean for f in report.figures}
    for task in ("boolq", "copa", "superglue-rte", "wic", "wsc"):
        assert values[task, "accuracy"] == pytest.approx(1 / 2, abs=0.12), task
    assert values["cb", "accuracy"] == pytest.approx(1 / 3, abs=0.12)
    assert values["cb", "macro_f1"] == pytest.approx(1 / 3, abs=0.12)
    for task in ("race", "swag"):
        assert values[task, "accuracy"] == pytest.approx(1 / 4, abs=0.1), task
    for figure in ("exact_match", "token_f1"):
        assert values["record", figure] == pytest.approx(1 / 2, abs=0.12)
    # Of all options 3 in 4 are true, and as many are predicted, at random.
    assert values["multirc", "f1_of_answers"] == pytest.approx(3 / 4, abs=0.1)
    assert values["multirc", "exact_match_of_questions"] < 0.6
    # A third has no answer and a third gets none; the rest points at the wrong one in half.
    assert 1 / 9 - 0.06 < values["squad2", "exact_match"] < 0.45


def test_columns_of_datasets(tmp_path):
    source = DataSource(str(tmp_path))

    def first(name, values):
        spec = TASKS[name]
        write_lines(tmp_path / spec.folder / "train.jsonl", [values])
        return source.read(spec, spec.train, True)[0]

    idx = {"paragraph": 1, "question": 2, "answer": 3}
    row = {"paragraph": "war", "question": "who", "answer": "we", "idx": idx, "label": 1}
    example = first("multirc", row)
    assert (example.key, example.group, example.text_pair) == ((1, 2, 3), (1, 2), "who we")
    row = {"passage": "We and Ann saw we.", "query": "X @placeholder", "entities": ["we", "Ann"]}
    row |= {"answers": ["Ann"], "idx": {"passage": 0, "query": 9}}
    example = first("record", row)
    assert [example.passage[a:b] for a, b in example.entities] == ["Ann", "we"]
    assert (example.key, example.gap) == (9, (2, 14))
    row = {"text": "Ann's cat saw her .", "span1_index": 0, "span1_text": "ann", "span2_index": 3}
    example = first("wsc", {**row, "span2_text": "her", "idx": 4, "label": 1})
    marked = [example.texts[text][a:b] for text, (a, b) in example.marks]
    assert (marked, example.label) == (["Ann", "her"], 1)
    answers = {"text": ["war"], "answer_start": [4]}
    row = {"id": "a", "title": "t", "context": "The war.", "question": "what", "answers": answers}
    example = first("squad2", row)
    assert (example.answers, example.start) == (("war",), 4)
    example = first("squad2", {**row, "answers": {"text": [], "answer_start": []}})
    assert (example.answers, example.start) == ((), None)
    row = {"example_id": "high1", "article": "a", "question": "b _", "options": ["c", "d"]}
    example = first("race", {**row, "answer": "B"})
    assert (example.key, example.label, example.choices[1]) == ("high1-0", 1, ("a", "b _ d"))


def test_causes_come_first(files):
    examples = DataSource(str(files)).read(TASKS["copa"], TASKS["copa"].train, True)
    assert [pair[1] for pair in examples[0].choices] == ["They fell."] * 2
    assert [pair[0] for pair in examples[1].choices] == ["They fell."] * 2


RACE = {"article": "a", "questions": ["b"], "options": [["c", "d"]]}
WIC = {"sentence1": "the bank", "sentence2": "bank", "start1": 4, "end1": 8, "start2": 0, "end2": 4}
WSC = {"text": "Ann saw her", "span1_index": 0, "span1_text": "Ann", "span2_index": 2}
WSC |= {"span2_text": "her", "idx": 0, "label": 1}
SQUAD = {"id": "a", "context": "The war", "question": "what"}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("boolq", {"question": "a", "label": True}, r"BoolQ/train.jsonl, line 1: no column 'pass"),
        ("copa", {"premise": 3}, r"premise is 3, which is no text"),
        ("multirc", {"passage": "x", "idx": 0}, r"line 1: passage is 'x', which is no object"),
        (
            "multirc",
            {"passage": {"text": "x", "questions": [{"question": "q"}]}, "idx": 0},
            r"line 1, passage, questions: no column 'answers'; there are 'question'",
        ),
        ("record", {"passage": {"text": "a", "entities": 1}, "qas": []}, r"entities is 1, which"),
        ("wic", {"sentence1": "a", "sentence2": "b", "start1": "x"}, r"start1 is 'x', which is no"),
        ("swag", {"sent1": "a", "sent2": "b", "label": 0}, r"no column 'ending0'; there are"),
        (
            "race",
            {"article": "a", "questions": ["b"], "options": [["c"]], "answers": []},
            r"1 questions, 1 lists of options and 0 answers",
        ),
        (
            "squad",
            {"context": "a", "answers": []},
            r"SQuAD-1.1/train.jsonl, line 1: no column 'id'",
        ),
        ("race", {**RACE, "answers": ["C"]}, r"answer is 'C'; the classes are A, B"),
        ("wic", {**WIC, "end2": 99}, r"line 1: the word is at the characters 0 to 99 of a text wi"),
        ("wsc", {**WSC, "span2_index": 9}, r"span2_index is 9, but the text has 3 words, counted"),
        ("wsc", {**WSC, "span1_index": -1}, r"span1_index is -1, but the text has 3 words"),
        ("wsc", {**WSC, "text": ""}, r"span1_index is 0, but the text has 0 words"),
        (
            "record",
            {"passage": {"text": "We won", "entities": [{"start": 0, "end": 6}]}, "qas": []},
            r"an entity is at the characters 0 to 7 of a text with 6: 'We won'",
        ),
        (
            "squad",
            {**SQUAD, "answers": {"text": ["war"], "answer_start": [-1]}},
            r"answer is at th",
        ),
        (
            "squad",
            {**SQUAD, "answers": {"text": ["war"], "answer_start": [6]}},
            r"6 to 9 of a text",
        ),
        (
            "squad",
            {**SQUAD, "answers": {"text": ["war"], "answer_start": []}},
            r"1 texts, but 0 pl",
        ),
        ("squad", {"title": "a"}, r"no column 'paragraphs'; there are 'title': is this the file"),
    ],
)
def test_wrong_columns_of_nested_records(exported, tmp_path, name, values, message):
    spec = TASKS[name]
    write_lines(tmp_path / spec.folder / "train.jsonl", [values])
    source = DataSource(str(tmp_path))
    with pytest.raises(UserError, match=message):
        evaluate_tasks(exported.folder, (spec,), source, SuiteOptions(device="cpu"))


def test_json_documents_that_are_none(exported, tmp_path):
    path = tmp_path / "SQuAD-1.1" / "train-v1.1.json"
    path.parent.mkdir()
    spec, source = TASKS["squad"], DataSource(str(tmp_path))
    for content, message in (("{", r"not JSON in UTF-8"), ('{"data": 3}', r"holds no JSON object")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            source.read(spec, spec.train, True)


def test_suites_hold_what_the_papers_ran():
    assert [spec.name for spec in SUITES["superglue"]] == SUPERGLUE
    assert [spec.name for spec in SUITES["reading"]] == READING


def test_diagnostics_are_read_where_they_have_labels(exported, tmp_path, monkeypatch):
    """They are no part of the average, and a folder without them is whole."""
    folder = write_superglue(tmp_path, train=3, dev=40)
    path = folder / "AX-g" / "AX-g.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    spec, source = TASKS["superglue-rte"], DataSource(str(folder))
    assert source.has_labels(spec, spec.diagnostics["AX-b"].split)
    for hidden in ({"label": None}, {"label": -1}):
        write_lines(path, [{**row, **hidden} for row in rows])
        assert not source.has_labels(spec, spec.diagnostics["AX-g"].split)
    plant(monkeypatch)
    names = {f.part for f in run(exported, folder, "superglue-rte", seeds=1).figures}
    assert names == {"", "AX-b"}
    (folder / "AX-b" / "AX-b.jsonl").unlink()
    assert {f.part for f in run(exported, folder, "superglue-rte", seeds=1).figures} == {""}


def test_pairs_of_winogender_on_paper(tmp_path):
    """Of three pairs one gets two predictions; pairs are told by their column or are neighbours."""
    spec, source = TASKS["superglue-rte"], DataSource(str(tmp_path))
    split = spec.diagnostics["AX-g"].split
    row = {"premise": "He left.", "hypothesis": "The boy left.", "label": "entailment"}
    (tmp_path / "RTE").mkdir()
    for pairs, expected in ((None, 2 / 3), ([0, 1, 0, 1, 2, 2], 0.0)):
        rows = [{**row, "idx": i} | ({"pair_id": pairs[i]} if pairs else {}) for i in range(6)]
        write_lines(tmp_path / "AX-g" / "AX-g.jsonl", rows)
        examples = source.read(spec, [split], True)
        figure = figures.FIGURES["gender_parity"]
        assert figure.value(figure.rows(examples, [0, 0, 1, 1, 0, 1])) == pytest.approx(expected)


def test_levels_of_race_are_shown_apart(exported, files, monkeypatch):
    plant(monkeypatch, np.random.default_rng(1))
    report = run(exported, files, "race", seeds=1)
    means = {f.part: f.mean for f in report.figures}
    assert list(means) == ["", "middle", "high"]
    assert report.counts["race"] == {"train": 6, "": 6, "middle": 3, "high": 3}
    assert means[""] == pytest.approx((means["middle"] + means["high"]) / 2)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RACE/test/high/1.txt", {}),
        ("RACE/test_high.jsonl", {}),
        ("RACE/test.jsonl", {"example_id": "high12.txt"}),
    ],
)
def test_where_the_level_of_race_is_told(tmp_path, name, values):
    article = {"article": "a", "questions": ["b"], "options": [["c", "d"]], "answers": ["A"]}
    write_lines(tmp_path / name, [{**article, **values}])
    spec = TASKS["race"]
    (example,) = DataSource(str(tmp_path)).read(spec, [spec.scored[""]], True)
    assert example.group == "high"
