"""The class of the discriminator's head: the trainer's scores, or no model at all."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pipeline import modeling_rtd
from pipeline.modeling_rtd import DebertaV2ForReplacedTokenDetection
from tests.commits import padded_ids

TEXT = "The state of the Union is the state of the war."


@pytest.fixture(scope="module")
def model(exported):
    return DebertaV2ForReplacedTokenDetection.from_pretrained(exported.folder / "discriminator")


def trained_loss(random_run, ids_BL, mask_BL, labels_BL):
    generator, discriminator = random_run.pair.generator, random_run.pair.discriminator
    rows = generator.token_embeddings(ids_BL)
    with torch.no_grad():
        return discriminator(ids_BL, rows, mask_BL, labels_BL, None)


def test_scores_and_loss_are_the_trainers(model, random_run):
    ids_BL, mask_BL = padded_ids(random_run.config.model.vocab_size)
    labels_BL = (ids_BL % 3 == 0).long()
    expected = trained_loss(random_run, ids_BL, mask_BL, labels_BL)
    with torch.no_grad():
        found = model(ids_BL, attention_mask=mask_BL.long(), labels=labels_BL)
    torch.testing.assert_close(
        found.logits[mask_BL], expected.logits_BL[mask_BL], rtol=0, atol=1e-5
    )
    assert expected.logits_BL[mask_BL].std() > 0.1, "scores that could be mixed up"
    torch.testing.assert_close(found.loss, expected.loss_sum / mask_BL.sum(), rtol=1e-5, atol=0)
    with torch.no_grad():
        unpadded = model(ids_BL, labels=labels_BL)
        everywhere = F.binary_cross_entropy_with_logits(unpadded.logits, labels_BL.float())
    torch.testing.assert_close(unpadded.loss, everywhere)


def test_scores_of_a_text(model, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported.folder / "discriminator")
    model.train()
    scores = model.score_text(tokenizer, TEXT)
    assert model.training, "as it was before"
    assert model.score_text(tokenizer, TEXT) == scores, "without dropout"
    model.eval()
    ids = tokenizer(TEXT)["input_ids"]
    assert [token for token, _ in scores] == tokenizer.convert_ids_to_tokens(ids)[1:-1]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, 1:-1].sigmoid()
    assert [probability for _, probability in scores] == pytest.approx(expected.tolist())
    assert len(model.score_text(tokenizer, "word " * 500)) == 46, "48 with [CLS] and [SEP]"


def changed_repository(exported, tmp_path, change):
    """A copy whose tensors are changed."""
    folder = tmp_path / "changed"
    shutil.copytree(exported.folder / "discriminator", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lose(tensors):
    del tensors["mask_predictions.dense.bias"]


def widen(tensors):
    tensors["mask_predictions.classifier.weight"] = torch.zeros(2, 24)


@pytest.mark.parametrize(("change", "name"), [(lose, "dense.bias"), (widen, "classifier.weight")])
def test_a_head_in_part_is_refused(change, name, exported, tmp_path):
    folder = changed_repository(exported, tmp_path, change)
    options = {"ignore_mismatched_sizes": True}
    with pytest.raises(ValueError, match=rf"no.* hold a trained discriminator: .*{name}"):
        DebertaV2ForReplacedTokenDetection.from_pretrained(folder, **options)


def test_loading_can_be_looked_at(exported):
    _, info = DebertaV2ForReplacedTokenDetection.from_pretrained(
        exported.folder / "discriminator", output_loading_info=True
    )
    assert info["missing_keys"] == set()
    assert info["unexpected_keys"] == set()


def test_the_repository_holds_this_file_and_nobody_else_needs_it(exported):
    repository = exported.folder / "discriminator"
    ours = Path(modeling_rtd.__file__)
    assert (repository / "modeling_rtd.py").read_bytes() == ours.read_bytes()
    tree = ast.parse(ours.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} == {"typing", "torch", "transformers"}
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        for trust in (False, True):
            found = auto_class.from_pretrained(repository, trust_remote_code=trust)
            assert type(found).__module__.startswith("transformers.models.deberta_v2")
