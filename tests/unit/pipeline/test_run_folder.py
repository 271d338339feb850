"""The run folder: one holder, files that are old or new and never half, rows cut at a commit."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_prep.errors import EXIT_USAGE, CorruptError, UserError
from pipeline.run_folder import RunFolder, write_durably
from pipeline.run_lock import Holder

ROOT = Path(__file__).parents[3]


def in_another_process(code, *words):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


ACQUIRE = """
import sys
from pathlib import Path
from pipeline.run_folder import RunFolder
RunFolder(Path(sys.argv[1])).acquire()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    second = in_another_process(ACQUIRE, folder.path)
    assert second.returncode != 0
    message = second.stderr.strip().splitlines()[-1]
    assert f"run.folder {folder.path} is in use by process {os.getpid()} on host" in message
    assert "choose another run.folder" in message
    folder.release()
    assert in_another_process(ACQUIRE, folder.path).returncode == 0


def test_a_killed_holder_leaves_no_lock(tmp_path):
    killed = in_another_process(ACQUIRE + "\nimport os; os.kill(os.getpid(), 9)", tmp_path / "run")
    assert killed.returncode == -9
    folder = RunFolder(tmp_path / "run")
    assert "which has ended without leaving it" in folder.acquire("77")
    assert "job 77" in str(Holder.read(folder.path / ".holder.json"))
    folder.release()


@pytest.mark.parametrize("place", [".", ".lock", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, place):
    """A file or folder of the same name stands in for missing rights, which root does not miss."""
    path = tmp_path / "run" / place
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if place == ".lock" else path.write_text("in the way")
    with pytest.raises(UserError, match=r"choose another run\.folder") as caught:
        RunFolder(tmp_path / "run").acquire()
    assert str(tmp_path / "run") in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


def test_naming_a_folder_touches_nothing(tmp_path):
    RunFolder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "state.json"
    write_durably(path, "old")
    descriptor = path.open()
    write_durably(path, "new\n")
    assert descriptor.read() == "old", "a reader keeps the file that it opened"
    descriptor.close()
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "state.json"
    write_durably(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_durably(path, "new\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_replace_the_same_file_do_not_meet(tmp_path):
    """All ranks of a diverged run write state.json at the same moment."""
    code = (
        "import sys; from pathlib import Path; from pipeline.run_folder import write_durably\n"
        "for _ in range(200): write_durably(Path(sys.argv[1]), sys.argv[2] * 1000)"
    )
    results = []
    threads = [
        threading.Thread(
            target=lambda word=word: results.append(
                in_another_process(code, tmp_path / "state.json", word)
            )
        )
        for word in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0, 0], results[0].stderr
    assert len(set((tmp_path / "state.json").read_text())) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_status(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_status("corrupt", None, "before the first commit")
    assert read(tmp_path)["step"] == 0
    folder.write_status("running", 40)
    folder.write_status("diverged", None, "20 steps")
    assert read(tmp_path) == {"status": "diverged", "step": 40, "reason": "20 steps"}


def read(folder):
    return json.loads((folder / "state.json").read_text())


def test_restarts_are_appended(tmp_path):
    folder = RunFolder(tmp_path)
    folder.note_restart(0, 2, [])
    folder.note_restart(8, 1, ["1 ranks instead of 2"])
    lines = (tmp_path / "restarts.jsonl").read_text().splitlines()
    assert [(json.loads(line)["step"], json.loads(line)["world_size"]) for line in lines] == [
        (0, 2),
        (8, 1),
    ]


ROWS = [
    '{"step": 3, "train/mlm_loss": 5.0}',
    '{"step": 6, "train/mlm_loss": 4.0}',
    '{"step": 6, "eval/mlm_loss": 4.5}',
    '{"step": 9, "train/mlm_loss": 3.0}',
]


def cut(tmp_path, text, step, **options):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(text)
    dropped = folder.cut_metrics(step, **options)
    return folder.metrics.read_text(), dropped


def lines(*rows):
    return "".join(row + "\n" for row in rows)


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 3), (8, 3), (9, 4)])
def test_rows_behind_the_commit_are_cut(tmp_path, step, kept):
    assert cut(tmp_path, lines(*ROWS), step) == (lines(*ROWS[:kept]), 4 - kept)


@pytest.mark.parametrize("torn", ['{"step": 9, "tra', '{"step"', "{", "[]", "12", "null", "\0" * 9])
def test_a_torn_row_is_cut(tmp_path, torn):
    assert cut(tmp_path, lines(*ROWS) + torn, 100) == (lines(*ROWS), 1)


def test_a_row_torn_before_its_newline_does_not_swallow_the_next(tmp_path):
    text = lines(*ROWS)
    assert cut(tmp_path, text.removesuffix("\n"), 100) == (text, 0)


def test_an_evaluation_that_is_owed_is_cut(tmp_path):
    expected = lines(ROWS[0], ROWS[1])
    assert cut(tmp_path, lines(*ROWS), 6, owes_evaluation=True) == (expected, 2)


def test_without_metrics_there_is_nothing_to_cut(tmp_path):
    assert RunFolder(tmp_path).cut_metrics(5) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "running"}'])
def test_a_damaged_status(tmp_path, content):
    folder = RunFolder(tmp_path)
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CorruptError, match=r"state\.json: cannot be read .*; remove it"):
        folder.committed_step()
    folder.write_status("corrupt", None, "why")
    assert folder.committed_step() == 0
