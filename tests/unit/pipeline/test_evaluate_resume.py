"""Evaluations that were killed, divided among jobs, or repeated with something else."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.evaluate import figures, task_runs
from pipeline.evaluate.catalogue import find_tasks
from pipeline.evaluate.recipes import Overrides
from pipeline.evaluate.sources import DataSource
from pipeline.evaluate.suite import SuiteOptions, evaluate_tasks
from tests.task_files import write_glue

ROOT = Path(__file__).parents[3]
OVERRIDES = Overrides(epochs=2, batch_size=4, max_length=16)
WORDS = ["--epochs", "2", "--batch-size", "4", "--max-length", "16", "--device", "cpu"]
TASKS = "rte,stsb"


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    """Intervals cost a second a figure; whether they are right is a test of figures."""
    monkeypatch.setattr(figures, "NUM_DRAWS", 20)


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


def run(exported, glue, results, say=lambda _: None, **options):
    options = {"seeds": 2, "overrides": OVERRIDES, "device": "cpu", **options}
    chosen = SuiteOptions(results=results, **options)
    return evaluate_tasks(
        exported.folder, find_tasks(TASKS), DataSource(str(glue)), chosen, say=say
    )


@pytest.fixture(scope="module")
def whole(exported, glue, tmp_path_factory):
    """The report of an evaluation that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "NUM_DRAWS", 20)
        report = run(exported, glue, tmp_path_factory.mktemp("whole"))
    assert report is not None
    return report.to_dict()


def test_killed_evaluation_goes_on(exported, glue, whole, tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, "-m", "pipeline.cli", "evaluate", str(exported.folder)]
    command += ["--task", TASKS, "--data", str(glue), "--seeds", "2", "--results", str(results)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, *WORDS], cwd=ROOT, stdout=log, stderr=log)
        try:
            while not (results / "rte" / "pretrained-seed-0.json").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (results / "results.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in results.glob("*/*.json")}
    assert 1 <= len(finished) < 4
    said = []
    report = run(exported, glue, results, said.append)
    assert len(said) == 4 - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert report is not None
    assert report.to_dict() == whole


def test_half_a_run_does_not_count(exported, glue, whole, tmp_path, monkeypatch):
    """The figures are written last: what a kill leaves before them is made again."""

    def killed(folder, result, settings):
        path = folder / f"{result.name.stem}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.evaluate.suite.write_run", killed)
        with pytest.raises(KeyboardInterrupt):
            run(exported, glue, tmp_path)
    report = run(exported, glue, tmp_path)
    assert report is not None
    assert report.to_dict() == whole


def test_shards_share_the_work(exported, glue, whole, tmp_path):
    said = [[], [], []]
    reports = [run(exported, glue, tmp_path, said[i].append, shard=(i, 3)) for i in range(3)]
    assert reports[:2] == [None, None]
    assert reports[2] is not None
    assert reports[2].to_dict() == whole
    assert [len(lines) for lines in said] == [3, 2, 1]
    assert said[0][-1] == "2 of 4 runs are finished; the others are of other shards"
    assert [line.split(":")[0] for line in said[0][:-1]] == [
        "rte/pretrained-seed-0",
        "stsb/pretrained-seed-1",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["tasks"].keys() == {"rte", "stsb"}
    again = []
    assert run(exported, glue, tmp_path, again.append).to_dict() == whole
    assert again == [], "nothing is trained twice"


def test_other_settings_are_refused(exported, glue, whole, tmp_path):
    run(exported, glue, tmp_path, seeds=1)
    with pytest.raises(UserError, match=r"rte/pretrained-seed-0.json is of other settings: bf16 F"):
        run(exported, glue, tmp_path, bf16=True)
    with pytest.raises(UserError, match=r"epochs 2 there, 3 now.*give another --results"):
        run(exported, glue, tmp_path, overrides=replace(OVERRIDES, epochs=3))
    path = tmp_path / "rte" / "pretrained-seed-0.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=r"pretrained-seed-0.json: damaged .*; delete it"):
        run(exported, glue, tmp_path)
    path.unlink()
    assert run(exported, glue, tmp_path).to_dict() == whole
    path.with_suffix(".npz").write_bytes(b"PK\3\4 torn")
    with pytest.raises(UserError, match=r"pretrained-seed-0.json: damaged"):
        run(exported, glue, tmp_path)


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    task_runs.write_whole(path, b"first")

    def full(self, content):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        task_runs.write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]
