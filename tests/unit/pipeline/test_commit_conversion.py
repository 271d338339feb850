"""A commit in other forms holds the same numbers, and appears whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import CorruptError, UserError
from pipeline import commit_conversion
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit, verify_commit
from pipeline.commit_conversion import consolidate, rewrite, summarize
from pipeline.config import CheckpointSection
from pipeline.rank_files import KINDS, StateReader, write_tensors
from tests.commits import contents, plain_engine, relist, take_step

NETWORKS = ("discriminator", "generator")
FACTORS = {"weight": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}


@pytest.fixture
def commit(random_run):
    return Commit(random_run.commit, random_run.step)


def whole(commit, network):
    """Every element that a commit holds of a network."""
    reader = StateReader(commit.path / network)
    return {
        f"{kind}/{name}": reader.read(name, kind, 0, reader.count(name))
        for name in reader.names
        for kind in KINDS
    }


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_another_number_of_ranks_holds_the_same(commit, tmp_path, world_size):
    marks = []
    ours = rewrite(commit, tmp_path / "deep" / "step-00000040", world_size, lambda: marks.append(1))
    verify_commit(ours)
    assert marks
    for network in NETWORKS:
        assert len(list((ours.path / network).iterdir())) == world_size
        assert equal(whole(ours, network), whole(commit, network))
    for name in ("train_state.json", "config.resolved.json"):
        assert (ours.path / name).read_bytes() == (commit.path / name).read_bytes()
    manifest = ours.read_json("manifest.json")
    assert (manifest["step"], manifest["world_size"]) == (40, world_size)
    assert [path.name for path in ours.path.parent.iterdir()] == ["step-00000040"]
    back = rewrite(ours, tmp_path / "back", 2)
    again = rewrite(commit, tmp_path / "again", 2)
    assert contents(back.path) == contents(again.path)


def test_ranks_own_nearly_the_same(commit, tmp_path):
    ours = rewrite(commit, tmp_path / "four", 4)
    sizes = [path.stat().st_size for path in (ours.path / "generator").iterdir()]
    assert max(sizes) < 1.1 * min(sizes)


def test_a_store_goes_on_from_what_was_rewritten(tmp_path):
    engine = plain_engine()
    take_step(engine)
    store = CheckpointStore(tmp_path / "run", CheckpointSection(), 0, None)
    commit = store.save(4, {"joint": engine}, {"step": 4}, "{}\n")
    shutil.move(rewrite(commit, tmp_path / "new", 3).path, tmp_path / "other" / "step-00000004")
    found = CheckpointStore(tmp_path / "other", CheckpointSection(), 0, None).newest_valid()
    shapes = {name: p.shape for name, p in engine.module.named_parameters()}
    for name, weight in StateReader(found.path / "joint").weights(shapes).items():
        assert torch.equal(weight, engine.module.get_parameter(name))


def test_consolidated_tensors_are_whole(random_run, commit, tmp_path):
    sizes = consolidate(commit, tmp_path / "out")
    assert set(sizes) == {"checkpoint.json", *(f"{name}.safetensors" for name in NETWORKS)}
    for network, module in random_run.pair.trained_modules().items():
        tensors = load_file(tmp_path / "out" / f"{network}.safetensors")
        expected = {
            f"{kind}/{name}": parameter.detach() * factor
            for name, parameter in module.named_parameters()
            for kind, factor in FACTORS.items()
        }
        assert equal(tensors, expected)
    summary = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert summary == {**summarize(commit), "kinds": list(KINDS)}


def test_a_summary(random_run, commit):
    summary = summarize(commit)
    assert (summary["step"], summary["tokens"], summary["world_size"]) == (40, 12_800, 2)
    modules = random_run.pair.trained_modules()
    assert summary["parameters"] == {
        name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
    }
    assert summary["adam_step"] == {"generator": 37, "discriminator": 37}
    assert summary["skipped_steps"] == {"generator": 3, "discriminator": 3}
    # Ten steps of warm-up to 1e-3, then linearly to 0 at step 100; this is of the 40th step.
    assert summary["learning_rate"]["generator"] == pytest.approx(1e-3 * (100 - 39) / 90)
    seal = (commit.path / "manifest.sha256").read_text().strip()
    assert summary["manifest_sha256"] == seal
    assert json.loads(json.dumps(summary)) == summary


def test_a_commit_that_lacks_what_a_summary_says(commit, tmp_path):
    copy = shutil.copytree(commit.path, tmp_path / "copy")
    for content, text in [("{}", "lacks 'state'"), ("[]", "lacks"), ("[" * 9000, "unreadable")]:
        (copy / "train_state.json").write_text(content)
        relist(copy, "train_state.json")
        with pytest.raises(CorruptError, match=rf"train_state\.json: {text}"):
            summarize(Commit(copy, 40))


def test_memory_is_bounded_by_a_parameter(tmp_path):
    """Twenty parameters of 4 MB each in three files: never more than a few of them."""
    count, num_parameters = 1 << 20, 20
    folder = tmp_path / "step-00000004"
    (folder / "joint").mkdir(parents=True)
    for name in ("train_state.json", "config.resolved.json"):
        (folder / name).write_text("{}")
    shapes = {f"{kind}/p{i:02d}": (count,) for i in range(num_parameters) for kind in KINDS}
    starts = json.dumps({f"p{i:02d}": 0 for i in range(num_parameters)})
    name = "joint/rank-00000.safetensors"
    write_tensors(folder / name, {"starts": starts}, shapes, lambda _: torch.ones(count))
    (folder / "manifest.json").write_text(
        json.dumps({"format_version": 1, "step": 4, "world_size": 1, "files": {}})
    )
    relist(folder, name, "train_state.json", "config.resolved.json")
    high = Peak()
    rewrite(Commit(folder, 4), tmp_path / "out", 3, high.look)
    verify_commit(Commit(tmp_path / "out", 4))
    assert high.megabytes < 60  # of 252 that are written; what is mapped from files is not counted


class Peak:
    """The most anonymous memory that this process had above what it had at first."""

    def __init__(self):
        self._start, self.megabytes = self._now(), 0.0

    def _now(self):
        status = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in status if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1000

    def look(self):
        self.megabytes = max(self.megabytes, self._now() - self._start)


@pytest.mark.parametrize("convert", [lambda c, o: rewrite(c, o, 2), consolidate])
def test_nothing_is_overwritten_and_nothing_half_done_stays(commit, tmp_path, convert, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists; name a folder that does not"):
        convert(commit, tmp_path / "there")
    (tmp_path / "new.partial" / "old").mkdir(parents=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commit_conversion, "fsync_file", full)
        with pytest.raises(UserError, match=r"new cannot be written: .*No space left on device"):
            convert(commit, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(commit_conversion, "free_bytes", lambda _: 5)
        with pytest.raises(UserError, match=r"new needs [\d,]+ bytes and 5 bytes are free there"):
            convert(commit, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    convert(commit, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "new"}


def test_a_commit_is_named_by_its_step(commit, tmp_path):
    with pytest.raises(UserError, match="a commit of step 40 is named step-00000040"):
        rewrite(commit, tmp_path / "step-00000041", 1)


@pytest.mark.parametrize("convert", [lambda c, o: rewrite(c, o, 2), consolidate])
def test_elements_that_are_missing_are_named(commit, tmp_path, convert):
    """Rank 0's file for both ranks, well sealed: the first elements twice, the others never."""
    copy = shutil.copytree(commit.path, tmp_path / "copy")
    files = [copy / "generator" / f"rank-0000{rank}.safetensors" for rank in range(2)]
    shutil.copyfile(files[0], files[1])
    relist(copy, "generator/rank-00001.safetensors")
    with pytest.raises(CorruptError, match=r"not there exactly once|has \d+ elements, the model's"):
        convert(Commit(copy, 40), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_another_model_s_parameters_are_not_consolidated(commit, tmp_path):
    copy = shutil.copytree(commit.path, tmp_path / "copy")
    for rank in range(2):
        name = f"generator/rank-0000{rank}.safetensors"
        shutil.copyfile(copy / name.replace("generator", "discriminator"), copy / name)
        relist(copy, name)
    with pytest.raises(CorruptError, match="generator: parameters differ from the model's"):
        consolidate(Commit(copy, 40), tmp_path / "out")
