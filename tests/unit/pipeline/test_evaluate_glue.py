"""GLUE's nine tasks from files in its own format: trained, planted predictors, submissions."""

import json
import shutil

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.commands_evaluate import evaluate_command
from pipeline.evaluate import figures
from pipeline.evaluate.catalogue import SUITES, TASKS, find_tasks
from pipeline.evaluate.recipes import Overrides, choose_recipe
from pipeline.evaluate.sources import DataSource
from pipeline.evaluate.suite import SuiteOptions, evaluate_tasks
from tests.planted import plant
from tests.task_files import NLI, write_glue

NAMES = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
FILES = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "AX", "QNLI", "RTE", "WNLI"}


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals cost a second a figure; whether they are right is a test of figures."""
    monkeypatch.setattr(figures, "NUM_DRAWS", 50)


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


def scored(report):
    """(task, part, figure) -> values by seed."""
    return {(f.task, f.part, f.figure): f.by_seed for f in report.figures}


def test_command_runs_all_nine_tasks(exported, glue, tmp_path, capsys):
    evaluate_command(
        exported.folder,
        task="glue",
        data=str(glue),
        seeds=3,
        epochs=1,
        batch_size=8,
        max_length=16,
        device="cpu",
        as_json=True,
        results=tmp_path / "results",
        predictions=tmp_path / "predictions",
    )
    printed = capsys.readouterr()
    values = json.loads(printed.out)["tasks"]
    assert list(values["tasks"]) == NAMES
    assert len(printed.err.splitlines()) == 27
    for name, task in values["tasks"].items():
        assert task["examples"]["train"] == 12
        assert "experiments/glue" in task["recipe"]["source"] or name == "wnli"
        for figure in task["figures"]:
            assert len(figure["by_seed"]) == 3
            assert figure["mean"] == pytest.approx(np.mean(figure["by_seed"]))
            assert figure["std"] == pytest.approx(np.std(figure["by_seed"], ddof=1))
            low, high = figure["interval"]
            assert low <= figure["mean"] <= high, name
    assert len(values["averages"]["glue"]["pretrained"]) == 3
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == values
    for seed in range(3):
        written = tmp_path / "predictions" / f"pretrained-seed-{seed}"
        assert {path.name for path in written.iterdir()} == {f"{name}.tsv" for name in FILES}


def test_planted_predictor_is_perfect(exported, glue, tmp_path, monkeypatch):
    plant(monkeypatch)
    options = SuiteOptions(seeds=1, device="cpu", predictions=tmp_path)
    report = evaluate_tasks(exported.folder, SUITES["glue"], DataSource(str(glue)), options)
    assert report is not None
    values = scored(report)
    assert {name for name, _, _ in values} == set(NAMES)
    for key, by_seed in values.items():
        assert by_seed == pytest.approx((1.0,)), key
    assert report.averages["glue"]["pretrained"] == pytest.approx((1.0,))
    # The submissions that GLUE's server takes: unlabelled splits are planted with the first class.
    written = tmp_path / "pretrained-seed-0"
    lines = (written / "MNLI-mm.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\tentailment" for i in range(5))]
    assert (written / "QNLI.tsv").read_text().splitlines()[1] == "0\tentailment"
    assert (written / "CoLA.tsv").read_text().splitlines()[:2] == ["index\tprediction", "0\t0"]
    assert (written / "STS-B.tsv").read_text().splitlines()[1] == "0\t0.000"
    assert len((written / "AX.tsv").read_text().splitlines()) == 6


def test_shuffled_predictor_is_chance(exported, tmp_path, monkeypatch):
    folder = write_glue(tmp_path, dev=600, train=3)
    plant(monkeypatch, np.random.default_rng(0))
    options = SuiteOptions(seeds=1, device="cpu")
    report = evaluate_tasks(exported.folder, SUITES["glue"], DataSource(str(folder)), options)
    assert report is not None
    chance = {"accuracy": 1 / 2, "f1": 1 / 2}  # correlations: 0
    for f in report.figures:
        expected = 1 / 3 if f.task == "mnli" else chance.get(f.figure, 0.0)
        assert f.by_seed[0] == pytest.approx(expected, abs=0.1), (f.task, f.figure)
        low, high = f.interval
        assert low < f.mean < high
        assert high - low < 0.25


def test_texts_are_in_the_order_of_the_original(glue):
    source = DataSource(str(glue))
    spec = TASKS["qnli"]
    first = source.read(spec, spec.train, True)[0]
    assert first.text_pair == "who", "the sentence comes before the question"
    spec = TASKS["mnli"]
    examples = source.read(spec, [spec.scored["matched"]], True)
    assert examples[0].text_pair == "then"
    words = ("war", "peace", "hope")
    assert [words[e.label] for e in examples] == [e.text.split()[0] for e in examples]
    assert spec.labels == NLI


def test_columns_of_datasets(exported, tmp_path, monkeypatch):
    """Numbers for classes, and -1 where a label is not public."""
    folder = tmp_path / "rte"
    folder.mkdir()
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    hidden = [{**row, "label": -1} for row in rows]
    parquet.write_table(pa.Table.from_pylist(hidden), folder / "test-00000-of-00001.parquet")
    plant(monkeypatch)
    options = SuiteOptions(seeds=1, device="cpu", predictions=tmp_path / "out")
    report = evaluate_tasks(exported.folder, find_tasks("rte"), DataSource(str(tmp_path)), options)
    assert report is not None
    assert report.figures[0].mean == 1.0
    written = (tmp_path / "out" / "pretrained-seed-0" / "RTE.tsv").read_text()
    assert written.splitlines()[1:] == [f"{i}\tentailment" for i in range(4)]


def test_saved_datasets(tmp_path):
    import datasets

    rows = {"sentence": ["war", "peace"], "label": [1, 0], "idx": [7, 8]}
    table = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "cola")
    spec = TASKS["cola"]
    source = DataSource(str(tmp_path))
    examples = source.read(spec, spec.train, True)
    assert [(e.key, e.text, e.label) for e in examples] == [(7, "war", 1), (8, "peace", 0)]
    assert not source.has(spec, spec.predicted["CoLA.tsv"])
    with pytest.raises(UserError, match=r"no data for the test split of cola: put .*CoLA/test.tsv"):
        source.read(spec, [spec.predicted["CoLA.tsv"]], False)


def test_broken_rows_of_qqp_are_left_out(glue, tmp_path):
    text = (glue / "QQP" / "train.tsv").read_text()
    (tmp_path / "train.tsv").write_text(text + "12\t3\ta row without the rest\n")
    source = DataSource(str(tmp_path), is_for_one_task=True)
    assert len(source.read(TASKS["qqp"], TASKS["qqp"].train, True)) == 12
    (tmp_path / "train.tsv").write_text(text.replace("\t1\n", "\tyes\n"))
    with pytest.raises(UserError, match=r"is_duplicate|label is 'yes'; the classes are 0, 1"):
        source.read(TASKS["qqp"], TASKS["qqp"].train, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("sentence\t", "text\t"), r"SST-2/train.tsv, line 2: no column 'sentence'; there are"),
        (("label", "class"), r"line 2: no column 'label'; there are 'sentence', 'class': is this"),
        (("\t1\n", "\t2\n"), r"SST-2/train.tsv, line \d+: label is '2'; the classes are 0, 1"),
        (("\t1\n", "\n"), r"line \d+: 1 fields, but the header has 2"),
    ],
)
def test_wrong_columns(exported, glue, tmp_path, change, message):
    shutil.copytree(glue / "SST-2", tmp_path / "SST-2")
    path = tmp_path / "SST-2" / "train.tsv"
    path.write_text(path.read_text().replace(*change))
    source = DataSource(str(tmp_path))
    with pytest.raises(UserError, match=message):
        evaluate_tasks(exported.folder, find_tasks("sst2"), source, SuiteOptions(device="cpu"))


def test_unknown_names():
    with pytest.raises(UserError, match=r"--task mnlli: no such task; did you mean mnli\? Suites"):
        find_tasks("cola,mnlli")
    assert [spec.name for spec in find_tasks("RTE, glue")][:2] == ["rte", "cola"]
    assert len(find_tasks("rte,glue")) == 9


def test_hub_without_a_network():
    source = DataSource("hub")
    with pytest.raises(UserError, match=r"nyu-mll/glue cannot be had from the hub .* folder CoLA"):
        source.read(TASKS["cola"], TASKS["cola"].train, True)
    with pytest.raises(UserError, match=r"--data no/where: it is no folder here, and no/where"):
        DataSource("no/where").read(TASKS["cola"], TASKS["cola"].train, True)


def test_recipes():
    mnli, cola = TASKS["mnli"], TASKS["cola"]
    assert choose_recipe(mnli, 24, 1024) == mnli.recipe
    assert (mnli.recipe.learning_rate, mnli.recipe.epochs) == (7e-6, 2)
    assert choose_recipe(mnli, 12, 768).learning_rate == 1.5e-5
    assert choose_recipe(mnli, 6, 768).warmup_steps == 1500
    base = choose_recipe(cola, 12, 768)
    assert base.learning_rate == pytest.approx(5.5e-6 * 15 / 7)
    assert base.source == "experiments/glue/cola.sh, of large; rate scaled as MNLI's"
    other = choose_recipe(cola, 3, 24, Overrides(epochs=1))
    assert other.learning_rate == pytest.approx(5.5e-6 * 0.2 / 72 / 7e-6)
    assert (other.epochs, other.batch_size) == (1, 32)
    assert other.source.endswith("; epochs of the command line")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "glue"}, r"--task and --data go together"),
        (
            {"task": "glue", "data": "x", "first_seed": 1},
            r"--first-seed goes with --train; jobs share --task by --shard i/n",
        ),
        ({"task": "cola", "data": "x", "seeds": 0}, r"--seeds 0: give 1 or more"),
        ({"task": "cola", "data": "x", "epochs": 0}, r"--epochs 0: give 1 or more"),
        ({"task": "cola", "data": "x", "learning_rate": 2.0}, r"--learning-rate 2.0: give a num"),
        (
            {"task": "cola", "data": "x", "train": "a", "test": "b", "results": "r"},
            r"--results holds one table: give it with --task or with --train",
        ),
        ({"task": "cola", "data": "x", "shard": "2/2"}, r"--shard 2/2: give i/n with 0 <= i < n"),
        ({"task": "cola", "data": "x", "shard": "one"}, r"--shard one: give i/n"),
        ({"task": "cola", "data": "x", "shard": "0/2"}, r"--shard needs --results FOLDER"),
    ],
)
def test_bad_command_lines_of_tasks(exported, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate_command(exported.folder, **arguments)


def test_length_beyond_the_model(exported, glue):
    options = SuiteOptions(overrides=Overrides(max_length=64), device="cpu")
    with pytest.raises(UserError, match=r"--max-length 64: the model takes at most 48 tokens"):
        evaluate_tasks(exported.folder, find_tasks("cola"), DataSource(str(glue)), options)
