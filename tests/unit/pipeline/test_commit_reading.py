"""Reading a commit: every altered byte, odd name and foreign file is refused by its name."""

import os
import pickle
import random
import re
import shutil

import pytest

from data_prep.errors import CorruptError
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import (
    Commit,
    UnknownFormatError,
    commit_name,
    damage_of,
    list_commits,
    sha256_of,
    verify_commit,
)
from pipeline.config import CheckpointSection
from tests.commits import plain_engine, relist, reseal, take_step

TRAIN_STATE = {"state": {"step": 4}, "interval_sums": ["0x0.0p+0"]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one commit of two networks, read-only."""
    engines = {"generator": plain_engine(1), "discriminator": plain_engine(2)}
    for engine in engines.values():
        take_step(engine)
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    store(folder).save(4, engines, TRAIN_STATE, "{}\n")
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A folder with commits 4, 8 and 12, alike but for their step."""
    for step in (4, 8, 12):
        commit = tmp_path / "checkpoints" / commit_name(step)
        shutil.copytree(written / commit_name(4), commit)
        reseal(commit, step=step)
    return tmp_path / "checkpoints"


def store(folder):
    return CheckpointStore(folder, CheckpointSection(), 0, None)


def steps(folder):
    return [commit.step for commit in list_commits(folder)]


def test_all_damage_is_named(folder):
    commit = Commit(folder / commit_name(12), 12)
    assert damage_of(commit) == []
    (commit.path / "train_state.json").write_text("{}")
    (commit.path / "generator" / "rank-00000.safetensors").unlink()
    (commit.path / "extra").touch()
    found = damage_of(commit)
    assert [re.search(r"step-00000012/(\S+): (\w+)", text).groups() for text in found] == [
        ("extra", "not"),
        ("generator/rank-00000.safetensors", "missing"),
        ("train_state.json", "2"),
    ]


def test_json_that_cannot_be_read_is_damage(folder):
    commit = Commit(folder / commit_name(12), 12)
    for content in (b"{", b"\xff", b"[" * 100_000):
        (commit.path / "train_state.json").write_bytes(content)
        with pytest.raises(CorruptError, match=r"12/train_state\.json: unreadable"):
            commit.read_json("train_state.json")
    with pytest.raises(CorruptError, match=r"12/nothing\.json: unreadable"):
        commit.read_json("nothing.json")


def files(commit):
    return sorted(path for path in commit.rglob("*") if path.is_file())


def test_every_flipped_bit_is_found(written, tmp_path):
    """A hundred random bits of every file: a hundred refusals that name the file."""
    commit = tmp_path / commit_name(4)
    shutil.copytree(written / commit_name(4), commit)
    rng = random.Random(0)
    for path in files(commit):
        good = path.read_bytes()
        named = "manifest.json" if path.name == "manifest.sha256" else path.name
        for _ in range(100):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CorruptError, match=re.escape(named)):
                verify_commit(Commit(commit, 4))
        path.write_bytes(good)
    verify_commit(Commit(commit, 4))


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing"])
def test_every_file_of_another_size_is_found(folder, damage):
    for path in files(folder / commit_name(4)):
        good = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes({"truncated": good[:-1], "longer": good + b"x", "empty": b""}[damage])
        with pytest.raises(CorruptError, match=r"step-00000004"):
            verify_commit(Commit(folder / commit_name(4), 4))
        path.write_bytes(good)


def test_swapped_files_are_found(folder):
    left, right = (
        folder / commit_name(4) / network / "rank-00000.safetensors"
        for network in ("generator", "discriminator")
    )
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors"):
        verify_commit(Commit(folder / commit_name(4), 4))


