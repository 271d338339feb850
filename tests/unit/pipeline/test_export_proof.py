"""The proof of an export: what is not the trained network, loads for nobody, or has other ids."""

import ast
import json
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline import export, export_reload, export_repositories
from pipeline.export import export_run


def test_reload_program_imports_nothing_of_ours():
    tree = ast.parse(Path(export_reload.__file__).read_text())
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    foreign = {"collections", "json", "os", "sys", "pathlib", "typing"}
    assert {name.split(".")[0] for name in names} - foreign == {
        "torch",
        "transformers",
        "safetensors",
    }


def change_a_weight(monkeypatch):
    original = export.repository_tensors

    def changed(*arguments):
        tensors = original(*arguments)
        name = "deberta.encoder.layer.0.output.dense.bias"
        # Not in place: the tensors are the networks' own.
        tensors["generator"][name] = tensors["generator"][name].clone()
        tensors["generator"][name][0] += 1e-3
        return tensors

    monkeypatch.setattr(export, "repository_tensors", changed)


def change_the_rtd_head(monkeypatch):
    original = export.repository_tensors

    def changed(*arguments):
        tensors = original(*arguments)
        bias = tensors["discriminator"]["mask_predictions.classifier.bias"]
        tensors["discriminator"]["mask_predictions.classifier.bias"] = bias + 1e-3
        return tensors

    monkeypatch.setattr(export, "repository_tensors", changed)


def forget_the_class(monkeypatch):
    monkeypatch.setattr(export_repositories, "_RTD_CLASSES", {})


def change_the_head(monkeypatch):
    original = export_repositories.repository_config
    monkeypatch.setattr(
        export_repositories,
        "repository_config",
        lambda *given: {**original(*given), "legacy": True},
    )


def change_the_tokenizer_class(monkeypatch):
    original = export_repositories.copy_tokenizer

    def changed(source, repository, max_length):
        original(source, repository, max_length)
        path = repository / "tokenizer_config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "tokenizer_class": "DebertaV2Tokenizer"}))

    monkeypatch.setattr(export_repositories, "copy_tokenizer", changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_weight, r"the exported generator is not the trained one: .* in float32"),
        (change_the_rtd_head, r"discriminator is not the trained one: replacement scores .* 0.001"),
        (forget_the_class, r"transformers cannot reload the exported repositories"),
        (change_the_head, r"does not find the generator's weights: missing \['cls\.predictions"),
        (change_the_tokenizer_class, r"tokenizer\.json gives other ids than spm\.model"),
    ],
)
def test_what_does_not_match_is_not_exported(damage, message, random_run, tmp_path, monkeypatch):
    damage(monkeypatch)
    with pytest.raises(UserError, match=message):
        export_run(random_run.folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
