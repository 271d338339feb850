"""`deberta card`: scores on the cards of an export, for people and for the hub."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from data_prep.errors import UserError
from pipeline.card_scores import add_scores, read_scores
from pipeline.commands_card import card_command
from pipeline.commands_evaluate import evaluate_command
from pipeline.evaluate import figures
from tests.planted import plant
from tests.task_files import write_glue, write_lines, write_superglue


@pytest.fixture(scope="module")
def measured(exported, tmp_path_factory):
    """A folder with the figures of an export: GLUE's and SuperGLUE's tasks, own files, pairs."""
    folder = tmp_path_factory.mktemp("measured")
    data = write_superglue(write_glue(folder / "data"))
    rows = [{"text": f"{('war', 'peace')[i % 2]} {i}", "label": i % 2} for i in range(8)]
    write_lines(folder / "mine.jsonl", rows)
    pair = {"sentence_good": "the war", "sentence_bad": "war the"}
    rows = [{**pair, "field": "syntax", "UID": "order"}, {**pair, "sentence_good": "a war"}]
    write_lines(folder / "pairs.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "NUM_DRAWS", 20)
        words = ["deberta", "evaluate", "x", "--shard", "1/2", "--data", "my data"]
        patch.setattr("sys.argv", words)
        own = {"train": folder / "mine.jsonl", "test": folder / "mine.jsonl", "epochs": 1}
        own |= {"results": folder / "own", "seeds": 1, "max_length": 16}
        evaluate_command(exported.folder, **own, device="cpu")
        plant(patch)
        task = {"task": "stsb,superglue-rte", "data": str(data), "results": folder / "tasks"}
        evaluate_command(exported.folder, **task, seeds=2, device="cpu")
        output = folder / "pairs.json"
        pairs = folder / "pairs.jsonl"
        evaluate_command(exported.folder, minimal_pairs=pairs, output=output, device="cpu")
    return folder


@pytest.fixture
def export(exported, tmp_path):
    return shutil.copytree(exported.folder, tmp_path / "base")


def files(measured):
    return [measured / name for name in ("tasks/results.json", "own/results.json", "pairs.json")]


def test_cards_show_scores(export, measured, capsys):
    before = ModelCard.load(export / "discriminator" / "README.md")
    card_command(export, files(measured))
    assert capsys.readouterr().out.count("README.md") == 2
    card = ModelCard.load(export / "discriminator" / "README.md")
    assert card.data.model_name == "base discriminator"
    found = {(r.dataset_name, r.metric_name): r for r in card.data.eval_results}
    stsb = found["stsb", "pearson, mean of 2 seeds"]
    assert (stsb.dataset_type, stsb.dataset_config) == ("nyu-mll/glue", "stsb")
    assert (stsb.dataset_split, stsb.metric_type, stsb.metric_value) == (
        "validation",
        "pearson",
        1.0,
    )
    assert stsb.task_type == "text-classification"
    winogender = found["superglue-rte AX-g", "accuracy, mean of 2 seeds"]
    assert (winogender.dataset_config, winogender.dataset_split) == ("axg", "test")
    assert found["mine", "accuracy, mean of 1 seeds"].dataset_type == "mine.jsonl"
    assert not any("random" in name for name, _ in found)
    assert card.data.license == before.data.license
    assert "| stsb | pearson | 1.0000 | 0.0000 | 2 | 1.0000 .. 1.0000 |" in card.text
    assert "| mine, from random weights | accuracy |" in card.text
    assert "\ndeberta evaluate x --data 'my data'\n" in card.text, "of all shards"
    assert "| all | 2 |" in card.text
    assert "| syntax | 1 |" in card.text
    assert card.text.index("## Evaluation") < card.text.index("## Licence")
    generator = ModelCard.load(export / "generator" / "README.md")
    assert "Minimal pairs of pairs.jsonl" in generator.text
    assert "stsb" not in generator.text
    assert generator.data.eval_results is None


def test_new_scores_take_the_place_of_the_old(export, measured):
    path = export / "discriminator" / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    add_scores(export, read_scores(files(measured)))
    first = path.read_text()
    add_scores(export, read_scores(files(measured)))
    assert path.read_text() == first
    add_scores(export, read_scores(files(measured)[1:2]))
    text = path.read_text()
    assert text.count("## Evaluation") == 1
    assert "stsb" not in text
    assert "My own words." in text


def test_scores_of_other_models_are_refused(export, measured, tmp_path):
    path = export / "discriminator" / "pretraining_config.json"
    values = json.loads(path.read_text())
    values["export"]["step"] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"minimal pairs of step 40, but .* is of step 41"):
        add_scores(export, read_scores(files(measured)[2:]))
    config = export / "discriminator" / "config.json"
    config.write_text(config.read_text() + " ")
    for number in (0, 1):
        with pytest.raises(UserError, match=r"has other weights than .*evaluate this export"):
            add_scores(export, read_scores([files(measured)[number]]))
    with pytest.raises(UserError, match=r"no export of `deberta export`, which has cards"):
        add_scores(tmp_path, read_scores(files(measured)))


@pytest.mark.parametrize(
    "content", ["{", "[1]", "{}", '{"heldout": {}}', '{"tasks": {"tasks": 3}}']
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"scores.json: not what `deberta evaluate` wrote with --o"):
        read_scores([path])
    with pytest.raises(UserError, match=r"none.json: not what `deberta evaluate` wrote"):
        read_scores([tmp_path / "none.json"])
