"""A profile of some steps: which steps, which parts, what is written."""

import gzip
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from data_prep.errors import UserError
from pipeline import memory_snapshot
from pipeline.memory_snapshot import MemorySnapshot, parse_step
from pipeline.profiling import PartTime, StepProfiler, parse_steps, part_of, table
from tests.reference.small_networks import batch, generator

CPU = torch.device("cpu")
PHASES = ("data", "masks", "generator forward 0", "generator backward 0", "generator update")


def profiler(folder, steps):
    return StepProfiler(folder, CPU, 3, steps)


def train(listener, first, last, work=lambda: None):
    """The marks of some steps, with an evaluation behind each."""
    for step in range(first - 1, last):
        for phase in PHASES:
            listener.mark(phase, step)
            work()
        listener.mark("evaluate", step + 1)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("text", "steps"), [("12", range(12, 13)), ("10-12", range(10, 13)), ("1-1", range(1, 2))]
)
def test_steps_are_read(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1.5", "2-a"])
def test_what_is_no_step_is_said(text):
    with pytest.raises(UserError, match=rf"--profile {text}: give a step or .*, as in 10-12"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["0", "0-3", "12-10"])
def test_steps_that_cannot_be_are_said(text):
    with pytest.raises(UserError, match=rf"--profile {text}: steps count from 1, and the last is"):
        parse_steps(text)


def test_parts_have_no_micro_step():
    assert part_of("generator forward 12") == "generator forward"
    assert part_of("data") == "data"


def test_the_profile_holds_the_asked_steps_and_their_parts(tmp_path, capfd):
    data, network = batch(), generator()

    def work():
        network(*data.generator_arguments()).loss_sum.backward()

    listener = profiler(tmp_path, range(2, 4))
    train(listener, 1, 1)
    assert files(tmp_path) == []
    train(listener, 2, 3, work)
    assert files(tmp_path) == []
    listener.mark("data", 3)
    stem = "rank-00003-steps-2-3"
    assert files(tmp_path) == [f"{stem}.md", f"{stem}.pt.trace.json.gz"]
    assert "profile of 2 steps" in capfd.readouterr().err
    train(listener, 4, 5)
    listener.close()
    trace = json.loads(
        gzip.decompress((tmp_path / "profile" / f"{stem}.pt.trace.json.gz").read_bytes())
    )
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    for phase in PHASES:
        assert names.count(part_of(phase)) == 2, phase
    assert names.count("evaluate") == 2
    assert "aten::mm" in names
    lines = (tmp_path / "profile" / f"{stem}.md").read_text().splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    parts = [part_of(phase) for phase in PHASES]
    inner = ["of which draw", "of which vocabulary head"]
    assert rows[:7] == [*parts, "evaluate", "**step**"]
    assert sorted(rows[7:]) == inner
    assert all(line.split(" | ")[1] == "1" for line in lines[2:9])


def test_part_times_add_up_to_the_steps(tmp_path):
    listener = profiler(tmp_path, range(1, 3))
    start = time.perf_counter()
    train(listener, 1, 2, lambda: time.sleep(0.002))
    listener.close()
    took = time.perf_counter() - start
    times = listener.part_times()
    assert [each.part for each in times] == [*(part_of(phase) for phase in PHASES), "evaluate"]
    assert all(each.calls == 2 and each.device_seconds is None for each in times)
    assert all(each.host_seconds >= 0.004 for each in times[:5])
    assert sum(each.host_seconds for each in times) <= took


def test_a_run_that_ends_early_still_writes_its_profile(tmp_path):
    listener = profiler(tmp_path, range(2, 9))
    train(listener, 1, 3)
    listener.close()
    assert len(files(tmp_path)) == 2


def test_steps_that_were_not_trained_are_said(tmp_path, caplog):
    listener = profiler(tmp_path, range(2, 4))
    train(listener, 7, 8)
    listener.close()
    assert "--profile 2-3: this start trained none of these steps" in caplog.text
    assert files(tmp_path) == []


def test_marks_of_other_threads_are_not_parts_of_the_step(tmp_path):
    listener = profiler(tmp_path, range(1, 2))
    listener.mark("data", 0)
    thread = threading.Thread(target=listener.mark, args=("files", 0))
    thread.start()
    thread.join()
    listener.close()
    assert [each.part for each in listener.part_times()] == ["data"]


def test_the_table_counts_the_device_where_there_is_one():
    parts = [PartTime("data", 2, 0.010, 0.001), PartTime("generator forward", 4, 0.002, 0.003)]
    text = table(parts, [PartTime("draw", 8, 0.001, 0.002)], steps=2)
    assert text.splitlines()[2:] == [
        "| data | 1 | 5.00 | 0.50 | 25.0% |",
        "| generator forward | 2 | 1.00 | 1.50 | 75.0% |",
        "| **step** | 1 | 6.00 | 2.00 | 100.0% |",
        "| of which draw | 4 | 0.50 | 1.00 | 50.0% |",
    ]


@pytest.mark.parametrize("text", ["0", "-1", "x", "1-2", ""])
def test_what_is_no_step_of_a_snapshot_is_said(text):
    with pytest.raises(UserError, match=rf"--memory-snapshot {text}: give the number of a step"):
        parse_step(text)


def test_a_snapshot_on_a_cpu_says_that_it_needs_a_gpu(tmp_path, caplog):
    listener = MemorySnapshot(tmp_path, CPU, 0, parse_step("2"))
    train(listener, 1, 4)
    listener.close()
    assert "--memory-snapshot 2 needs a GPU: no snapshot is written" in caplog.text
    assert files(tmp_path) == []


@pytest.fixture
def history(monkeypatch):
    """What is asked of torch's record of allocations, without a GPU."""
    calls = []
    stub = SimpleNamespace(
        _record_memory_history=lambda **k: calls.append(k.get("enabled", "on")),
        _dump_snapshot=lambda path: calls.append(path),
    )
    monkeypatch.setattr(memory_snapshot.torch.cuda, "memory", stub)
    return calls


def test_a_snapshot_records_one_step_and_no_other(tmp_path, history):
    listener = MemorySnapshot(tmp_path, torch.device("cuda"), 1, 3)
    train(listener, 1, 2)
    assert history == []
    train(listener, 3, 5)
    listener.close()
    path = tmp_path / "profile" / "rank-00001-step-3.memory.pickle"
    assert history == ["on", str(path), None]


def test_a_snapshot_of_a_step_that_never_came_is_said(tmp_path, history, caplog):
    listener = MemorySnapshot(tmp_path, torch.device("cuda"), 0, 9)
    train(listener, 1, 2)
    listener.close()
    assert history == []
    assert "--memory-snapshot 9: this start did not train that step" in caplog.text
