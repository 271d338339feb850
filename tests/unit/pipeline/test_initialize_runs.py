"""Continuing our own runs, commits and exports, and masked language models."""

import shutil

import pytest
import torch

from pipeline.initialize.pair import initialize_pair
from tests.commits import NETWORK, random_pair, run_config, write_commit
from tests.initializing import asked, refusal
from tests.reference.released_repositories import DELTA, POSITIONS, TABLE, masked_lm

ES = {"embedding_sharing": "es", "update": "joint"}


def test_a_run_goes_on_bit_for_bit(random_run, dataset_folder, tokenizer):
    for path in (random_run.folder, random_run.commit):
        initialized = initialize_pair(asked(dataset_folder, path), tokenizer)
        for key, tensor in random_run.pair.state_dict().items():
            assert torch.equal(initialized.pair.state_dict()[key], tensor), key
        text = "\n".join(initialized.notes)
        assert "Delta := E_D - E_G" in text
        assert "lacks" not in text


@pytest.mark.parametrize("folder", ["", "discriminator", "generator"])
def test_an_export_goes_on(folder, random_run, exported, dataset_folder, tokenizer):
    pair = initialize_pair(asked(dataset_folder, exported.folder / folder), tokenizer).pair
    for key, tensor in random_run.pair.state_dict().items():
        found = pair.state_dict()[key]
        if key.endswith("_weight"):
            torch.testing.assert_close(found, tensor, rtol=0, atol=2e-7)
        else:
            assert torch.equal(found, tensor), key


def test_an_export_without_its_generator_is_a_discriminator(
    exported, dataset_folder, tokenizer, tmp_path
):
    shutil.copytree(exported.folder / "discriminator", tmp_path / "discriminator")
    path = tmp_path / "discriminator"
    notes = initialize_pair(asked(dataset_folder, path), tokenizer).notes
    assert any("rebuilt from the discriminator alone" in note for note in notes)


def test_a_run_has_its_own_generator(random_run, dataset_folder, tokenizer):
    run = asked(dataset_folder, random_run.folder, initialize={"generator_path": "elsewhere"})
    text = refusal(run, tokenizer)
    assert "initialize.generator_path elsewhere does not go with" in text


def test_a_run_of_another_architecture(random_run, dataset_folder, tokenizer):
    network = {**NETWORK, "num_hidden_layers": 3, "max_relative_positions": 30}
    text = refusal(asked(dataset_folder, random_run.folder, generator=network), tokenizer)
    assert "generator.num_hidden_layers is 3, " in text
    assert "set generator.max_relative_positions=48" in text


def test_another_law_of_sharing(random_run, dataset_folder, tokenizer):
    objective = {"embedding_sharing": "nes"}
    pair = initialize_pair(
        asked(dataset_folder, random_run.folder, objective=objective), tokenizer
    ).pair
    old = random_run.pair
    merged = old.generator.state_dict()[TABLE] + old.discriminator.state_dict()[DELTA]
    assert torch.equal(pair.discriminator.state_dict()[TABLE], merged)
    text = refusal(asked(dataset_folder, random_run.folder, objective=ES), tokenizer)
    assert "embedding_sharing=es has one table for both networks" in text
    assert "gdes (Delta := E_D - E_G) or nes" in text


@pytest.mark.parametrize("sharing", ["gdes", "nes", "es"])
def test_one_table_goes_on_under_every_law(sharing, dataset_folder, tokenizer, tmp_path):
    old = run_config(dataset_folder, tmp_path / "run", objective=ES)
    pair = random_pair(old, 3)
    write_commit(old, 7, pair)
    objective = {"embedding_sharing": sharing, "update": "joint"}
    new = initialize_pair(asked(dataset_folder, tmp_path / "run", objective=objective), tokenizer)
    table = pair.generator.state_dict()[TABLE]
    theirs = new.pair.discriminator.state_dict()
    assert torch.equal(new.pair.generator.state_dict()[TABLE], table)
    if sharing == "gdes":
        assert not theirs[DELTA].any()
        assert any("Delta is zero" in note for note in new.notes)
    if sharing == "nes":
        assert torch.equal(theirs[TABLE], table)


def test_absolute_positions_follow_the_law_too(dataset_folder, tokenizer, tmp_path):
    network = {**NETWORK, "position_biased_input": True, "relative_attention": False}
    sections = {
        "generator": network,
        "discriminator": {**network, "num_hidden_layers": 3},
        "objective": {"enhanced_mask_decoder": False},
    }
    old = run_config(dataset_folder, tmp_path / "run", **sections)
    pair = random_pair(old, 3)
    write_commit(old, 7, pair)
    sections["objective"] = {"enhanced_mask_decoder": False, "embedding_sharing": "nes"}
    new = initialize_pair(asked(dataset_folder, tmp_path / "run", **sections), tokenizer).pair
    delta = pair.discriminator.state_dict()[POSITIONS.replace("weight", "_weight")]
    merged = pair.generator.state_dict()[POSITIONS] + delta
    assert torch.equal(new.discriminator.state_dict()[POSITIONS], merged)


# Masked language models.


def test_the_discriminator_is_left_out_of_a_masked_language_model(
    random_run, repository, release, dataset_folder, tokenizer
):
    mlm = {
        "objective": {"task": "mlm"},
        "discriminator": None,
        "optimizer": {"generator_learning_rate": 1e-3},
    }
    ours = initialize_pair(asked(dataset_folder, random_run.folder, **mlm), tokenizer)
    assert "the discriminator is left out" in "\n".join(ours.notes)
    for key, tensor in random_run.pair.generator.state_dict().items():
        assert torch.equal(ours.pair.generator.state_dict()[key], tensor), key
    theirs = initialize_pair(asked(dataset_folder, repository, **mlm), tokenizer)
    for key, tensor in release.generator.items():
        assert torch.equal(theirs.pair.generator.state_dict()[key], tensor), key


def test_a_masked_language_model_keeps_all_its_layers(dataset_folder, tokenizer, tmp_path, config):
    masked_lm(config.discriminator, config.model.vocab_size, legacy=True).save_pretrained(tmp_path)
    mlm = {
        "objective": {"task": "mlm"},
        "discriminator": None,
        "optimizer": {"generator_learning_rate": 1e-3},
    }
    text = refusal(asked(dataset_folder, tmp_path, **mlm), tokenizer)
    assert "set generator.num_hidden_layers=3" in text
