"""What stays in a checkpoints folder: damage never counts, and the last whole commit never goes."""

import logging
from pathlib import Path

import pytest

from data_prep.errors import CorruptError
from pipeline import commit_upkeep
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit, commit_name, list_commits
from pipeline.commit_upkeep import Upkeep, beyond_retention, prune_commits
from pipeline.config import CheckpointSection
from tests.commits import contents, flip_a_byte, plain_engine, reseal

ENGINE = plain_engine()
CONFIG = "{}\n"


def store(folder, **section):
    return CheckpointStore(folder, CheckpointSection(**section), 0, None)


def steps(folder):
    return [commit.step for commit in list_commits(folder)]


@pytest.fixture
def folder(tmp_path):
    """Commits 4, 8, 12, 16 and 20."""
    for step in (4, 8, 12, 16, 20):
        store(tmp_path, keep_last=9).save(step, {"joint": ENGINE}, {"step": step}, CONFIG)
    return tmp_path


def commits(*numbers):
    return [Commit(Path(commit_name(step)), step) for step in numbers]


@pytest.mark.parametrize(
    ("keep_last", "every", "damaged", "removed"),
    [
        (2, 0, (), (4, 8, 12)),
        (2, 8, (), (4, 12)),
        (1, 0, (), (4, 8, 12, 16)),
        (5, 0, (), ()),
        (9, 0, (), ()),
        (2, 0, (20,), (4, 8)),
        (2, 0, (12, 16), (4,)),
        (1, 0, (12, 16, 20), (4,)),
        (2, 0, (4,), (4, 8, 12)),
        (1, 0, (4, 8, 12, 16, 20), ()),
    ],
)
def test_what_may_go(keep_last, every, damaged, removed):
    chosen = beyond_retention(
        commits(4, 8, 12, 16, 20), keep_last, every, lambda commit: commit.step not in damaged
    )
    assert chosen == commits(*removed)


def test_only_as_many_as_needed_are_looked_at():
    asked = []
    beyond_retention(commits(4, 8, 12, 16), 2, 0, lambda c: asked.append(c.step) or True)
    assert asked == [16, 12]


@pytest.mark.parametrize("damage", ["shorter", "missing", "seal"])
def test_a_commit_that_cannot_be_whole_does_not_push_out_one_that_is(folder, damage, caplog):
    """20 is damaged after it was written: with two to keep, 16 and 24 are those two."""
    path = folder / commit_name(20) / "joint" / "rank-00000.safetensors"
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        flip_a_byte(folder / commit_name(20) / "manifest.sha256")
    with caplog.at_level(logging.WARNING):
        store(folder, keep_last=2).save(24, {"joint": ENGINE}, {"step": 24}, CONFIG)
    assert steps(folder) == [16, 20, 24]
    assert "it does not count as kept" in caplog.text
    flip_a_byte(folder / commit_name(24) / "manifest.json")
    assert store(folder).newest_valid().step == 16


def test_damage_that_is_found_at_the_start_does_not_count_either(folder, monkeypatch, caplog):
    """A flipped bit has the right size; where the commit cannot be renamed it is still known."""
    flip_a_byte(folder / commit_name(20) / "joint" / "rank-00000.safetensors")
    ours = store(folder, keep_last=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        assert ours.newest_valid().step == 16
    assert "could not be set aside" in caplog.text
    ours.save(24, {"joint": ENGINE}, {"step": 24}, CONFIG)
    assert steps(folder) == [16, 20, 24]
    ours.save(20, {"joint": ENGINE}, {"step": 20}, CONFIG)  # written again, it counts again
    assert steps(folder) == [20, 24]


def test_commits_of_a_newer_program_count(folder):
    reseal(folder / commit_name(20), format_version=2)
    store(folder, keep_last=2).save(24, {"joint": ENGINE}, {"step": 24}, CONFIG)
    assert steps(folder) == [20, 24]


def test_leftovers_go_and_strange_ones_do_no_harm(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").touch()
    (folder / "step-00000024.partial").symlink_to(elsewhere)
    (folder / "step-00000028.removing" / "deep").mkdir(parents=True)
    (folder / "latest.host-1.partial").touch()
    Upkeep(folder, CheckpointSection()).remove_leftovers()
    names = {path.name for path in folder.iterdir()}
    assert names == {"latest", *map(commit_name, (4, 8, 12, 16, 20))}
    assert (elsewhere / "precious").exists()


def test_pruning_by_hand(folder):
    before = contents(folder)
    size = sum(len(v) for name, v in before.items() if name.startswith(commit_name(4)))
    dry = prune_commits(folder, 2, 8, dry_run=True)
    assert contents(folder) == before
    assert prune_commits(folder, 2, 8, dry_run=False) == dry
    assert [commit.step for commit in dry.removed] == [4, 12]
    assert [commit.step for commit in dry.kept] == steps(folder) == [8, 16, 20]
    assert (dry.damaged, dry.freed_bytes) == ({}, 2 * size + 2)  # two steps of two digits


def test_pruning_by_hand_reads_every_byte_of_what_stays(folder):
    """A flipped bit in each of the two newest: the newest whole one is the third."""
    for step in (16, 20):
        flip_a_byte(folder / commit_name(step) / "joint" / "rank-00000.safetensors")
    report = prune_commits(folder, 1, 0, dry_run=False)
    assert steps(folder) == [12, 16, 20]
    assert [path.name for path in report.damaged] == [commit_name(20), commit_name(16)]
    assert all("sha256 is" in text for text in report.damaged.values())


def test_pruning_by_hand_without_a_whole_commit(folder, tmp_path_factory):
    for step in steps(folder):
        flip_a_byte(folder / commit_name(step) / "train_state.json")
    with pytest.raises(CorruptError, match="no checkpoint is whole, so none is removed"):
        prune_commits(folder, 1, 0, dry_run=False)
    assert steps(folder) == [4, 8, 12, 16, 20]
    empty = prune_commits(tmp_path_factory.mktemp("empty"), 1, 0, dry_run=False)
    assert (empty.removed, empty.kept) == ([], [])


def test_room_is_asked_where_the_folder_is_or_was(tmp_path):
    assert commit_upkeep.free_bytes(tmp_path / "gone" / "checkpoints") > 0