def test_a_rank_file_that_nobody_wrote_is_found(folder):
    """A reader takes every rank file of the folder: one of another world must not slip in."""
    commit = folder / commit_name(12)
    shutil.copy(
        commit / "generator/rank-00000.safetensors", commit / "generator/rank-00001.safetensors"
    )
    with pytest.raises(CorruptError, match=r"rank-00001\.safetensors: not in manifest\.json"):
        verify_commit(Commit(commit, 12))
    assert store(folder).newest_valid().step == 8


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_cannot_name_files_outside_of_its_commit(folder, tmp_path, absolute):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    name = str(outside) if absolute else "../../outside"
    entry = {"bytes": 6, "sha256": sha256_of(outside)}
    commit = Commit(folder / commit_name(4), 4)
    reseal(commit.path, files={**commit.read_json("manifest.json")["files"], name: entry})
    with pytest.raises(CorruptError, match="outside of the commit"):
        verify_commit(commit)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("payload.pkl", r"names 'payload\.pkl', which is no file of a commit"),
        ("generator/state.pt", "names 'generator/state.pt', which is no file of a commit"),
        ("generator/rank-00001.safetensors", "names 2 rank files of generator, not those of 1 r"),
        ("other/rank-00000.safetensors", "other/rank-00000.safetensors: missing"),
        ("manifest.json", r"names 'manifest\.json', which is no file of a commit"),
        (".json", r"names '\.json', which is no file of a commit"),
        ("", "names '', which is no file of a commit"),
    ],
)
def test_a_sealed_manifest_cannot_name_other_files(folder, name, message):
    commit = Commit(folder / commit_name(12), 12)
    entry = {"bytes": 6, "sha256": "0" * 64}
    reseal(commit.path, files={**commit.read_json("manifest.json")["files"], name: entry})
    with pytest.raises(CorruptError, match=message):
        verify_commit(commit)
    assert store(folder).newest_valid().step == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 8}, r"12/manifest\.json: is of step 8, and the folder is named step-00000012"),
        ({"step": "12"}, "step: Input should be a valid integer"),
        ({"world_size": 0}, "world_size: Input should be greater than or equal to 1"),
        ({"world_size": 2}, "names 1 rank files of discriminator, not those of 2 ranks"),
        ({"files": {}}, r"does not name config\.resolved\.json"),
        ({"files": []}, "files: Input should be a valid dictionary"),
        (
            {"files": {"train_state.json": {"bytes": -1, "sha256": "0" * 64}}},
            r"train_state\.json\.b",
        ),
        (
            {"files": {"train_state.json": {"bytes": 1, "sha256": "../x"}}},
            r"train_state\.json\.sha",
        ),
        ({"files": {"train_state.json": 7}}, r"files\.train_state\.json: "),
        ({"format_version": None}, "format_version: Input should be a valid integer"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_a_sealed_manifest_cannot_say_what_cannot_be(folder, changes, message):
    commit = Commit(folder / commit_name(12), 12)
    reseal(commit.path, **changes)
    with pytest.raises(CorruptError, match=message):
        verify_commit(commit)
    assert store(folder).newest_valid().step == 8


@pytest.mark.parametrize(
    "content", ["[]", "7", "null", "{", "", "\0", '"x"', "[" * 100_000, b"\xff\xfe{}"]
)
def test_a_sealed_manifest_that_is_no_object(folder, content):
    path = folder / commit_name(12) / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (path.parent / "manifest.sha256").write_text(sha256_of(path) + "\n")
    with pytest.raises(CorruptError, match=r"12/manifest\.json: "):
        verify_commit(Commit(path.parent, 12))
    assert store(folder).newest_valid().step == 8


def test_files_that_nobody_listed_are_refused(folder):
    commit = folder / commit_name(12)
    (commit / ".nfs0001").touch()
    verify_commit(Commit(commit, 12))
    for name in ("payload.pkl", "generator/mp_rank_00_model_states.pt", "new/file"):
        path = commit / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        with pytest.raises(CorruptError, match=f"{name}: not in manifest.json; remove it"):
            verify_commit(Commit(commit, 12))
        path.unlink()
    (commit / "link").symlink_to(folder / commit_name(4) / "generator")
    with pytest.raises(CorruptError, match=r"link: not in manifest\.json"):
        verify_commit(Commit(commit, 12))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["generator/rank-00000.safetensors", "train_state.json"])
def test_a_sealed_pickle_is_refused_and_not_executed(folder, tmp_path, name):
    """Whoever can write the commit can seal it; that must not be enough to run a program."""
    executed, commit = tmp_path / "executed", folder / commit_name(12)
    (commit / name).write_bytes(pickle.dumps(Payload(executed)))
    relist(commit, name)
    with pytest.raises(CorruptError, match=re.escape(f"12/{name}: ")):
        verify_commit(Commit(commit, 12))
    assert store(folder).newest_valid().step == 8
    assert not executed.exists()


@pytest.mark.parametrize("in_its_place", ["folder", "loop", "fifo", "dangling"])
def test_what_is_no_file_is_found(folder, in_its_place):
    path = folder / commit_name(12) / "generator" / "rank-00000.safetensors"
    path.unlink()
    if in_its_place == "folder":
        path.mkdir()
    elif in_its_place == "fifo":
        os.mkfifo(path)  # a reader would wait for ever
    else:
        path.symlink_to(path.name if in_its_place == "loop" else "nothing")
    with pytest.raises(CorruptError, match=r"generator/rank-00000\.safetensors: "):
        verify_commit(Commit(folder / commit_name(12), 12))
    assert store(folder).newest_valid().step == 8


def test_a_folder_of_tensors_elsewhere_is_refused(folder, tmp_path):
    network = folder / commit_name(12) / "generator"
    network.rename(tmp_path / "elsewhere")
    network.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="12/generator"):
        verify_commit(Commit(folder / commit_name(12), 12))
    assert store(folder).newest_valid().step == 8


def test_a_link_out_of_the_commit_is_refused(folder, tmp_path):
    path = folder / commit_name(4) / "train_state.json"
    shutil.copy(path, tmp_path / "elsewhere")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match=r"train_state\.json: leads outside of the commit"):
        verify_commit(Commit(folder / commit_name(4), 4))


def test_another_format_is_refused(folder):
    reseal(folder / commit_name(12), format_version=2, something_new=True)
    with pytest.raises(UnknownFormatError, match="format_version 2, written by a newer program"):
        verify_commit(Commit(folder / commit_name(12), 12))
    with pytest.raises(UnknownFormatError, match=r"12/manifest\.json: .* update this one"):
        store(folder).newest_valid()
    assert steps(folder) == [4, 8, 12], "it is whole: it must not be set aside"
    reseal(folder / commit_name(12), format_version=0)
    with pytest.raises(UnknownFormatError, match="format_version 0, written by an unknown program"):
        store(folder).newest_valid()
