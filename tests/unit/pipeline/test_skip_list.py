"""The file of roll-backs: what was written is read back, and anything else is refused by line."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_prep.errors import CorruptError, UserError
from pipeline import run_folder
from pipeline.sample_order import SkippedWindow
from pipeline.skip_list import FILE_NAME, RollBack, RollBackLog

FIRST = RollBack(1, 12, 8, "ten steps were not finite", (SkippedWindow(32, 64, 96),))
SECOND = RollBack(
    2, 30, 24, 'a spike, "x" and \u2028', (SkippedWindow(32, 9, 10), SkippedWindow(64, 0, 8))
)
THIRD = RollBack(3, 40, 36, "again", ())


def log_of(folder, remembered=""):
    return RollBackLog.open(folder, remembered, is_main=True, group=None)


def read(folder, remembered=""):
    return log_of(folder, remembered).roll_backs


def append(log, new):
    log.append(new.at_step, new.commit_step, new.reason, new.windows)


@pytest.fixture
def log(tmp_path):
    """Three roll-backs in a folder, appended one by one."""
    log = log_of(tmp_path)
    for new in (FIRST, SECOND, THIRD):
        append(log, new)
    return log


def test_what_is_appended_is_read_back(tmp_path, log):
    assert [replace(each, sha256="") for each in log.roll_backs] == [FIRST, SECOND, THIRD]
    assert read(tmp_path) == log.roll_backs
    assert len({each.sha256 for each in log.roll_backs}) == 3
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(lines[0])["windows"] == [
        {"sequence_length": 32, "first_position": 64, "end_position": 96}
    ]
    for each in log.roll_backs:
        assert read(tmp_path, each.sha256) == log.roll_backs
    assert log.newest_sha256 == log.roll_backs[-1].sha256
    assert log.skip_list.windows == (*FIRST.windows, *SECOND.windows)
    assert log.skip_list.positions(32, np.array([8, 9, 63])).tolist() == [8, 10, 96]


def test_a_log_that_was_opened_again_grows_on(tmp_path, log):
    again = log_of(tmp_path, log.newest_sha256)
    append(again, FIRST)
    append(log, FIRST)
    assert again.roll_backs == log.roll_backs == read(tmp_path)
    assert again.roll_backs[3].number == 4


def test_a_run_without_roll_backs_has_no_file(tmp_path):
    assert read(tmp_path) == []
    assert log_of(tmp_path).newest_sha256 == ""
    assert log_of(tmp_path).skip_list.windows == ()
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_touch_no_file(tmp_path):
    other = RollBackLog(tmp_path, [], is_main=False, group=None)
    append(other, FIRST)
    assert [replace(each, sha256="") for each in other.roll_backs] == [FIRST]
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_any_byte_is_found(tmp_path, log):
    path = tmp_path / FILE_NAME
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptError) as caught:
            read(tmp_path)
        assert str(path) in str(caught.value), position


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [*lines[:2], lines[2][:-20]], 3),
        (lambda lines: [*lines[:2], lines[2].rstrip("\n")], 3),
        (lambda lines: [*lines, lines[2]], 4),
        (lambda lines: [lines[0], "\n", *lines[1:]], 2),
        (lambda lines: [lines[0].replace("96", "95"), *lines[1:]], 1),
        (lambda lines: [lines[0], "[]\n"], 2),
        (lambda lines: [lines[0], "{}\n"], 2),
        (lambda lines: [lines[0], '{"windows": 5}\n'], 2),
    ],
)
def test_a_change_of_the_lines_is_refused_by_number(tmp_path, log, change, line):
    path = tmp_path / FILE_NAME
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(CorruptError) as caught:
        read(tmp_path)
    assert f"{path}, line {line}: " in str(caught.value)
    assert "restore it from a copy" in str(caught.value)


def test_a_line_belongs_behind_the_one_before_it(tmp_path, log):
    """Whole lines of two runs, their numbers in order."""
    path, other = tmp_path / FILE_NAME, tmp_path / "other"
    other.mkdir()
    append(log_of(other), THIRD)
    first = (other / FILE_NAME).read_text()
    path.write_text(first + "".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(CorruptError, match="line 2: its sha256 is not that of its text and of the"):
        read(tmp_path)


def test_numbers_must_be_numbers_whatever_their_sha256_says(tmp_path):
    append(log_of(tmp_path), RollBack(1, "12", 8, "", ()))
    with pytest.raises(CorruptError, match="line 1: is torn or damaged"):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 2])
def test_a_commit_misses_the_lines_that_it_was_made_with(tmp_path, log, kept):
    path = tmp_path / FILE_NAME
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    remembered = log.roll_backs[kept - 1].sha256 if kept else ""
    assert len(read(tmp_path, remembered)) == kept
    missing = log.newest_sha256
    with pytest.raises(CorruptError, match=f"a line of sha256 {missing[:12]}, which is not there"):
        read(tmp_path, missing)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(CorruptError, match=f"{FILE_NAME}: cannot be read"):
        read(tmp_path)
    (tmp_path / FILE_NAME).rmdir()
    (tmp_path / FILE_NAME).write_bytes(b"\xff\n")
    with pytest.raises(CorruptError, match=f"{FILE_NAME}: cannot be read"):
        read(tmp_path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, log, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(UserError) as caught:
        append(log, RollBack(4, 50, 44, "full", ()))
    monkeypatch.undo()
    assert not isinstance(caught.value, CorruptError)
    assert "the roll-back from step 50 to step 44 cannot be recorded" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert len(log.roll_backs) == 3
    assert read(tmp_path) == log.roll_backs
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
