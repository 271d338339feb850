"""Fine-tuned scores: names, what is stored and when it holds, and sums over seeds."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.compare import scores
from pipeline.compare.figures import Spread
from pipeline.compare.scores import LabelledTask, Scoring, score_run, summarize
from pipeline.evaluate.finetune import STARTS, FinetuneOptions
from pipeline.evaluate.labelled import Columns
from tests.commits import run_config, write_commit


def report(pretrained, random):
    runs = [{"start": "random", "seed": 0, "scores": {"accuracy": value}} for value in random]
    summary = {"pretrained": {"accuracy": {"mean": pretrained, "std": 0.5}}}
    return {"summary": summary, "runs": runs, "baselines": {}}


def test_sums_over_seeds():
    """Random starts know nothing of pre-training: only one run of a system has them."""
    reports = [report(0.5, [0.25, 0.75]), report(0.625, []), report(1.0, [])]
    summed = summarize(reports)
    assert summed["pretrained"]["accuracy"].mean == pytest.approx(np.mean([0.5, 0.625, 1.0]))
    std = np.std([0.5, 0.625, 1.0], ddof=1)
    assert summed["pretrained"]["accuracy"].std == pytest.approx(std)
    assert summed["random"]["accuracy"] == Spread.of([0.25, 0.75])


def test_names_of_tasks():
    assert LabelledTask(Path("tasks/ner.conll"), Path("x")).name == "ner"
    assert LabelledTask(Path("tasks/speaker/train.jsonl"), Path("x")).name == "speaker"


@pytest.fixture
def scene(tmp_path, dataset_folder, monkeypatch):
    """A run with a commit, a task, and a fine-tuning that only counts its calls."""
    config = run_config(dataset_folder, tmp_path / "a-seed-5")
    write_commit(config, 3)
    for name in ("train", "test"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\nwar\t0\npeace\t1\n")
    (tmp_path / "finetuned").mkdir()
    opened, calls = [], []

    @contextmanager
    def repository(folder, dataset):
        opened.append((folder, dataset))
        yield folder

    def finetune(model, train, test, *, options, columns, say):
        calls.append((train, options.seeds, options.starts))
        say("accuracy 0.5")
        return SimpleNamespace(to_dict=lambda: report(0.5, [0.25]))

    monkeypatch.setattr(scores, "encoder_repository", repository)
    monkeypatch.setattr(scores, "finetune", finetune)
    return SimpleNamespace(
        config=config,
        folder=tmp_path,
        run=SimpleNamespace(folder=tmp_path / "a-seed-5", name="a-seed-5"),
        plan=SimpleNamespace(output=tmp_path, dataset=SimpleNamespace(folder=dataset_folder)),
        task=LabelledTask(tmp_path / "train.tsv", tmp_path / "test.tsv"),
        opened=opened,
        calls=calls,
    )


def score(scene, starts=STARTS, **options):
    scoring = Scoring((scene.task,), FinetuneOptions(**{"seeds": 1, **options}), Columns())
    said = []
    return score_run(scene.run, scene.plan, scoring, starts, said.append), said


def test_scores_are_stored_and_hold_for_what_they_were_made_of(scene):
    first, said = score(scene)
    name = scene.folder.name  # of a train.* its folder's
    assert list(first) == [name]
    assert said == [f"a-seed-5, {name}: accuracy 0.5"]
    assert first[name]["model"] == str(scene.run.folder)
    stored = scene.folder / "finetuned" / f"a-seed-5-{name}.json"
    assert json.loads(stored.read_text())["report"] == first[name]
    again, said = score(scene)
    assert (again, said) == (first, [])
    assert len(scene.opened) == len(scene.calls) == 1, "nothing is exported for stored scores"
    score(scene, epochs=2)
    assert len(scene.calls) == 2, "another option"
    scene.task.test.write_text("text\tlabel\nwar\t1\n")
    score(scene, epochs=2)
    assert len(scene.calls) == 3, "another file"
    write_commit(scene.config, 4)
    score(scene, epochs=2)
    assert len(scene.calls) == 4, "other weights"
    score(scene, ("pretrained",), epochs=2)
    assert len(scene.calls) == 5, "without the random start"
    assert scene.calls[-1][2] == ("pretrained",)
