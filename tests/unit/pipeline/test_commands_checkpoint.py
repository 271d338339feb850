"""`deberta checkpoint` as people type it: what is printed, what is left, and the exit code."""

import json
import os
import shutil
import time

import pytest

from data_prep.errors import EXIT_CORRUPT, EXIT_USAGE
from pipeline.checkpoint import CheckpointStore
from pipeline.cli import main
from pipeline.commit import commit_name, list_commits
from pipeline.config import CheckpointSection
from pipeline.run_folder import RunFolder
from tests.commits import contents, flip_a_byte, plain_engine, reseal


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def run(tmp_path):
    """A run with commits 4, 8 and 12 of 2 days, 3 hours and some seconds ago."""
    folder = tmp_path / "run"
    store = CheckpointStore(folder / "checkpoints", CheckpointSection(), 0, None)
    engine = plain_engine()
    for step, age_seconds in ((4, 2 * 86_400), (8, 3 * 3600), (12, 5)):
        store.save(step, {"joint": engine}, {"step": step, "tokens": step * 1000}, "{}\n")
        then = time.time() - age_seconds
        os.utime(folder / "checkpoints" / commit_name(step), (then, then))
    return folder


def deberta(capsys, *words):
    """(exit code, standard output, standard error) of `deberta checkpoint WORDS`."""
    try:
        main(["checkpoint", *map(str, words)])
        code = 0
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def commit(run, step):
    return run / "checkpoints" / commit_name(step)


def steps(run):
    return [each.step for each in list_commits(run / "checkpoints")]


def test_list(run, capsys):
    code, out, _ = deberta(capsys, "list", run)
    assert code == 0
    lines = [[word.strip() for word in line.split("│")[1:-1]] for line in out.splitlines()]
    rows = [line for line in lines if line]
    assert [row[:2] for row in rows] == [["4", "4,000"], ["8", "8,000"], ["12", "12,000"]]
    assert [row[3] for row in rows][:2] == ["2 days", "3 hours"]
    assert [row[4:] for row in rows] == [["1", "not checked"]] * 3
    values = json.loads(deberta(capsys, "list", run, "--json", "--verify")[1])
    assert [value["state"] for value in values] == ["valid"] * 3
    assert [value["step"] for value in values] == [4, 8, 12]
    size = sum(map(len, contents(commit(run, 4)).values()))
    assert values[0]["bytes"] == size
    assert 2 * 86_400 <= values[0]["age_seconds"] < 2 * 86_400 + 3600


def test_list_shows_damage_and_goes_on(run, capsys):
    flip_a_byte(commit(run, 4) / "manifest.json")
    (commit(run, 8) / "joint" / "rank-00000.safetensors").write_bytes(b"")
    flip_a_byte(commit(run, 12) / "joint" / "rank-00000.safetensors")
    states = [v["state"] for v in json.loads(deberta(capsys, "list", run, "--json")[1])]
    assert states[0].startswith("damaged: ")
    assert "manifest.json: sha256 is" in states[0]
    assert "rank-00000.safetensors: 0 bytes, written" in states[1]
    assert states[2] == "not checked", "nothing was read"
    states = [v["state"] for v in json.loads(deberta(capsys, "list", run, "--json", "--verify")[1])]
    assert "rank-00000.safetensors: sha256 is" in states[2]
    reseal(commit(run, 12), format_version=2)
    code, out, _ = deberta(capsys, "list", run)
    assert code == 0
    assert "written by a newer program" in out


@pytest.mark.parametrize("which", ["run", "checkpoints", "commit"])
def test_verify(run, capsys, which):
    path = {"run": run, "checkpoints": run / "checkpoints", "commit": commit(run, 8)}[which]
    code, out, _ = deberta(capsys, "verify", path)
    assert code == 0
    assert out.count(": valid") == (1 if which == "commit" else 3)
    flip_a_byte(commit(run, 8) / "joint" / "rank-00000.safetensors")
    flip_a_byte(commit(run, 8) / "train_state.json")
    (commit(run, 8) / "payload.pkl").write_bytes(b"")
    code, out, _ = deberta(capsys, "verify", path)
    assert code == EXIT_CORRUPT
    for name in ("joint/rank-00000.safetensors: sha", "train_state.json: sha", "payload.pkl: not"):
        assert f"{commit(run, 8)}/{name}" in out
    assert out.count(": valid") == (0 if which == "commit" else 2)
    code, out, _ = deberta(capsys, "verify", path, "--json")
    assert code == EXIT_CORRUPT
    assert len(json.loads(out)[str(commit(run, 8))]) == 3


