"""ONNX graphs: close to torch on real text at any size, or not there."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from data_prep.errors import UserError
from pipeline import export_onnx as module
from pipeline.commands_export import export_onnx_command
from pipeline.export import export_run
from pipeline.export_onnx import export_onnx, open_graph
from pipeline.onnx_text import read_sentences
from tests.reference.small_networks import scramble

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def graphs(random_run, tmp_path_factory):
    """An export with both graphs, and what was said of them."""
    folder = tmp_path_factory.mktemp("graphs") / "export"
    return export_run(random_run.folder, folder, onnx=("fp32", "int8"))


@pytest.fixture(scope="module")
def encoder(graphs):
    return graphs.encoder


@pytest.fixture(scope="module")
def small(encoder, tmp_path_factory):
    """A repository of one layer with a random head, by class; tracing takes seconds a layer."""

    def build(auto_class, folder=None):
        folder = folder or tmp_path_factory.mktemp("small")
        config = AutoConfig.from_pretrained(encoder, num_hidden_layers=1, num_labels=2)
        scramble(auto_class.from_config(config), 3).save_pretrained(folder)
        for name in ("spm.model", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(encoder / name, folder)
        return folder

    return build


def test_graphs_are_close_on_real_sentences(graphs):
    report = graphs.onnx
    fp32, int8 = report.figures
    assert report.sequences == 201
    assert report.tokens > 2000
    assert fp32.max_difference <= 1e-4
    assert fp32.tolerance >= 1e-4
    assert 1e-4 < int8.relative_distance < 0.1, "int8, and a rounding of fp32"
    assert int8.bytes < fp32.bytes
    json.dumps(graphs.to_dict())


@pytest.mark.parametrize(("sequences", "length"), [(1, 2), (1, 3), (3, 17), (2, 48)])
def test_any_size(encoder, sequences, length):
    torch.manual_seed(length)
    ids_BL = torch.randint(3, 500, (sequences, length))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[-1, max(2, length // 2) :] = 0
    model = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        expected = model(ids_BL, attention_mask=mask_BL).last_hidden_state
    inputs = {"input_ids": ids_BL.numpy(), "attention_mask": mask_BL.numpy()}
    (found,) = open_graph(encoder / "onnx" / "model.onnx").run(["last_hidden_state"], inputs)
    is_token = mask_BL.bool()
    torch.testing.assert_close(
        torch.from_numpy(found)[is_token], expected[is_token], rtol=0, atol=1e-5
    )


def test_no_logarithm_is_left_to_the_runtime(encoder):
    import onnx

    graph = onnx.load(encoder / "onnx" / "model.onnx").graph
    operations = {node.op_type for node in graph.node}
    assert "Log" not in operations
    assert {"Softmax", "GatherElements"} <= operations


HEADS = {
    AutoModelForSequenceClassification: ["logits"],
    AutoModelForQuestionAnswering: ["start_logits", "end_logits"],
}


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_fine_tuned_models(auto_class, small, tmp_path, capsys):
    folder = small(auto_class)
    (tmp_path / "own.txt").write_text("A sentence of mine. And here is another one! No.")
    is_class = auto_class is AutoModelForSequenceClassification
    export_onnx_command(folder, text=tmp_path / "own.txt", int8=is_class)
    assert "of 3 sequences" in capsys.readouterr().out
    files = {"model.onnx", "model_int8.onnx"} if is_class else {"model.onnx"}
    assert {path.name for path in (folder / "onnx").iterdir()} == files
    assert not list(folder.glob(".onnx-*"))
    session = open_graph(folder / "onnx" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == HEADS[auto_class]
    model = auto_class.from_pretrained(folder).eval()
    # As many tokens as classes: what is of tokens must not be told by shapes.
    ids_BL = torch.tensor([[1, 2], [1, 2]])
    mask_BL = torch.tensor([[1, 1], [1, 0]])
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
    arrays = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    with torch.no_grad():
        output = model(**inputs)
    for name, array in zip(HEADS[auto_class], arrays, strict=True):
        np.testing.assert_allclose(array[0], output[name][0].numpy(), rtol=0, atol=1e-4)
        assert module._by_torch(model, inputs)[name][0].shape[0] == len(
            array if is_class else mask_BL[mask_BL > 0]
        )


def copy_of(graph):
    """Stands in for tracing."""
    return lambda model, names, path: shutil.copy(graph, path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_function_is_not_written(encoder, monkeypatch):
    before = contents(encoder)

    load = module._load

    def changed(repository):
        model = load(repository)
        model.base_model.encoder.layer[0].output.dense.bias.data[0] += 0.1
        return model

    monkeypatch.setattr(module, "_load", changed)
    monkeypatch.setattr(module, "_write_graph", copy_of(encoder / "onnx" / "model.onnx"))
    with pytest.raises(UserError, match=r"model.onnx does not compute what torch does: .*allowed"):
        export_onnx(encoder, force=True)
    assert contents(encoder) == before


def test_graph_of_other_positions_is_not_written(small, monkeypatch):
    def no_positions(self, hidden_BLD, *rest):
        length = hidden_BLD.size(1)
        return torch.zeros(1, length, length, dtype=torch.int64)

    monkeypatch.setattr(module._Traced, "_relative_positions", no_positions)
    folder = small(AutoModel)
    with pytest.raises(UserError, match=r"model.onnx does not compute what torch does: .*allowed"):
        export_onnx(folder)
    assert not list(folder.glob("*onnx*"))


def test_int8_that_is_no_rounding(encoder, monkeypatch):
    monkeypatch.setattr(module, "INT8_TOLERANCE", 1e-6)
    monkeypatch.setattr(module, "_write_graph", copy_of(encoder / "onnx" / "model.onnx"))
    with pytest.raises(UserError, match=r"model_int8.onnx does not compute what torch does"):
        export_onnx(encoder, int8=True, force=True)


def test_mistakes(encoder, tmp_path, exported, small, monkeypatch):
    with pytest.raises(UserError, match=r"onnx exists: replace it with --force"):
        export_onnx(encoder)
    with pytest.raises(UserError, match=r"no repository of a model \(config.json with"):
        export_onnx(tmp_path)
    with pytest.raises(UserError, match=r"DebertaV2ForMaskedLM has no ONNX form here; there are"):
        export_onnx(exported.folder / "generator")
    with pytest.raises(UserError, match=r"--text .*none.txt: cannot be read as UTF-8 text"):
        read_sentences(tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UserError, match=r"short.txt: has no sentence of 4 words that ends in"):
        read_sentences(tmp_path / "short.txt")
    folder = small(AutoModelForSequenceClassification)
    (folder / "tokenizer.json").unlink()
    (folder / "spm.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing, without which no text"):
        export_onnx(folder)
    shutil.copy(encoder / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(UserError, match=r"weights are missing: \['classifier.bias', 'class"):
        export_onnx(folder)
    monkeypatch.setattr(module, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"ONNX needs no_such_package: pip install .*\[onnx\]"):
        export_run(exported.folder, tmp_path / "out", onnx=("fp32",))


def test_a_model_that_cannot_be_traced_is_told(small, monkeypatch):
    folder = small(AutoModelForSequenceClassification)
    # What the exporter meets in a model that decides by the text.
    monkeypatch.setattr(
        module._Traced, "forward", lambda _, ids, mask: (ids if ids.sum() > 3 else mask,)
    )
    with pytest.raises(UserError, match=r"no graph with torch .+ \(.+\); nothing was written"):
        export_onnx(folder)
    assert not (folder / "onnx").exists()


def test_sentences_are_real_and_evenly_spaced():
    sentences = read_sentences(None)
    assert len(sentences) == len(set(sentences)) == 200
    assert all(len(sentence.split()) >= 4 for sentence in sentences)
