"""Files of commits, damaged in every way: the newest whole commit is used, and no byte of another.

The commits are written in the documented layout, with random weights, so that a bit which passed
unseen would change a number that is compared.
"""

import logging
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from data_prep.errors import CorruptError
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import commit_name
from pipeline.config import CheckpointSection
from pipeline.rank_files import StateReader
from tests.commits import run_config, write_commit
from tests.faults.harness import Setup

FLIPS = 300
NETWORKS = ("generator", "discriminator")
RANK_FILES = [f"{network}/rank-0000{rank}.safetensors" for network in NETWORKS for rank in (0, 1)]


@pytest.fixture(scope="module")
def checkpoints(dataset_folder, tmp_path_factory):
    """A folder with commits 4 and 8 of different weights, and `latest`."""
    config = run_config(dataset_folder, tmp_path_factory.mktemp("run"))
    for step in (4, 8):
        write_commit(config, step)
    folder = Path(config.run.folder) / "checkpoints"
    (folder / "latest").write_text("step-00000008\n")
    return folder


@pytest.fixture(scope="module")
def weights(checkpoints):
    """Step -> network -> name -> tensor, of the undamaged commits."""
    return {step: read_weights(checkpoints / commit_name(step)) for step in (4, 8)}


def read_weights(commit):
    """Every element of every kind that a resume would read."""
    found = {}
    for network in NETWORKS:
        reader = StateReader(commit / network)
        for name in reader.names:
            count = reader.count(name)
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                found[network, kind, name] = reader.read(name, kind, 0, count)
    return found


def same(left, right):
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def newest_valid(checkpoints):
    return CheckpointStore(checkpoints, CheckpointSection(), 0, None).newest_valid()


class Aside:
    """Undoes what choosing a commit does to the folder: renames of damaged commits."""

    def __init__(self, checkpoints):
        self.checkpoints = checkpoints

    def restore(self):
        for path in self.checkpoints.glob("step-*.corrupt-*"):
            path.rename(path.with_name(path.name.partition(".")[0]))


def named_in(text, path):
    """Whether a message is about a file; a seal that does not fit is told of the manifest."""
    names = ["manifest.json"] if path.name == "manifest.sha256" else []
    return any(f"{path.parent.name}/{name}: " in text for name in [path.name, *names])