def test_verify_a_commit_without_its_manifest(run, capsys):
    (commit(run, 8) / "manifest.json").unlink()
    code, out, _ = deberta(capsys, "verify", commit(run, 8))
    assert code == EXIT_CORRUPT
    assert "manifest.json: unreadable" in out


def test_prune(run, capsys):
    code, out, _ = deberta(capsys, "prune", run, "--keep-last", 1, "--dry-run")
    assert (code, steps(run)) == (0, [4, 8, 12])
    assert "2 would be removed" in out
    code, out, _ = deberta(
        capsys, "prune", run, "--keep-last", 1, "--milestone-interval-steps", 8, "--json"
    )
    assert (code, steps(run)) == (0, [8, 12])
    assert json.loads(out)["removed"] == [str(commit(run, 4))]
    assert json.loads(out)["freed_bytes"] > 1000
    assert not (run / ".holder.json").exists()


def test_prune_never_removes_the_newest_valid_one(run, capsys):
    flip_a_byte(commit(run, 12) / "joint" / "rank-00000.safetensors")
    code, out, _ = deberta(capsys, "prune", run, "--keep-last", 1)
    assert (code, steps(run)) == (0, [8, 12])
    assert "sha256 is" in out
    assert "not counted" in out
    flip_a_byte(commit(run, 8) / "train_state.json")
    code, _, err = deberta(capsys, "prune", run, "--keep-last", 1)
    assert (code, steps(run)) == (EXIT_CORRUPT, [8, 12])
    assert "no checkpoint is whole, so none is removed" in err


def test_prune_keeps_off_a_run_that_trains(run, capsys):
    holder = RunFolder(run)
    holder.acquire()
    try:
        code, _, err = deberta(capsys, "prune", run, "--keep-last", 1)
    finally:
        holder.release()
    assert (code, steps(run)) == (EXIT_USAGE, [4, 8, 12])
    assert f"{run} is in use by" in err


def test_inspect(random_run, capsys):
    code, out, _ = deberta(capsys, "inspect", random_run.folder)
    assert code == 0
    for text in (
        str(random_run.commit),
        "12,800",
        "generator 37, discriminator 37",
        "2, trained by 2",
        "torch 0.0-test",
        (random_run.commit / "manifest.sha256").read_text().strip(),
    ):
        assert text in out
    code, out, _ = deberta(capsys, "inspect", random_run.commit, "--json")
    summary = json.loads(out)
    assert summary["config"]["run_config"]["run"]["seed"] == 5
    assert len(summary["files"]["train_state.json"]["sha256"]) == 64


def test_inspect_reads_every_byte_first(random_run, tmp_path, capsys):
    copy = shutil.copytree(random_run.commit, tmp_path / "step-00000040")
    flip_a_byte(copy / "generator" / "rank-00001.safetensors")
    code, _, err = deberta(capsys, "inspect", copy)
    assert code == EXIT_CORRUPT
    assert "rank-00001.safetensors: sha256 is" in err


def test_convert(random_run, tmp_path, capsys):
    output = tmp_path / "one" / "checkpoints" / "step-00000040"
    code, out, _ = deberta(capsys, "convert", random_run.folder, output, "--world-size", 1)
    assert code == 0
    assert f"{output}: step 40 of {random_run.commit}" in out
    assert deberta(capsys, "verify", tmp_path / "one")[0] == 0
    output = tmp_path / "whole"
    code, out, _ = deberta(capsys, "convert", random_run.commit, output, "--consolidated", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == sum(path.stat().st_size for path in output.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("list", "{nowhere}"), "nowhere: no such folder; name a run folder"),
        (("list", "{empty}"), "empty: no run folder with a checkpoint"),
        (("verify", "{empty}"), "empty: no run folder with a checkpoint"),
        (("prune", "{run}/checkpoints", "--keep-last", "1"), "no run folder with a checkpoint"),
        (("inspect", "{nowhere}"), "nowhere: no such folder"),
        (("convert", "{run}", "{nowhere}"), "give --world-size N or --consolidated, one of them"),
        (
            ("convert", "{run}", "{nowhere}", "--world-size", "1", "--consolidated"),
            "give --world-size N or --consolidated, one of them",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(run, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / name for name in ("run", "empty", "nowhere")}
    code, _, err = deberta(capsys, *(word.format(**names) for word in words))
    assert code == EXIT_USAGE
    assert err.startswith("error: ")
    assert message in err
    assert not (run / "checkpoints" / "checkpoints").exists()
