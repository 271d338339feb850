"""`make scores`: what it keeps and repeats, its table in README.md, and what it must show."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import labelled_table
from tests.benchmarks.labelled_table import BEGIN, END, FOLDER, gap_beyond_ranges, scores, table
from tests.benchmarks.labelled_tasks import TASKS, Scores, StageFailed
from tests.benchmarks.readme_table import replaced
from tests.worlds import ROOT

RESULTS = sorted(FOLDER.glob("*.json"))


def task(ours, others):
    runs = [("pretrained", ours), ("random", others)]
    return {
        "runs": [
            {"start": start, "seed": seed, "scores": {"accuracy": value}}
            for start, values in runs
            for seed, value in enumerate(values)
        ]
    }


def test_the_gap_must_be_wider_than_both_ranges_together():
    held = task([0.80, 0.81, 0.82], [0.70, 0.71, 0.75])
    assert gap_beyond_ranges(held) == pytest.approx(0.81 - 0.72 - 0.02 - 0.05)
    assert gap_beyond_ranges(task([0.80, 0.81, 0.85], [0.70, 0.71, 0.75])) < 0.01
    assert gap_beyond_ranges(task([0.70, 0.71, 0.72], [0.70, 0.71, 0.72])) < 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_pre_training_beats_a_random_start_on_200_sentences_of_brown(path):
    found = json.loads(path.read_text())["tasks"]["brown-200"]
    assert found["train_examples"] == 200
    assert [len(scores(found, start)) for start in ("pretrained", "random")] == [3, 3]
    assert len({run["seed"] for run in found["runs"]}) == 3
    assert gap_beyond_ranges(found) > 0


def test_there_are_results_and_the_readme_shows_them():
    """`make scores` writes both, `python -m tests.benchmarks.labelled_table --write` one."""
    assert RESULTS
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page == replaced(page, table(FOLDER), BEGIN, END)
    assert (FOLDER / "table.md").read_text(encoding="utf-8") == table(FOLDER)


def test_a_page_without_the_marks_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert labelled_table.main(["--write", str(page)]) == 0
    assert page.read_text() == f"above\n{BEGIN}\n{table(FOLDER)}{END}\nbelow\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match=r"page\.md lacks the lines"):
        labelled_table.main(["--write", str(page)])


class FakeCommands(Scores):
    """Writes what `deberta evaluate` would, and remembers what was run."""

    def __init__(self, work):
        super().__init__(work, Path("model.toml"), Path("deepspeed.json"))
        self.ran = []

    def command(self, name, words, *, is_done=False):
        self.ran.append(name)
        output = self._work / words[words.index("--output") + 1]
        report = {**task([0.8], [0.7]), "command": "as the program says it"}
        output.write_text(json.dumps({"finetune": report}))


def test_scores_are_kept_as_long_as_weights_and_command_are_the_same(tmp_path):
    weights = tmp_path / "model/export/discriminator/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    fake = FakeCommands(tmp_path)
    small = TASKS[0]
    fake.score(small)
    fake.score(small)
    assert fake.ran == [f"model-{small.name}"]
    weights.write_bytes(b"second")
    fake.score(small)
    fake.score(small._replace(epochs=small.epochs + 1))
    assert len(fake.ran) == 3
    kept = json.loads(fake.path_of(small).read_text())
    assert f"--epochs {small.epochs + 1} " in kept["command"]
    assert scores(kept, "random") == [0.7]


def test_a_command_that_fails_is_named_with_the_end_of_its_log(tmp_path):
    stages = Scores(tmp_path, Path("model.toml"), Path("deepspeed.json"))
    with pytest.raises(StageFailed, match=r"(?s)export ended with 2; .*export\.log.*nothing-here"):
        stages.command("export", ["deberta", "export", "nothing-here", "export"])


def test_a_command_that_is_done_is_told_and_not_run(tmp_path, capsys):
    stages = Scores(tmp_path, Path("model.toml"), Path("deepspeed.json"))
    stages.command("export", ["deberta", "nonsense"], is_done=True)
    assert "deberta nonsense (done before)" in capsys.readouterr().out
