"""Exports whose weights are divided into several files: the same tensors, whoever reads them."""

import json

import pytest
import torch
from transformers import AutoModel

from data_prep.errors import CorruptError, UserError
from pipeline.evaluate.load import load_pretrained
from pipeline.export import export_run
from pipeline.export_weights import read_tensors

LIMIT_BYTES = 20_000


@pytest.fixture(scope="module")
def sharded(random_run, tmp_path_factory):
    """An export in files of 20 kB, its halves in bf16."""
    folder = tmp_path_factory.mktemp("sharded") / "export"
    report = export_run(random_run.folder, folder, dtype="bf16", max_shard_size="20KB")
    assert len(report.verification.parities) == 6, "the clean process read the shards"
    return folder


def test_no_file_is_larger_than_asked(sharded):
    for repository in sharded.iterdir():
        index = json.loads((repository / "model.safetensors.index.json").read_text())
        files = {path.name: path for path in repository.glob("*.safetensors")}
        assert set(index["weight_map"].values()) == set(files)
        assert len(files) > 1
        tensors = read_tensors(repository)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert tensors.keys() == index["weight_map"].keys()
        for name, path in files.items():
            held = [key for key, file in index["weight_map"].items() if file == name]
            assert sum(tensors[key].nbytes for key in held) <= LIMIT_BYTES or len(held) == 1
            assert path.stat().st_mode == (repository / "config.json").stat().st_mode


def test_tensors_are_those_of_one_file(sharded, exported):
    for name in ("discriminator", "generator"):
        whole, found = read_tensors(exported.folder / name), read_tensors(sharded / name)
        assert whole.keys() == found.keys()
        for key, tensor in whole.items():
            assert torch.equal(tensor.bfloat16(), found[key]), key


def test_everybody_reads_them(sharded, random_run):
    _, loading = AutoModel.from_pretrained(sharded / "discriminator", output_loading_info=True)
    assert loading["missing_keys"] == set()
    networks = load_pretrained(sharded)
    assert networks.step == random_run.step
    bias = networks.pair.generator.lm_predictions.lm_head.bias
    expected = random_run.pair.generator.lm_predictions.lm_head.bias
    assert torch.equal(bias, expected.bfloat16().float())


def test_a_lost_shard(sharded, tmp_path):
    for path in (sharded / "generator").iterdir():
        if path.name != "model-00001-of-00002.safetensors":
            (tmp_path / path.name).symlink_to(path)
    lost = sorted((sharded / "generator").glob("*.safetensors"))[0].name
    (tmp_path / lost).unlink(missing_ok=True)
    with pytest.raises((UserError, CorruptError), match=rf"{lost}: no such file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("size", ["5", "0GB", "0.0MB", "many", "-1GB", "5GiB"])
def test_what_is_no_size(size, random_run, tmp_path):
    with pytest.raises(UserError, match=rf"--max-shard-size {size}: give a number above 0"):
        export_run(random_run.folder, tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())
