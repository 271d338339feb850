"""Array tasks that share a build, one after another in this process; SLURM is not here."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from data_prep.array_build import ShareReport, build_share
from data_prep.array_tasks import ArrayTask
from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.build_steps import BuildReport
from data_prep.errors import UserError
from data_prep.shares import Standing

OPTIONS = BuildOptions(heldout_fraction=0.2, unit_bytes=8000)


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def share(tiny_corpus, tiny_tokenizer, tmp_path, inline_executor):
    """(number, tasks in the array) -> what that task says."""
    sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]

    def run(number, count=4, executor=inline_executor, options=OPTIONS, smallest=0):
        task = ArrayTask(number, smallest, smallest + count - 1, 1, count, "17")
        return build_share(sources, tiny_tokenizer, tmp_path / "d", options, executor, task)

    return run


class After:
    """An executor beside which something happens before, or after, its first unit."""

    def __init__(self, happens, num_units=1):
        self.happens, self.num_units = happens, num_units

    def run(self, task, items):
        for number, item in enumerate(items):
            if number == self.num_units:
                self.happens()
            yield task(item)


def kill():
    raise KeyboardInterrupt


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 3, 2, 2, 1, 1, 0)])
def test_the_last_task_makes_the_dataset(share, tiny_dataset, tmp_path, order):
    for number in order[:-1]:
        report = share(number)
        assert isinstance(report, ShareReport)
        assert report.task == f"17_{number}"
        assert not (tmp_path / "d" / "manifest.sha256").exists()
    assert isinstance(share(order[-1]), BuildReport)
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


def test_a_task_after_the_end_finds_the_dataset(share, tiny_dataset, tmp_path):
    for number in range(4):
        share(number)
    again = share(2)
    assert isinstance(again, BuildReport)
    assert again.reading is None
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


def test_a_share_is_its_own_and_nothing_is_done_twice(share):
    first, second = share(0), share(1)
    assert first.made_units == first.finished_units > 1
    assert second.finished_units == first.made_units + second.made_units
    again = share(0)
    assert (again.made_units, again.resumed_units) == (0, first.made_units)


def test_a_killed_task_goes_on_where_it_was(share, tmp_path, tiny_dataset):
    with pytest.raises(KeyboardInterrupt):
        share(0, executor=After(kill))
    again = share(0)
    assert again.resumed_units == 1
    assert again.made_units >= 1
    for number in (1, 2, 3):
        share(number)
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


def test_who_is_missing_is_told_by_name(share, tmp_path):
    def fail():
        raise UserError("speeches.jsonl: the file has changed")

    share(0)
    with pytest.raises(UserError, match="the file has changed"):
        share(1, executor=After(fail))
    with pytest.raises(KeyboardInterrupt):
        share(2, executor=After(kill))
    path = tmp_path / "d" / ".work" / "shares" / "share-00002.json"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": dead.pid}))
    total = share(0).num_units
    first, second, third = share(0).unfinished
    assert first.startswith(
        f"task 1: {total // 4 - 1 + (total % 4 > 1)} units to do; 17_1 (process "
    )
    assert ") failed: speeches.jsonl: the file has changed; last sign of life" in first
    assert second.startswith("task 2: ")
    assert f"17_2 (process {dead.pid} on " in second
    assert ") was killed; last sign of life 0 s before this task's" in second
    assert third.startswith("task 3: ")
    assert third.endswith("not started yet")


def test_a_task_elsewhere_may_be_at_work_or_dead(share, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        share(1, executor=After(kill))
    path = tmp_path / "d" / ".work" / "shares" / "share-00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "node9"}))
    assert "on node9) is at work, or was killed; last sign" in share(0).unfinished[0]
    path.write_text("torn")
    assert share(0).unfinished[0].endswith("not started yet")


def test_a_standing_that_makes_no_sense_is_none(tmp_path):
    (tmp_path / "share-00000.json").write_text('{"state": "working"}')
    assert Standing.load(tmp_path / "share-00000.json") is None
    assert Standing.load(tmp_path / "absent.json") is None


def test_some_tasks_submitted_again(share, tiny_dataset, tmp_path):
    share(0)
    share(2)
    assert [line[:7] for line in share(0).unfinished] == ["task 1:", "task 3:"]
    # sbatch --array=1, then --array=3
    assert isinstance(share(1, count=1, smallest=1), ShareReport)
    assert isinstance(share(3, count=1, smallest=3), BuildReport)
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


def test_a_larger_array_takes_the_rest(share, tiny_dataset, tmp_path):
    share(0)
    reports = [share(number, count=6) for number in range(6)]
    assert isinstance(reports[-1], BuildReport)
    assert sum(report.resumed_units for report in reports[:-1]) > 0
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


def test_a_later_build_does_the_rest(
    share, tiny_corpus, tiny_tokenizer, tiny_dataset, tmp_path, inline_executor
):
    made = share(1).made_units
    sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]
    report = build(sources, tiny_tokenizer, tmp_path / "d", OPTIONS, inline_executor)
    assert report.resumed_units == made
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


def test_more_tasks_than_units(share, tiny_dataset, tmp_path):
    reports = [share(number, count=20) for number in range(20)]
    num_units = reports[0].num_units
    assert num_units < 20
    assert [type(report) for report in reports] == [
        *[ShareReport] * (num_units - 1),
        *[BuildReport] * (21 - num_units),
    ]
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)


@pytest.mark.parametrize(("whose", "done_units"), [("array", 1), ("processes", 2)])
def test_somebody_else_finishes_the_dataset_meanwhile(
    share, tiny_corpus, tiny_tokenizer, tiny_dataset, tmp_path, whose, done_units
):
    for number in (1, 2, 3):
        share(number)

    def twin():
        assert isinstance(share(0), BuildReport)

    # The work folder is gone when the twin's elder wants to write its next unit.
    if whose == "array":
        report = share(0, executor=After(twin))
    else:
        sources = [str(tiny_corpus / name) for name in ("a.jsonl", "b.jsonl", "letters")]
        arguments = (sources, tiny_tokenizer, tmp_path / "d", OPTIONS)
        report = build(*arguments, After(twin, 2))
    assert report.reading is None
    assert report.resumed_units + sum(report.units_of_worker.values()) == done_units
    assert hashes(tmp_path / "d") == hashes(tiny_dataset)
    assert isinstance(share(0), BuildReport)


def test_another_build_in_the_folder_is_refused(share):
    share(0)
    with pytest.raises(UserError, match="is being built from something else"):
        share(1, options=BuildOptions(heldout_fraction=0.3, unit_bytes=8000))


def test_a_vanished_unit_is_told(share, tmp_path):
    def lose():
        shutil.rmtree(tmp_path / "d" / ".work" / "unit-000001")
        (tmp_path / "d" / ".work" / "unit-000001").mkdir()

    for number in (0, 1, 2):
        share(number)
    with pytest.raises(UserError, match="unit-000001: the unit was finished and is gone or damag"):
        share(3, executor=After(lose))
    share(1)
    assert isinstance(share(3), BuildReport)
