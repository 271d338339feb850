"""A continued model is the model: states, losses and weights at step 0, judged by transformers."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from pipeline.hf_layout import repository_tensors
from pipeline.initialize.pair import initialize_pair
from pipeline.modeling.pair import shared_rows
from tests.commits import NETWORK, padded_ids
from tests.reference.released_repositories import (
    DELTA,
    POSITIONS,
    TABLE,
    Release,
    encoder,
    masked_lm,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
FP16 = {"dtype": torch.float16}
LAYOUTS = {
    "safetensors": {"generator": "generator.safetensors"},
    "bin": {"main": "pytorch_model.bin", "generator": "generator.bin"},
    "bert prefix": {
        "main": "pytorch_model.bin",
        "prefix": "bert.",
        "generator": "generator/pytorch_model.bin",
    },
    "no prefix": {"prefix": "", "generator": "generator/model.safetensors"},
    "shards": {
        "main": "model.safetensors.index.json",
        "generator": "generator/pytorch_model.bin.index.json",
    },
    "with Delta": {
        "main": "pytorch_model.bin",
        "with_delta": True,
        "generator": "pytorch_model.generator.bin",
    },
    "fp16": {"main": "pytorch_model.bin", "generator": "generator.bin", **FP16},
    "fp16 with Delta": {
        "main": "pytorch_model.bin",
        "with_delta": True,
        "generator": "generator.bin",
        **FP16,
    },
    "generator elsewhere": {"generator": "elsewhere/weights.bin"},
}


def continued(config, path, generator_path="", **sections):
    """The run's configuration with [initialize], and other sections changed."""
    values = config.model_dump()
    values["initialize"]["path"] = str(path)
    values["initialize"]["generator_path"] = str(generator_path)
    for name, section in sections.items():
        if section is None:
            values[name] = None
        else:
            values[name] = {**(values[name] or {}), **section}
    return type(config).model_validate(values)


def states(pair, name, ids, mask):
    """Hidden states of one of our networks."""
    with torch.no_grad():
        if name == "generator":
            return pair.generator.encode(ids, mask)
        base = shared_rows(pair.generator, pair.discriminator, ids)
        return pair.discriminator.encode(ids, base, mask)


def assert_close(ours, theirs, mask, dtype):
    assert theirs[mask].std() > 0.1
    assert (ours - theirs)[mask].abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_networks_are_those_of_the_repository(layout, dtype, config, tokenizer, tmp_path):
    options = dict(LAYOUTS[layout])
    release = Release(config, options.pop("dtype", torch.float32))
    path = release.write(tmp_path / "repository", **options)
    elsewhere = path / "elsewhere" / "weights.bin"
    asked = continued(config, path, elsewhere if elsewhere.exists() else "")

    initialized = initialize_pair(asked, tokenizer, dtype)

    from_delta = options.get("with_delta", False)
    truth = {
        "generator": release.generator,
        "discriminator": {
            **release.discriminator,
            TABLE: release.table(dtype, from_delta=from_delta),
        },
    }
    ids, mask = padded_ids(config.model.vocab_size)
    for name, network in config.networks.items():
        reference = encoder(network, config.model.vocab_size, truth[name], dtype)
        with torch.no_grad():
            theirs = reference(ids, attention_mask=mask.long()).last_hidden_state
        assert_close(states(initialized.pair, name, ids, mask), theirs, mask, dtype)
    heads = {k: t for k, t in release.discriminator.items() if k.startswith("mask_predictions.")}
    ours = dict(initialized.pair.discriminator.named_parameters())
    assert len(heads) == 6
    assert all(torch.equal(ours[key], tensor.to(dtype)) for key, tensor in heads.items())
    left_out = [note for note in initialized.notes if "have no place" in note]
    assert "mask_predictions.dense.bias" in left_out[0], "in the generator's file"
    assert "lm_predictions.lm_head.bias" in left_out[1], "in the discriminator's file"


