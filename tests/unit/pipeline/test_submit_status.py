"""`deberta status` from files alone, whole and torn."""

import json

import pytest

from data_prep.errors import UserError
from pipeline.commands_submit import status_command
from pipeline.submit.client import Slurm
from pipeline.submit.record import Record
from pipeline.submit.status import read_status, status_lines

NOWHERE = Slurm({"PATH": "/nowhere"})


@pytest.fixture
def run(tmp_path):
    """A run at step 1,200 of 5,000, with a record and a restart."""
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    record = Record(slurm, "recipe.toml")
    record.begin("prep", "c", "", 4)
    record.submitted("11")
    record.begin("pretrain", "c", "11", None)
    record.submitted("12")
    config = {"run_config": {"schedule": {"max_steps": 5000}}}
    (tmp_path / "config.resolved.json").write_text(json.dumps(config))
    state = {"status": "running", "step": 1000, "reason": ""}
    (tmp_path / "state.json").write_text(json.dumps(state))
    rows = [
        {"step": 1100, "perf/tokens_per_second": 500.0, "perf/step_seconds": 3.0},
        {"step": 1200, "perf/tokens_per_second": 1000.0, "perf/step_seconds": 2.0},
        {"step": 1200, "eval/mlm_loss": 5.0},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13')
    decision = {"unix_seconds": 1e9, "job_id": "12", "step": 1000}
    decisions = [
        {**decision, "decision": "start", "reason": "on n1"},
        {**decision, "decision": "requeue", "reason": "stopped by SIGUSR1"},
        {**decision, "decision": "start", "reason": "on n1"},
    ]
    lines = "".join(json.dumps(each) + "\n" for each in decisions)
    (slurm / "restarts.jsonl").write_text(lines)
    return tmp_path


def test_step_rate_and_time_left_come_from_the_newest_rows(run):
    training = read_status(run, NOWHERE)["training"]
    assert training["step"] == 1200
    assert training["tokens_per_second"] == 1000.0
    assert training["seconds_left"] == (5000 - 1200) * 2.0
    assert training["committed_step"] == 1000


def test_people_get_all_of_it_without_slurm(run):
    text = "\n".join(status_lines(read_status(run, NOWHERE)))
    for words in (
        "queue: not asked: sbatch is not on this machine",
        "prep      11   unknown",
        "training: running",
        "step: 1,200 of 5,000 (24.0%), committed 1,000",
        "rate: 1,000 tokens/s, 2 s a step, as of",
        "left: 2 h 6 min of training at this rate",
        "restarts: 1; the last decisions of the batch script:",
        "job 12, step 1000: requeue: stopped by SIGUSR1",
    ):
        assert words in text


def test_a_done_run_has_no_time_left(run):
    state = {"status": "done", "step": 5000, "reason": ""}
    (run / "state.json").write_text(json.dumps(state))
    status = read_status(run, NOWHERE)
    assert status["training"]["seconds_left"] is None
    assert "step: 5,000 of 5,000 (100.0%)" in "\n".join(status_lines(status))


@pytest.mark.parametrize("name", ["state.json", "metrics.jsonl", "config.resolved.json"])
@pytest.mark.parametrize("damage", ["{", "[1]", '{"step": "x", "run_config": 3}', "\x00\n7\n"])
def test_damaged_files_are_read_as_far_as_they_go(run, name, damage):
    (run / name).write_text(damage)
    assert status_lines(read_status(run, NOWHERE))


def test_a_chain_that_has_not_begun_to_train(run):
    for name in ("state.json", "metrics.jsonl", "config.resolved.json"):
        (run / name).unlink()
    assert "training: not started" in status_lines(read_status(run, NOWHERE))


def test_states_of_arrays_are_counted(run, tmp_path):
    queue = {"11": ["0|COMPLETED", "1|FAILED", "2|RUNNING", "3|RUNNING"], "12": ["N/A|PENDING"]}
    lines = [f"{job}|{task}|Dependency|N/A|" for job, tasks in queue.items() for task in tasks]
    programs = tmp_path / "bin"
    programs.mkdir()
    answer = "\n".join(lines)
    for name, text in (("squeue", f"cat <<'E'\n{answer}\nE"), ("sinfo", "echo b"), ("sbatch", "")):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    status = read_status(run, Slurm({"PATH": f"{programs}:/usr/bin:/bin"}))
    assert status["jobs"][0]["states"] == {"COMPLETED": 1, "FAILED": 1, "RUNNING": 2}
    assert status["jobs"][0]["failed_tasks"] == ["1"]
    text = "\n".join(status_lines(status))
    assert "1 COMPLETED, 1 FAILED, 2 RUNNING" in text
    assert "failed: tasks 1" in text
    assert "PENDING" in text
    assert "after 11" in text


def test_json_is_the_whole_of_it(run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    status_command(run, as_json=True)
    assert set(json.loads(capsys.readouterr().out)) == {
        "run",
        "queue",
        "jobs",
        "training",
        "restarts",
    }


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        read_status(tmp_path / "nowhere", NOWHERE)
    with pytest.raises(UserError, match="neither a record of jobs nor a training"):
        read_status(tmp_path, NOWHERE)
