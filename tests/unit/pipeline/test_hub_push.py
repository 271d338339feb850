"""Exports of several steps, and their way to a hub that speaks HTTP on this machine."""

import json
import os
import subprocess
import sys

import pytest

from data_prep.errors import CorruptError, UserError
from pipeline.commands_export import export_command
from pipeline.evaluate.load import load_pretrained
from pipeline.export import export_run
from pipeline.export_commits import find_step_commits
from pipeline.hub_push import find_uploads, push_export
from tests.commits import flip_a_byte, run_config, write_commit
from tests.local_hub import TOKEN, LocalHub
from tests.worlds import ROOT

LOAD = """
import json, sys
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], revision=sys.argv[2])
ids = AutoTokenizer.from_pretrained(sys.argv[1], revision=sys.argv[2])("the Union")["input_ids"]
print(json.dumps([model.encoder.layer[0].output.dense.bias.tolist(), ids]))
"""


@pytest.fixture(scope="module")
def run(dataset_folder, tmp_path_factory):
    """A run with commits at 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("steps") / "run"
    config = run_config(dataset_folder, folder)
    for step in (10, 20, 30):
        write_commit(config, step)
    return folder


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    """The newest weights, and those of step 10."""
    folder = tmp_path_factory.mktemp("export") / "mine"
    report = export_run(run, folder, steps=(10,), max_shard_size="20KB")
    assert report.step == 30
    assert len(report.steps[10].parities) == 6
    return folder


def test_steps_lie_beside_the_newest(export, run):
    names = {path.name for path in export.iterdir()}
    assert names == {"discriminator", "generator", "step-00000010"}
    for folder, step in ((export, 30), (export / "step-00000010", 10)):
        loaded = load_pretrained(folder)
        assert loaded.step == step
        expected = load_pretrained(run / "checkpoints" / f"step-{step:08d}")
        bias = "discriminator.deberta.encoder.layer.0.output.dense.bias"
        found = dict(loaded.pair.named_parameters())[bias]
        assert found.equal(dict(expected.pair.named_parameters())[bias])
        card = (folder / "generator" / "README.md").read_text()
        assert f"| optimizer steps | {step} |" in card


def test_which_steps(run, tmp_path, dataset_folder, caplog):
    assert [commit.step for commit in find_step_commits(run, None)] == [10, 20, 30]
    with pytest.raises(UserError, match=r"run: no checkpoint after 7, 40 steps; .* 10, 20, 30 \("):
        export_run(run, tmp_path / "out", steps=(10, 40, 7))
    with pytest.raises(UserError, match=r"--steps 1,x: give numbers, such as 1000,2000, or all"):
        export_command(run, tmp_path / "out", steps="1,x")
    config = run_config(dataset_folder, tmp_path / "damaged")
    commits = [write_commit(config, step) for step in (1, 2)]
    flip_a_byte(commits[0] / "train_state.json")
    assert [c.step for c in find_step_commits(tmp_path / "damaged", None)] == [2]
    assert "train_state.json: sha256 is" in caplog.text
    with pytest.raises(CorruptError, match=r"step-00000001.train_state.json: sha256 is"):
        find_step_commits(tmp_path / "damaged", (1, 2))
    assert not (tmp_path / "out").exists()


def test_only_exports_are_replaced(export, run, tmp_path, monkeypatch):
    (tmp_path / "mine" / "step-00000010").mkdir(parents=True)
    (tmp_path / "mine" / "step-by-step").mkdir()
    with pytest.raises(UserError, match=r"mine is not an earlier export"):
        export_run(run, tmp_path / "mine", force=True)


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


def started(hub_url, tmp_path, *argv, **variables):
    """Run Python as somebody whose hub this is; (exit code, stdout, stderr)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub_url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, with a server of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        env={**kept, **settings},
        cwd=tmp_path,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def push(hub_url, tmp_path, export, repo_id="me/base", *words, **variables):
    argv = ("-m", "pipeline.cli", "push", export, repo_id, *words)
    return started(hub_url, tmp_path, *argv, **variables)


def files_below(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_export_on_the_hub(hub, export, tmp_path):
    code, _, errors = push(hub.url, tmp_path, export)
    assert code == 0, errors
    assert set(hub.repositories) == {"me/base", "me/base-generator"}
    for name, folder in (("me/base", "discriminator"), ("me/base-generator", "generator")):
        repository = hub.repositories[name]
        assert repository["private"] is True
        for branch, place in (("main", export), ("step-00000010", export / "step-00000010")):
            files = dict(repository["branches"][branch])
            del files[".gitattributes"]
            assert files == files_below(place / folder)
    assert ("me/base", "step-00000010", "Weights after 10 steps") in hub.commits
    biases = {}
    for revision, place in (("main", export), ("step-00000010", export / "step-00000010")):
        code, output, errors = started(hub.url, tmp_path, "-c", LOAD, "me/base", revision)
        assert code == 0, errors
        biases[revision], ids = json.loads(output)
        tensors = load_pretrained(place).pair.discriminator.deberta.encoder.layer[0].output.dense
        assert biases[revision] == pytest.approx(tensors.bias.tolist())
        assert len(ids) > 3
    assert biases["main"] != biases["step-00000010"]


def test_pushing_again_replaces_weights_and_keeps_the_rest(hub, export, exported, tmp_path):
    assert push(hub.url, tmp_path, exported.folder, "me/base", "--public")[0] == 0
    files = hub.repositories["me/base"]["branches"]["main"]
    assert hub.repositories["me/base"]["private"] is False
    files["LICENSE"] = b"of the owner"
    assert "model.safetensors" in files
    code, _, errors = push(hub.url, tmp_path, export)
    assert code == 0, errors
    assert hub.repositories["me/base"]["private"] is False, "what exists stays what it is"
    assert files["LICENSE"] == b"of the owner"
    assert "model.safetensors" not in files, "its shards are there now"
    assert "model.safetensors.index.json" in files


def test_what_the_hub_refuses(hub, export, tmp_path):
    again = f"is whole: repeat with `deberta push {export} "
    free = "http://127.0.0.1:9"  # nobody listens there
    cases = [
        (hub.url, "me/base", {"HF_TOKEN": "hf_wrong"}, "refuses me/base (401, "),
        (hub.url, "strangers/base", {}, "refuses strangers/base (403, You don't have the rights"),
        (free, "me/base", {}, "the hub cannot be reached for me/base ("),
        (hub.url, "me/base", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to reach the hub"),
    ]
    for url, repo_id, variables, message in cases:
        code, output, errors = push(url, tmp_path, export, repo_id, **variables)
        assert (code, output) == (2, ""), errors
        assert message in errors
        assert "Traceback" not in errors
        assert again in errors
    assert hub.repositories == {}
    with pytest.raises(UserError, match=r"--push me/b--ase\.\.: no name of a repository \("):
        push_export(export, "me/b--ase..")
    with pytest.raises(UserError, match=r"nothing: no export; name a folder written by `deberta"):
        push_export(export / "generator" / "nothing", "me/base")


def test_a_masked_language_model_has_the_name_alone(export, tmp_path):
    (tmp_path / "mlm").mkdir()
    (tmp_path / "mlm" / "generator").symlink_to(export / "generator")
    (upload,) = find_uploads(tmp_path / "mlm", "me/mlm")
    assert (upload.repo_id, upload.branch, upload.step) == ("me/mlm", "main", 30)
