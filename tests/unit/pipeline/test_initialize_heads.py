"""Encoders whose head was not saved: refused, or continued with a fresh head on request."""

import pytest
import torch

from pipeline.initialize.pair import initialize_pair
from pipeline.modeling.pair import NetworkPair
from tests.initializing import asked, refusal
from tests.reference.released_repositories import TABLE, save

FRESH = {"initialize": {"missing_heads": "fresh"}}
RTD, MLM = "mask_predictions.", "lm_predictions."


@pytest.fixture(params=[None, "generator.bin"], ids=["alone", "with its generator"])
def headless(request, release, tmp_path):
    """A discriminator as AutoModel saves it; and whether a generator is there."""
    repository = release.write(tmp_path / "repository", generator=request.param)
    save(encoder_of(release), repository / "model.safetensors")
    return repository, request.param is not None


def encoder_of(release):
    return {k: t for k, t in release.discriminator.items() if k.startswith("deberta.")}


def initial(config):
    pair = NetworkPair(config)
    pair.init_weights(config.run.seed)
    return pair.state_dict()


def test_an_encoder_without_a_head_is_refused_with_the_cure(headless, dataset_folder, tokenizer):
    text = refusal(asked(dataset_folder, headless[0]), tokenizer)
    assert "has neither the discriminator's head mask_predictions.*" in text
    assert "initialize.missing_heads=fresh" in text


def test_on_request_the_head_is_the_seed_s(headless, release, dataset_folder, tokenizer):
    repository, has_generator = headless
    config = asked(dataset_folder, repository, **FRESH)
    found = initialize_pair(config, tokenizer)
    seeded, ours = initial(config), found.pair.state_dict()
    fresh = [name for name in ours if f".{RTD}" in f".{name}" or name.startswith(RTD)]
    assert fresh
    for name in fresh:
        assert torch.equal(ours[name], seeded[name]), name
    layer = "encoder.layer.0.output.dense.weight"
    expected = release.discriminator[f"deberta.{layer}"]
    assert torch.equal(ours[f"discriminator.deberta.{layer}"], expected)
    assert any("discriminator: all 3 layers" in n and "a fresh head" in n for n in found.notes)
    donor = release.generator if has_generator else release.discriminator
    assert torch.equal(ours[f"generator.{TABLE}"], donor[TABLE])
    head = f"generator.{MLM}lm_head.dense.weight"
    if has_generator:
        assert torch.equal(ours[head], release.generator[f"{MLM}lm_head.dense.weight"])
    else:
        assert torch.equal(ours[head], seeded[head])


def test_a_masked_language_model_from_a_bare_encoder(release, dataset_folder, tokenizer, tmp_path):
    repository = release.write(tmp_path / "repository")
    save(encoder_of(release), repository / "model.safetensors")
    config = asked(
        dataset_folder,
        repository,
        objective={"task": "mlm", "enhanced_mask_decoder": False},
        generator=release.config.discriminator.model_dump(),
        discriminator=None,
        **FRESH,
    )
    found = initialize_pair(config, tokenizer)
    ours, seeded = found.pair.state_dict(), initial(config)
    assert torch.equal(ours[f"generator.{TABLE}"], release.discriminator[TABLE])
    head = f"generator.{MLM}lm_head.dense.weight"
    assert torch.equal(ours[head], seeded[head])


def test_a_head_with_a_hole_is_no_missing_head(release, dataset_folder, tokenizer, tmp_path):
    """`fresh` is about heads that nobody saved, not about files that lack some of their tensors."""
    repository = release.write(tmp_path / "repository", generator="generator.bin")
    weights = {k: t for k, t in release.discriminator.items() if k != f"{RTD}dense.bias"}
    save(weights, repository / "model.safetensors")
    text = refusal(asked(dataset_folder, repository, **FRESH), tokenizer)
    assert "lacks 1 of the discriminator: mask_predictions.dense.bias" in text
