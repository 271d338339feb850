"""`deberta evaluate --minimal-pairs`: the same of a run, a commit and an export; columns."""

import json

import pytest
import torch

from data_prep.errors import UserError
from pipeline.commands_evaluate import evaluate_command
from pipeline.evaluate import pairs_model
from pipeline.evaluate.pairs_model import evaluate_pairs_model, pairs_table
from tests.task_files import write_lines

WORDS = ("war", "peace", "hope", "people", "America", "freedom")


@pytest.fixture
def blimp(tmp_path):
    """Two files in BLiMP's columns; the last pair of the second has none."""
    for number, (uid, term) in enumerate((("order_1", "order"), ("order_2", "order"))):
        rows = [
            {
                "sentence_good": f"the {word} of the {WORDS[i - 1]}",
                "sentence_bad": f"of the {word} {WORDS[i - 1]} the",
                "field": "syntax",
                "linguistics_term": term,
                "UID": uid,
                "pair_id": str(i),
            }
            for i, word in enumerate(WORDS[: 6 - number])
        ]
        write_lines(tmp_path / "blimp" / f"{uid}.jsonl", rows)
    with (tmp_path / "blimp" / "order_2.jsonl").open("a") as file:
        file.write(json.dumps({"sentence_good": "the war", "sentence_bad": "war the"}) + "\n")
    return tmp_path / "blimp"


def shares(report):
    return {(g.field, g.value): (g.pairs, *g.accuracy.values()) for g in report.groups}


def test_run_commit_and_export_are_the_same_model(random_run, exported, blimp, tmp_path):
    models = (random_run.folder, random_run.commit, exported.folder)
    reports = [evaluate_pairs_model(model, blimp, device="cpu") for model in models]
    assert shares(reports[0]) == shares(reports[1]) == shares(reports[2])
    assert [report.step for report in reports] == [random_run.step] * 3
    file = blimp / "order_1.jsonl"
    alone = evaluate_pairs_model(exported.folder, file, batch_size=1, device="cpu")
    assert shares(alone)["", ""] == shares(reports[0])["UID", "order_1"]


def test_groups_on_paper(exported, blimp, monkeypatch):
    """Of order_1 all are right, of order_2 none, and where scores are equal half counts."""

    def planted(predict, pairs, *rest):
        good = [{"order_1": 1.0, "order_2": -1.0, "": 0.0}[pair.group] for pair in pairs]
        good_P = torch.tensor(good, dtype=torch.float64)
        return {"generator": (torch.zeros(len(pairs)), good_P)}

    monkeypatch.setattr(pairs_model, "minimal_pair_scores", planted)
    report = evaluate_pairs_model(exported.folder, blimp, device="cpu")
    assert shares(report) == {
        ("", ""): (12, 6.5 / 12),
        ("field", "syntax"): (11, 6 / 11),
        ("linguistics_term", "order"): (11, 6 / 11),
        ("UID", "order_1"): (6, 1.0),
        ("UID", "order_2"): (5, 0.0),
    }
    low, high = report.groups[0].interval["generator"]
    assert 0.2 < low < 6.5 / 12 < high < 0.85
    assert report.groups[3].interval["generator"] == (1.0, 1.0)
    assert pairs_table(report).row_count == 5


def test_command_prints_and_writes(exported, blimp, tmp_path, capsys):
    output = tmp_path / "scores.json"
    evaluate_command(exported.folder, minimal_pairs=blimp, device="cpu", output=output)
    shown = capsys.readouterr().out
    assert "linguistics_term" in shown
    assert "discriminator" in shown
    values = json.loads(output.read_text())["minimal_pairs"]
    assert values["groups"][0]["pairs"] == 12
    assert set(values["groups"][0]["accuracy"]) == {"generator", "discriminator"}


def test_a_folder_without_pairs(exported, tmp_path):
    with pytest.raises(UserError, match=r"--minimal-pairs .*: this folder has no .jsonl file"):
        evaluate_pairs_model(exported.folder, tmp_path, device="cpu")
