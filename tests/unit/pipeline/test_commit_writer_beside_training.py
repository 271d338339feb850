"""Commits that are written while training goes on: one at a time, and nothing is lost."""

import gc
import logging
import threading
import weakref
from types import SimpleNamespace

import pytest

from pipeline import checkpoint, commit_writer, faults
from pipeline.checkpoint import CheckpointStore, SaveError
from pipeline.commit import Commit, commit_name
from pipeline.config import CheckpointSection
from tests.commits import CONFIG, contents, left_behind, state, steps, store, take_step

pytestmark = pytest.mark.usefixtures("short_pauses")


class Gate:
    """Holds back whoever writes tensors, until it is opened."""

    def __init__(self, monkeypatch):
        self.arrived, self._open = threading.Event(), threading.Event()
        self._write = commit_writer.write_snapshot
        monkeypatch.setattr(commit_writer, "write_snapshot", self._wait)

    def _wait(self, *arguments):
        self.arrived.set()
        assert self._open.wait(60)
        self._write(*arguments)

    def open(self):
        self._open.set()


def test_training_goes_on_while_the_step_s_state_is_written(engines, tmp_path, monkeypatch):
    train_state = {"state": {"step": 4, "skipped": {"generator": 0}}}
    store(tmp_path / "waits").save(4, engines, train_state, CONFIG)
    gate = Gate(monkeypatch)
    ours = store(tmp_path / "beside", asynchronous=True)
    commit = ours.save(4, engines, train_state, CONFIG)
    assert commit == Commit(tmp_path / "beside" / commit_name(4), 4)
    assert gate.arrived.wait(60)
    assert (ours.published_step, steps(tmp_path / "beside")) == (0, [])
    for engine in engines.values():
        take_step(engine)
    train_state["state"]["skipped"]["generator"] = 7
    gate.open()
    ours.finish()
    assert ours.published_step == 4
    assert contents(tmp_path / "beside") == contents(tmp_path / "waits")
    ours.finish()  # nothing is under way any more


def test_one_write_at_a_time(engines, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    published = []
    ours = store(tmp_path, asynchronous=True, on_published=published.append)
    ours.save(4, engines, state(4), CONFIG)
    assert gate.arrived.wait(60)
    second = threading.Thread(target=ours.save, args=(8, engines, state(8), CONFIG))
    second.start()
    second.join(1)
    assert second.is_alive(), "the second save waits for the first commit"
    assert published == []
    gate.open()
    second.join(60)
    ours.finish()
    assert published == steps(tmp_path) == [4, 8]


def test_a_failed_write_is_raised_by_the_next_save_which_goes_on(engines, tmp_path):
    faults.configure("save.share:0:4:enospc", 0)
    ours = store(tmp_path, asynchronous=True)
    ours.save(4, engines, state(4), CONFIG)
    with pytest.raises(SaveError, match="step-00000004 needs"):
        ours.save(8, engines, state(8), CONFIG)
    ours.finish()
    assert steps(tmp_path) == [8]
    assert left_behind(tmp_path) == set()


def test_a_failed_write_is_raised_by_finish_once(engines, tmp_path):
    faults.configure("save.share:0:4:enospc", 0)
    ours = store(tmp_path, asynchronous=True)
    ours.save(4, engines, state(4), CONFIG)
    with pytest.raises(SaveError, match="No space left on device"):
        ours.finish()
    ours.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_last_commit_waits_and_replaces_one_that_failed(engines, tmp_path, caplog):
    faults.configure("save.share:0:4:enospc", 0)
    ours = store(tmp_path, asynchronous=True)
    ours.save(4, engines, state(4), CONFIG)
    with caplog.at_level(logging.WARNING):
        ours.save(8, engines, state(8), CONFIG, wait=True)
    assert steps(tmp_path) == [8]
    assert "No space left on device" in caplog.text
    assert "step 8 is written now" in caplog.text


def test_looking_for_a_commit_waits_for_the_one_under_way(engines, tmp_path, monkeypatch, caplog):
    gate = Gate(monkeypatch)
    ours = store(tmp_path, asynchronous=True)
    ours.save(4, engines, state(4), CONFIG)
    assert gate.arrived.wait(60)
    threading.Timer(0.2, gate.open).start()
    assert ours.newest_valid().step == 4
    faults.configure("save.share:0:8:enospc", 0)
    ours.save(8, engines, state(8), CONFIG)
    with caplog.at_level(logging.WARNING):
        assert ours.newest_valid().step == 4
    assert "step-00000008 needs" in caplog.text


def test_progress_of_a_write_beside_training_is_told_to_whoever_waits(engines, tmp_path):
    marks = []
    ours = store(
        tmp_path,
        asynchronous=True,
        on_progress=lambda: marks.append(threading.current_thread()),
    )
    faults.configure("save.rename:0:4:sleep:1", 0)
    ours.save(4, engines, state(4), CONFIG)
    assert marks == []
    ours.finish()
    assert marks
    assert set(marks) == {threading.main_thread()}


def test_several_ranks_need_a_group_for_it(tmp_path):
    group = SimpleNamespace(size=lambda: 2)
    section = CheckpointSection(asynchronous=True)
    with pytest.raises(ValueError, match="several ranks need a writer_group"):
        CheckpointStore(tmp_path, section, 0, group)
    CheckpointStore(tmp_path, section, 0, group, writer_group=group)


def test_a_snapshot_is_freed_when_it_is_written(engines, tmp_path, monkeypatch):
    taken = []
    snapshot = checkpoint.snapshot

    def remember(engine, rank):
        made = snapshot(engine, rank)
        taken.extend(weakref.ref(values) for values in made.tensors.values())
        return made

    monkeypatch.setattr(checkpoint, "snapshot", remember)
    for fault in ("", "save.written:0:*:eio"):
        taken.clear()
        faults.configure(fault, 0)
        ours = store(tmp_path, asynchronous=True)
        ours.save(4, engines, state(4), CONFIG)
        ours._under_way._thread.join()
        gc.collect()
        assert taken
        assert not any(reference() is not None for reference in taken), fault
        faults.configure("", 0)
