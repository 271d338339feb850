"""Commits: whole or absent, and no byte of a damaged one is used."""

import logging
import re
import resource
import shutil

import pytest

from data_prep.errors import CorruptError
from pipeline.checkpoint import CheckpointStore, SaveError
from pipeline.commit import (
    Commit,
    commit_name,
    list_commits,
    sha256_of,
    verify_commit,
)
from pipeline.config import CheckpointSection
from pipeline.engine_state import StateReader
from tests.commits import contents, flip_a_byte, reseal
from tests.engines import rig

TRAIN_STATE = {"state": {"step": 4}, "interval_sums": ["0x0.0p+0"]}
CONFIG = '{"format": 1}\n'


@pytest.fixture(scope="module")
def engines(world):
    """Engines that have taken a step."""
    one = rig(world)
    one.run(0)
    return one.engines.by_name


@pytest.fixture(scope="module")
def written(engines, tmp_path_factory):
    """A folder with one commit, read-only."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    folder.mkdir()
    store(folder).save(4, engines, TRAIN_STATE, CONFIG)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A folder with commits 4, 8 and 12, all alike."""
    for step in (4, 8, 12):
        commit = tmp_path / "checkpoints" / commit_name(step)
        shutil.copytree(written / commit_name(4), commit)
        reseal(commit, step=step)
    return tmp_path / "checkpoints"


def store(folder, **section):
    return CheckpointStore(folder, CheckpointSection(**section), 0, None)


def steps(folder):
    return [commit.step for commit in list_commits(folder)]


def test_a_commit_holds_what_it_says(written, engines):
    commit = Commit(written / commit_name(4), 4)
    verify_commit(commit)
    assert commit.read_json("train_state.json") == TRAIN_STATE
    assert (commit.path / "config.resolved.json").read_text() == CONFIG
    manifest = commit.read_json("manifest.json")
    names = {p.relative_to(commit.path).as_posix() for p in commit.path.rglob("*") if p.is_file()}
    assert names == {*manifest["files"], "manifest.json", "manifest.sha256"}
    assert (manifest["step"], manifest["world_size"]) == (4, 1)
    for name, engine in engines.items():
        shapes = {key: p.shape for key, p in engine.module.named_parameters()}
        weights = StateReader(commit.path / name).weights(shapes)
        for key, parameter in engine.module.named_parameters():
            assert weights[key].equal(parameter.detach()), key
    assert (written / "latest").read_text() == "step-00000004\n"
    assert {p.name for p in written.iterdir()} == {"latest", "step-00000004"}


def test_the_seal_is_what_sha256sum_prints(written):
    commit = written / commit_name(4)
    assert (commit / "manifest.sha256").read_text().strip() == sha256_of(commit / "manifest.json")


def test_commits_are_listed_oldest_first(folder):
    for name in ("step-00000016.partial", "step-4", "step-00000020.corrupt-1", "step-000000024"):
        (folder / name).mkdir()
    assert steps(folder) == [4, 8, 12]
    assert steps(folder / "nowhere") == []


def test_the_newest_whole_commit_is_used_and_the_others_are_set_aside(folder, caplog):
    flip_a_byte(folder / commit_name(12) / "train_state.json")
    (folder / commit_name(8) / "manifest.sha256").unlink()
    with caplog.at_level(logging.WARNING):
        assert store(folder).newest_valid() == Commit(folder / commit_name(4), 4)
    assert steps(folder) == [4]
    set_aside = {p.name for p in folder.iterdir()} - {commit_name(4)}
    assert set_aside == {"step-00000012.corrupt-1", "step-00000008.corrupt-1"}
    assert "step-00000012/train_state.json: sha256 is" in caplog.text
    assert "step-00000008/manifest.sha256: unreadable" in caplog.text


def test_a_second_damaged_commit_of_a_step_gets_another_name(folder):
    (folder / "step-00000012.corrupt-1").mkdir()
    flip_a_byte(folder / commit_name(12) / "train_state.json")
    assert store(folder).newest_valid().step == 8
    assert (folder / "step-00000012.corrupt-2").is_dir()


