"""Writing a commit: what fails, what is tried again, what is said, and what is left behind."""

import errno
import logging
import re
import shutil
import threading
from types import SimpleNamespace

import pytest

from pipeline import commit_upkeep, commit_writer, faults
from pipeline.checkpoint import SaveError
from pipeline.commit import commit_name, list_commits, verify_commit
from tests.commits import CONFIG, contents, left_behind, state, steps, store

POINTS = [point for point in faults.POINTS if point.startswith("save.")]
BEFORE_THE_NAME = POINTS[: POINTS.index("save.latest")]

pytestmark = pytest.mark.usefixtures("short_pauses")


def save_and_finish(ours, engines, step, **options):
    """Save, and hear of its failure in either form."""
    ours.save(step, engines, state(step), CONFIG, **options)
    ours.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", ["enospc", "eio", "erofs"])
@pytest.mark.parametrize("point", BEFORE_THE_NAME)
def test_a_passing_failure_is_tried_again(engines, tmp_path, point, error, asynchronous, caplog):
    store(tmp_path / "undisturbed").save(4, engines, state(4), CONFIG)
    faults.configure(f"{point}:0:4:{error}::2", 0)
    ours = store(tmp_path / "ours", asynchronous=asynchronous)
    with caplog.at_level(logging.WARNING):
        ours.save(4, engines, state(4), CONFIG)
        ours.finish()
    assert contents(tmp_path / "ours") == contents(tmp_path / "undisturbed")
    assert left_behind(tmp_path / "ours") == set()
    assert all(f"attempt {number} of 3" in caplog.text for number in (1, 2))


@pytest.mark.parametrize("attempts", [1, 2, 4])
def test_attempts_end(engines, tmp_path, attempts):
    store(tmp_path).save(4, engines, state(4), CONFIG)
    before = contents(tmp_path)
    faults.configure(f"save.written:0:8:enospc::{attempts}", 0)
    with pytest.raises(SaveError) as caught:
        store(tmp_path, write_attempts=attempts).save(8, engines, state(8), CONFIG)
    text = str(caught.value)
    assert f"rank 0 cannot write a checkpoint into {tmp_path}" in text
    assert "No space left on device" in text
    assert re.search(r"step-00000008 needs [\d,]+ bytes, [\d,]+ bytes are free there", text)
    assert contents(tmp_path) == before
    store(tmp_path).save(8, engines, state(8), CONFIG)
    assert steps(tmp_path) == [4, 8]


def test_what_does_not_pass_is_not_tried_again(engines, tmp_path, monkeypatch):
    tried = []

    def refuse(*_):
        tried.append(1)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(commit_writer, "write_snapshot", refuse)
    with pytest.raises(SaveError, match="Permission denied"):
        store(tmp_path, write_attempts=5).save(4, engines, state(4), CONFIG)
    assert len(tried) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("point", ["save.latest", "save.prune"])
def test_nothing_after_the_rename_unmakes_a_commit(engines, tmp_path, point, caplog):
    faults.configure(f"{point}:0:*:eio", 0)
    ours = store(tmp_path, keep_last=1)
    for step in (4, 8):
        with caplog.at_level(logging.WARNING):
            ours.save(step, engines, state(step), CONFIG)
        assert ours.published_step == step
    assert f"{commit_name(8)} is committed, but what follows failed" in caplog.text
    for commit in list_commits(tmp_path):
        verify_commit(commit)
    faults.configure("", 0)
    ours.save(12, engines, state(12), CONFIG)
    assert steps(tmp_path) == [12]


def test_a_mistake_keeps_its_traceback_and_nothing_is_published(engines, tmp_path):
    for asynchronous in (False, True):
        faults.configure("save.manifest:0:4:raise", 0)
        ours = store(tmp_path, asynchronous=asynchronous)
        with pytest.raises(RuntimeError, match=r"injected at save\.manifest"):
            save_and_finish(ours, engines, 4)
        faults.configure("", 0)
        assert ours.newest_valid() is None
        assert list(tmp_path.iterdir()) == []


def disk_of(monkeypatch, folder, capacity):
    """Let a disk be as large as `capacity` bytes, of which the folder's files use some."""

    def usage(_):
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(free=capacity - used)

    monkeypatch.setattr(commit_upkeep.shutil, "disk_usage", usage)


