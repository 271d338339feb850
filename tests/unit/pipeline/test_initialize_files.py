"""Weights of other programs: what is read, what is refused, and that nothing is executed."""

import json
import os

import pytest
import torch

from data_prep.errors import CorruptError, UserError
from pipeline.initialize.released_layout import our_names
from pipeline.initialize.weight_files import read_weights
from tests.reference.released_repositories import save

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2), "c": torch.zeros(1)}
NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
WORDS = "embeddings.word_embeddings.weight"


class Program:
    """What an attacker would put into a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_gives_the_same_tensors(name, dtype, tmp_path):
    written = {key: tensor.to(dtype) for key, tensor in WEIGHTS.items()}
    save(written, tmp_path / name)
    found = read_weights(tmp_path / name)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in written.items())
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_a_bin_that_would_run_a_program_is_refused_by_name(tmp_path):
    torch.save({"a": Program(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged, or holds Python objects"):
        read_weights(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "harm").exists()
    # The file is no dud: a loader that trusts it runs the program.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "must map names to tensors and holds something else (list)"),
        ({"model": {"a": torch.ones(1)}}, "something else (model)"),
        ({"a": torch.ones(1), "step": 3}, "something else (step)"),
    ],
)
def test_a_bin_that_is_no_state_dict(content, says, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "x.bin")
    assert says in str(error.value)
    assert "state_dict()" in str(error.value)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_was_cut(name, share, tmp_path):
    save(WEIGHTS, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CorruptError, match=rf"{name}: not a whole "):
        read_weights(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"x\.bin: no such file"):
        read_weights(tmp_path / "x.bin")


def test_a_shard_that_is_not_there(tmp_path):
    save(WEIGHTS, tmp_path / NAMES[2])
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors: no such file"):
        read_weights(tmp_path / NAMES[2])


def test_an_index_that_promises_more_than_its_shards_hold(tmp_path):
    save(WEIGHTS, tmp_path / NAMES[2])
    index = json.loads((tmp_path / NAMES[2]).read_text())
    index["weight_map"]["d"] = index["weight_map"]["a.weight"]
    (tmp_path / NAMES[2]).write_text(json.dumps(index))
    with pytest.raises(CorruptError, match="its shards lack d"):
        read_weights(tmp_path / NAMES[2])


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "other.index.json"])
def test_an_index_reaches_no_other_folder(name, tmp_path):
    (tmp_path / NAMES[2]).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="which is no file beside it"):
        read_weights(tmp_path / NAMES[2])


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map(content, tmp_path):
    (tmp_path / NAMES[2]).write_text(json.dumps(content))
    with pytest.raises(UserError, match="weight_map, from tensor to file, is missing"):
        read_weights(tmp_path / NAMES[2])


def test_names_of_all_layouts_become_ours(tmp_path):
    one = torch.ones(1)
    found = our_names(
        {
            f"bert.{WORDS}": one,
            "encoder.layer.0.output.dense.bias": one,
            "deberta.embeddings.position_ids": one,
            "cls.predictions.transform.LayerNorm.weight": one,
            "cls.predictions.decoder.weight": one,
            "cls.predictions.decoder.bias": one,
            "mask_predictions.dense.bias": one,
        },
        tmp_path,
    )
    assert sorted(found) == [
        f"deberta.{WORDS}",
        "deberta.encoder.layer.0.output.dense.bias",
        "lm_predictions.lm_head.LayerNorm.weight",
        "lm_predictions.lm_head.bias",
        "mask_predictions.dense.bias",
    ]


def test_a_bias_of_its_own_stands_before_the_tied_one(tmp_path):
    found = our_names(
        {"cls.predictions.decoder.bias": torch.ones(1), "cls.predictions.bias": torch.zeros(1)},
        tmp_path,
    )
    assert found == {"lm_predictions.lm_head.bias": torch.zeros(1)}


def test_one_tensor_under_two_names_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"holds deberta\.{WORDS} twice, once as bert\.{WORDS}"):
        our_names({f"deberta.{WORDS}": torch.ones(1), f"bert.{WORDS}": torch.ones(1)}, tmp_path)


def test_an_output_table_of_its_own_is_refused(tmp_path):
    weights = {f"deberta.{WORDS}": torch.ones(2), "cls.predictions.decoder.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"decoder\.weight differs from the word embeddings"):
        our_names(weights, tmp_path)