def test_with_no_whole_commit_nothing_is_moved(folder):
    for step in (4, 8, 12):
        flip_a_byte(folder / commit_name(step) / "manifest.json")
    for _ in range(2):
        with pytest.raises(CorruptError, match="no checkpoint is whole") as caught:
            store(folder).newest_valid()
        assert str(caught.value).count("manifest.json: sha256 is") == 3
    assert steps(folder) == [4, 8, 12]


@pytest.mark.parametrize("latest", [None, "", "step-00000004\n", "step-99999999\n", "\0garbage"])
def test_latest_is_only_a_hint(folder, latest):
    if latest is not None:
        (folder / "latest").write_text(latest)
    assert store(folder).newest_valid().step == 12


def test_a_new_run_has_no_commit(tmp_path):
    assert store(tmp_path).newest_valid() is None


def test_leftovers_of_a_killed_save_are_removed(folder):
    shutil.copytree(folder / commit_name(12), folder / "step-00000016.partial")
    (folder / "step-00000004").rename(folder / "step-00000004.removing")
    (folder / "latest.host-1.partial").write_text("step")
    assert store(folder).newest_valid().step == 12
    assert {p.name for p in folder.iterdir()} == {"step-00000008", "step-00000012"}


def save(folder, engines, last, every=4, **section):
    section = store(folder, interval_steps=every, **section)
    for step in range(every, last + 1, every):
        section.save(step, engines, TRAIN_STATE, CONFIG)
        assert steps(folder)[-1] == step


def test_retention(engines, tmp_path):
    save(tmp_path, engines, 24, keep_last=2, milestone_interval_steps=8)
    assert steps(tmp_path) == [8, 16, 20, 24]
    for commit in list_commits(tmp_path):
        verify_commit(commit)
    assert not list(tmp_path.glob("*.removing"))


def test_the_newest_commit_always_stays(engines, tmp_path):
    save(tmp_path, engines, 12, keep_last=1)
    assert steps(tmp_path) == [12]


def test_damaged_commits_do_not_count_as_kept(engines, tmp_path):
    """What was set aside is no commit any more: retention never counts it in."""
    save(tmp_path, engines, 12, keep_last=2)
    flip_a_byte(tmp_path / commit_name(12) / "manifest.json")
    assert store(tmp_path, keep_last=2).newest_valid().step == 8
    store(tmp_path, keep_last=2).save(12, engines, TRAIN_STATE, CONFIG)
    assert steps(tmp_path) == [8, 12]
    assert (tmp_path / "step-00000012.corrupt-1").is_dir()


def test_what_cannot_be_removed_does_not_end_the_run(engines, folder, caplog):
    (folder / "step-00000004.removing").mkdir()
    (folder / "step-00000004.removing" / "in the way").touch()
    with caplog.at_level(logging.WARNING):
        store(folder, keep_last=2).save(16, engines, TRAIN_STATE, CONFIG)
    assert steps(folder) == [4, 12, 16]
    assert "step-00000004 could not be removed" in caplog.text


def test_a_step_can_be_committed_again(engines, folder):
    flip_a_byte(folder / commit_name(12) / "train_state.json")
    store(folder).save(12, engines, TRAIN_STATE, CONFIG)
    verify_commit(Commit(folder / commit_name(12), 12))


@pytest.fixture
def small_disk():
    """No file can grow beyond 20 kB, as on a full disk or over a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_nothing_but_the_commit(engines, folder, small_disk):
    before = contents(folder)
    with pytest.raises(SaveError) as caught:
        store(folder, keep_last=1).save(16, engines, TRAIN_STATE, CONFIG)
    assert f"rank 0 cannot write a checkpoint into {folder}" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert re.search(
        r"step-00000016 needs [\d,]+ bytes, [\d,]+ bytes are free there", str(caught.value)
    )
    assert contents(folder) == before
    small_disk()
    store(folder, keep_last=1).save(16, engines, TRAIN_STATE, CONFIG)
    assert steps(folder) == [16]
    verify_commit(Commit(folder / commit_name(16), 16))


@pytest.mark.parametrize("in_the_way", ["step-00000016.partial", "step-00000016", "."])
def test_a_folder_that_cannot_be_made(engines, tmp_path, in_the_way):
    folder = tmp_path / "checkpoints"
    path = folder / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    with pytest.raises(SaveError, match="rank 0 cannot write a checkpoint"):
        store(folder).save(16, engines, TRAIN_STATE, CONFIG)
    assert path.read_text() == "a file"