def test_too_little_room_is_said_before_anything_is_written(engines, tmp_path, monkeypatch):
    store(tmp_path).save(4, engines, state(4), CONFIG)
    before = contents(tmp_path)
    disk_of(monkeypatch, tmp_path, commit_writer.SPARE_BYTES)
    written = []
    monkeypatch.setattr(commit_writer, "write_durably", lambda *_: written.append(1))
    for wait in (False, True):
        ours = store(tmp_path, asynchronous=not wait)
        with pytest.raises(SaveError) as caught:
            save_and_finish(ours, engines, 8, wait=wait)
        numbers = re.findall(r"([\d,]+) bytes", str(caught.value))
        needed, free = (int(number.replace(",", "")) for number in numbers)
        slices = 2 * 3 * 4 * (7 * 5 + 5 + 5 * 3 + 3)
        assert needed == slices + slices // 100 + commit_writer.SPARE_BYTES
        assert free == commit_writer.SPARE_BYTES - sum(map(len, before.values()))
        assert str(caught.value).startswith(f"{tmp_path}: commit step-00000008 needs")
        assert "make room, or lower checkpoint.keep_last (now 3)" in str(caught.value)
    assert contents(tmp_path) == before
    assert not written


def test_old_commits_make_room_and_the_last_one_stays(engines, tmp_path, monkeypatch):
    ours = store(tmp_path, keep_last=3)
    for step in (4, 8, 12):
        ours.save(step, engines, state(step), CONFIG)
    used = sum(map(len, contents(tmp_path).values()))
    needed = 2 * 3 * 4 * (7 * 5 + 5 + 5 * 3 + 3)
    margin = needed // 100 + commit_writer.SPARE_BYTES
    disk_of(monkeypatch, tmp_path, used + needed + margin - 1)  # one byte too few
    ours.save(16, engines, state(16), CONFIG)
    assert steps(tmp_path) == [8, 12, 16], "4 had to go before 16 was written"
    disk_of(monkeypatch, tmp_path, 0)
    with pytest.raises(SaveError):
        ours.save(20, engines, state(20), CONFIG)
    assert steps(tmp_path) == [12, 16], "one less than will be kept, and 20 was about to come"
    one = store(tmp_path, keep_last=1)
    assert one.newest_valid().step == 16
    with pytest.raises(SaveError):
        one.save(20, engines, state(20), CONFIG)
    assert steps(tmp_path) == [16]


def test_without_a_verified_commit_nothing_makes_room(engines, tmp_path, monkeypatch):
    """Of these commits nobody has read a byte: any of them may be the last whole one."""
    for step in (4, 8, 12):
        store(tmp_path).save(step, engines, state(step), CONFIG)
    disk_of(monkeypatch, tmp_path, 0)
    with pytest.raises(SaveError):
        store(tmp_path, keep_last=1).save(16, engines, state(16), CONFIG)
    assert steps(tmp_path) == [4, 8, 12]


def test_a_share_that_rank_0_does_not_see_is_no_commit(engines, tmp_path, monkeypatch):
    """As on a disk that is not shared: what another rank has written is not in rank 0's folder."""
    gather = commit_writer.gather

    def with_rank_1(value, group):
        (answer,) = gather(value, group)
        result, problem = answer if isinstance(answer, tuple) else (None, None)
        if isinstance(result, dict):
            other = {name.replace("00000", "00001"): entry for name, entry in result.items()}
            return [answer, (other, problem)]
        return [answer]

    monkeypatch.setattr(commit_writer, "gather", with_rank_1)
    with pytest.raises(SaveError, match=r"rank 0 does not see it: run\.folder must be on a file s"):
        store(tmp_path).save(4, engines, state(4), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(engines, tmp_path):
    marks = []
    ours = store(tmp_path, on_progress=lambda: marks.append(threading.current_thread()))
    ours.save(4, engines, state(4), CONFIG)
    assert len(marks) > 2 * 3 * 4  # more than one a tensor
    marks.clear()
    ours.newest_valid()
    assert len(marks) >= 4  # one a file
    assert set(marks) == {threading.main_thread()}


# --- beside training ---


def test_state_is_told_after_latest_and_before_old_commits_go(engines, tmp_path):
    seen = []

    def note(step):
        seen.append((step, (tmp_path / "latest").read_text().strip(), steps(tmp_path)))

    for asynchronous in (False, True):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        ours = store(tmp_path, keep_last=1, asynchronous=asynchronous, on_published=note)
        for step in (4, 8):
            ours.save(step, engines, state(step), CONFIG)
        ours.finish()
        assert seen == [(4, commit_name(4), [4]), (8, commit_name(8), [4, 8])]
        seen.clear()


def test_a_state_that_cannot_be_told_does_not_unmake_the_commit(engines, tmp_path, caplog):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "state.json")

    with caplog.at_level(logging.WARNING):
        store(tmp_path, on_published=full).save(4, engines, state(4), CONFIG)
    assert steps(tmp_path) == [4]
    assert "is committed, but what follows failed" in caplog.text