def test_transformers_reads_the_same_repository(config, tokenizer, tmp_path):
    path = Release(config).write(tmp_path / "repository", generator="generator.bin")
    pair = initialize_pair(continued(config, path), tokenizer).pair
    theirs = AutoModel.from_pretrained(path).eval()
    ids, mask = padded_ids(config.model.vocab_size)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).last_hidden_state
    assert_close(states(pair, "discriminator", ids, mask), expected, mask, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exporting_without_training_gives_the_input_back(layout, config, tokenizer, tmp_path):
    options = dict(LAYOUTS[layout])
    release = Release(config, options.pop("dtype", torch.float32))
    path = release.write(tmp_path / "repository", **options)
    elsewhere = path / "elsewhere" / "weights.bin"
    asked = continued(config, path, elsewhere if elsewhere.exists() else "")
    exported = repository_tensors(initialize_pair(asked, tokenizer).pair, asked, "fp32")
    assert exported["generator"].keys() == release.generator.keys()
    for key, tensor in release.generator.items():
        assert torch.equal(exported["generator"][key], tensor), key
    merged = exported["discriminator"].pop(TABLE)
    expected = release.table(torch.float32, from_delta=options.get("with_delta", False))
    assert (merged - expected).abs().max() < 1e-8
    assert (expected - release.generator[TABLE]).abs().max() > 0.02
    assert exported["discriminator"].keys() == release.discriminator.keys() - {TABLE}
    for key, tensor in exported["discriminator"].items():
        assert torch.equal(tensor, release.discriminator[key]), key


@pytest.mark.parametrize("stale", [1e-4, 0.1])
def test_delta_counts_unless_the_generator_is_another_one(stale, config, tokenizer, tmp_path):
    release = Release(config)
    path = release.write(
        tmp_path / "repository",
        with_delta=True,
        main="model.safetensors",
        generator="generator.bin",
    )
    if stale == 0.1:
        release.generator[TABLE] = release.generator[TABLE].flip(0)
        release.write(path, with_delta=True, main="model.safetensors", generator="generator.bin")
    initialized = initialize_pair(continued(config, path), tokenizer)
    own = initialized.pair.discriminator.deberta.embeddings.word_embeddings._weight
    merged = initialized.pair.generator.deberta.embeddings.word_embeddings.weight + own
    text = "\n".join(initialized.notes)
    if stale == 0.1:
        assert "not the one that it was trained with" in text
        assert (merged - release.discriminator[TABLE]).abs().max() < 2e-4
    else:
        assert "Delta counts" in text
        assert torch.equal(own, release.delta)


def test_the_discriminator_alone(config, tokenizer, tmp_path):
    release = Release(config)
    release.discriminator[POSITIONS] = release.generator[POSITIONS].clone()
    path = release.write(tmp_path / "repository")
    initialized = initialize_pair(continued(config, path), tokenizer)
    network, vocab_size = config.discriminator, config.model.vocab_size
    weights = {k: t for k, t in release.discriminator.items() if k != POSITIONS}
    reference = encoder(network, vocab_size, weights, torch.float32)
    ids, mask = padded_ids(vocab_size)
    with torch.no_grad():
        hidden = reference(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    depth = config.generator.num_hidden_layers
    assert depth < network.num_hidden_layers
    pair = initialized.pair
    assert_close(states(pair, "discriminator", ids, mask), hidden[-1], mask, torch.float32)
    assert_close(states(pair, "generator", ids, mask), hidden[depth], mask, torch.float32)
    tables = pair.generator.deberta.embeddings
    assert torch.equal(tables.word_embeddings.weight, release.discriminator[TABLE])
    assert torch.equal(tables.position_embeddings.weight, release.discriminator[POSITIONS])
    assert not pair.discriminator.deberta.embeddings.word_embeddings._weight.any()
    bias = pair.generator.lm_predictions.lm_head.bias
    assert not bias.any(), "the head of a released discriminator's file is nobody's"
    text = "\n".join(initialized.notes)
    assert "rebuilt from the discriminator alone" in text
    assert "the first 2 of 3 layers, and a fresh head" in text


def test_a_small_delta_is_not_added_to_a_rebuilt_generator(config, tokenizer, tmp_path):
    release = Release(config)
    release.delta *= 1e-2
    path = release.write(tmp_path / "repository", with_delta=True)
    pair = initialize_pair(continued(config, path), tokenizer).pair
    assert not pair.discriminator.deberta.embeddings.word_embeddings._weight.any()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_masked_language_model_of_transformers(legacy, config, tokenizer, tmp_path):
    network, vocab_size = config.generator, config.model.vocab_size
    model = masked_lm(network, vocab_size, legacy)
    model.save_pretrained(tmp_path / "mlm")
    objective = {"task": "mlm", "enhanced_mask_decoder": False}
    rates = {"discriminator_learning_rate": None}
    asked = continued(
        config, tmp_path / "mlm", objective=objective, discriminator=None, optimizer=rates
    )
    generator = initialize_pair(asked, tokenizer, torch.float64).pair.generator
    ids, mask = padded_ids(vocab_size)
    positions = torch.tensor([[1, 7, 20], [2, 3, 9], [1, 0, 0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [True, False, False]])
    targets = ids.gather(1, positions)
    with torch.no_grad():
        logits = model.double()(ids, attention_mask=mask.long()).logits
        output = generator(ids, mask, positions, valid, targets, None, None)
    rows = logits.gather(1, positions[:, :, None].expand(-1, -1, vocab_size))
    expected = F.cross_entropy(rows[valid], targets[valid], reduction="sum")
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_masked_language_model_becomes_both_networks(config, tokenizer, tmp_path):
    network, vocab_size = config.discriminator, config.model.vocab_size
    model = masked_lm(network, vocab_size, legacy=True)
    model.save_pretrained(tmp_path / "mlm")
    initialized = initialize_pair(continued(config, tmp_path / "mlm"), tokenizer)
    ids, mask = padded_ids(vocab_size)
    with torch.no_grad():
        hidden = model.deberta(ids, attention_mask=mask.long(), output_hidden_states=True)
    pair, depth = initialized.pair, config.generator.num_hidden_layers
    for name, layer in (("discriminator", -1), ("generator", depth)):
        assert_close(
            states(pair, name, ids, mask), hidden.hidden_states[layer], mask, torch.float32
        )
    assert torch.equal(pair.generator.lm_predictions.lm_head.bias, model.cls.predictions.bias)
    text = "\n".join(initialized.notes)
    assert "built from a masked language model" in text
    assert "enhanced_mask_decoder=false" in text


@pytest.mark.parametrize(("end", "keeps"), [(48, True), (-1, False)])
def test_a_longer_context(end, keeps, config, tokenizer, tmp_path):
    release = Release(config)
    path = release.write(tmp_path / "repository", generator="generator.bin")
    longer = {"max_position_embeddings": 100, "max_relative_positions": end}
    asked = continued(config, path, generator=longer, discriminator=longer)
    initialized = initialize_pair(asked, tokenizer)
    rows = initialized.pair.generator.deberta.embeddings.position_embeddings.weight
    old = release.generator[POSITIONS]
    assert torch.equal(rows, torch.cat([old, old, old[:4]]))
    ids, mask = padded_ids(config.model.vocab_size, length=NETWORK["max_position_embeddings"])
    reference = encoder(
        config.discriminator, config.model.vocab_size, release.discriminator, torch.float32
    )
    with torch.no_grad():
        theirs = reference(ids, attention_mask=mask.long()).last_hidden_state
    ours = states(initialized.pair, "discriminator", ids, mask)
    text = "\n".join(initialized.notes)
    assert "positions 48 to 99 repeat the rows of the first 48" in text
    assert ((ours - theirs)[mask].abs().max() < 1e-5) == keeps
    assert ("end at 48 as learned" in text) == keeps
    assert ("stretched from 48 to 100" in text) == (not keeps)


def test_other_laws_of_sharing_keep_both_functions(config, tokenizer, tmp_path):
    release = Release(config)
    path = release.write(tmp_path / "repository", generator="generator.bin")
    asked = continued(config, path, objective={"embedding_sharing": "nes"})
    pair = initialize_pair(asked, tokenizer).pair
    tables = (network.deberta.embeddings.word_embeddings.weight for network in pair.children())
    for table, truth in zip(tables, (release.generator, release.discriminator), strict=True):
        assert torch.equal(table, truth[TABLE])
    assert DELTA not in dict(pair.discriminator.named_parameters())
    ids, mask = padded_ids(config.model.vocab_size)
    reference = encoder(
        config.discriminator, config.model.vocab_size, release.discriminator, torch.float32
    )
    with torch.no_grad():
        theirs = reference(ids, attention_mask=mask.long()).last_hidden_state
    assert_close(states(pair, "discriminator", ids, mask), theirs, mask, torch.float32)