@pytest.mark.row(9, 11)
def test_no_flipped_bit_is_used(checkpoints, weights, caplog, note):
    """300 random bits, in the newest commit and in `latest`: found by name, or harmless."""
    commit = checkpoints / commit_name(8)
    names = sorted(p.relative_to(checkpoints) for p in commit.rglob("*") if p.is_file())
    names.append(Path("latest"))
    assert len(names) == 9
    rng = random.Random(9)
    found, harmless = 0, 0
    for number in range(FLIPS):
        path = checkpoints / names[number % len(names)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            chosen = newest_valid(checkpoints)
        assert chosen is not None
        if path.name == "latest":
            # Harmless by proof: the choice is the same, and nothing else reads the hint.
            harmless += chosen.step == 8 and path.read_bytes() == bad
        else:
            found += chosen.step == 4 and named_in(caplog.text, path)
        assert same(read_weights(chosen.path), weights[chosen.step])
        Aside(checkpoints).restore()
        path.write_bytes(good)
    assert (found, harmless) == (FLIPS - FLIPS // 9, FLIPS // 9)
    assert newest_valid(checkpoints).step == 8
    note(f"{found} bits of 8 kinds of files of a commit", f"{found} found and named, 0 used", row=9)
    note(f"{harmless} bits of `latest`", "the same commit chosen each time", row=11)


@pytest.fixture
def own(checkpoints, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints, tmp_path / "checkpoints"))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_one_byte(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def append(path):
    with path.open("ab") as file:
        file.write(b"\0")


def put_the_other_ranks(path):
    name = "rank-00001.safetensors" if "00000" in path.name else "rank-00000.safetensors"
    shutil.copyfile(path.with_name(name), path)


def put_the_other_networks(path):
    other = NETWORKS[path.parent.name == "generator"]
    shutil.copyfile(path.parent.parent / other / path.name, path)


def put_the_other_commits(path):
    shutil.copyfile(path.parents[2] / commit_name(4) / path.parent.name / path.name, path)


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    *(cut, cut_one_byte, empty, append, Path.unlink, replace_by_a_folder, replace_by_a_pipe),
    *(put_the_other_ranks, put_the_other_networks, put_the_other_commits),
]


@pytest.mark.row(10)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_found_and_named(own, weights, damage, caplog, note):
    swaps = damage.__name__.startswith("put_")
    others = ["train_state.json", "config.resolved.json", "manifest.json", "manifest.sha256"]
    names = RANK_FILES if swaps else [*RANK_FILES, *others]
    for name in names:
        path = own / commit_name(8) / name
        good = path.read_bytes()
        damage(path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            chosen = newest_valid(own)
        assert chosen.step == 4, name
        assert named_in(caplog.text, path), caplog.text
        assert same(read_weights(chosen.path), weights[4])
        Aside(own).restore()
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(good)
    assert newest_valid(own).step == 8
    if damage is DAMAGES[0]:
        kinds = ", ".join(damage.__name__.replace("_", " ") for damage in DAMAGES)
        note(f"each file in turn: {kinds}", "each named; the commit before used")


@pytest.mark.row(10)
def test_swapped_rank_files_are_found(own, caplog):
    left, right = (own / commit_name(8) / name for name in RANK_FILES[:2])
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(own).step == 4
    assert "generator/rank-00000.safetensors" in caplog.text


@pytest.mark.row(10)
def test_files_of_a_third_rank_are_found(own, caplog):
    """A world that was larger once: its file fits no manifest, and readers take all they find."""
    folder = own / commit_name(8) / "generator"
    shutil.copy(folder / "rank-00001.safetensors", folder / "rank-00002.safetensors")
    with caplog.at_level(logging.WARNING):
        assert newest_valid(own).step == 4
    assert "rank-00002.safetensors: not in manifest.json" in caplog.text


@pytest.mark.row(9, 10)
def test_with_no_whole_commit_all_are_named_and_kept(own):
    cut(own / commit_name(4) / RANK_FILES[0])
    (own / commit_name(8) / "manifest.sha256").unlink()
    before = sorted(own.rglob("*"))
    with pytest.raises(CorruptError, match="no checkpoint is whole") as caught:
        newest_valid(own)
    assert re.search(
        r"step-00000004/generator/rank-00000\.safetensors: \d+ bytes", str(caught.value)
    )
    assert "step-00000008/manifest" in str(caught.value)
    assert sorted(own.rglob("*")) == before


HINTS = {
    "empty": lambda path: path.write_text(""),
    "garbage": lambda path: path.write_bytes(bytes(range(256))),
    "of a step that is not there": lambda path: path.write_text("step-00000099\n"),
    "of an older step": lambda path: path.write_text("step-00000004\n"),
    "of another folder": lambda path: path.write_text("../../elsewhere/step-00000012\n"),
    "missing": Path.unlink,
    "a folder": replace_by_a_folder,
    "a pipe": replace_by_a_pipe,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
}


@pytest.mark.row(11)
def test_latest_is_only_a_hint(checkpoints, tmp_path, note):
    for number, (what, change) in enumerate(HINTS.items()):
        folder = Path(shutil.copytree(checkpoints, tmp_path / str(number)))
        change(folder / "latest")
        assert newest_valid(folder).step == 8, what
    note(f"`latest` {', '.join(HINTS)}", "the newest valid commit each time")


@pytest.mark.row(9, 10, 11)
def test_a_run_goes_on_from_the_commit_before(lab, tmp_path, note):
    """The whole way: a finished run loses its last commit to damage and trains it again."""
    setup = Setup()
    reference = lab.reference_folder(setup)
    damages = {9: flip_a_bit, 10: cut}
    for row, damage in damages.items():
        run = Path(shutil.copytree(reference, tmp_path / f"run-{row}"))
        damage(run / "checkpoints" / commit_name(12) / "discriminator" / "rank-00000.safetensors")
        (run / "checkpoints" / "latest").write_bytes(b"\xff garbage")
        outcome = lab.finish(run, setup)
        assert re.search(r"step-00000012/discriminator/rank-00000\.safetensors: ", outcome.logs)
        assert "step-00000012.corrupt-1" in outcome.commits
        note("in a finished run's last commit", "trained again bit for bit", row=row)
    note("garbage beside it", "the newest valid commit was continued", row=11)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)
