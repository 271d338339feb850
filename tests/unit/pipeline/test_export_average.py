"""Exports of the mean of several commits: which ones, their mean, and what the card says."""

import json

import pytest
import torch

from data_prep.errors import UserError
from pipeline.commit import Commit
from pipeline.export import export_run
from pipeline.export_weights import read_tensors
from pipeline.hf_layout import pair_from_tensors
from pipeline.weights import load_commit_pair
from tests.commits import flip_a_byte, run_config, write_commit


def test_the_mean_of_the_newest_commits(dataset_folder, tmp_path, caplog):
    config = run_config(dataset_folder, tmp_path / "run")
    commits = [write_commit(config, step) for step in (10, 20, 30, 40)]
    flip_a_byte(next(commits[2].rglob("*.safetensors")))
    export_run(tmp_path / "run", tmp_path / "out", average=2)
    assert "step-00000030" in caplog.text  # passed over
    pairs = [load_commit_pair(Commit(commits[i], 0), config) for i in (1, 3)]
    tensors = {name: read_tensors(tmp_path / "out" / name) for name in config.networks}
    found = dict(pair_from_tensors(config, tensors).named_parameters())
    for name, parameter in pairs[0].named_parameters():
        both = torch.stack([parameter, dict(pairs[1].named_parameters())[name]]).double()
        torch.testing.assert_close(found[name].double(), both.mean(0), rtol=1e-6, atol=1e-6)
    card = (tmp_path / "out" / "discriminator" / "README.md").read_text()
    assert "| optimizer steps | 40; the weights are the mean of those after 20, 40 steps |" in card
    values = json.loads((tmp_path / "out/generator/pretraining_config.json").read_text())
    assert values["export"]["averaged_steps"] == [40, 20]
    with pytest.raises(UserError, match=r"has 3 whole checkpoints, and 5 are to be averaged"):
        export_run(tmp_path / "run", tmp_path / "none", average=5)
    assert not (tmp_path / "none").exists()
