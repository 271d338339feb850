"""What can be continued, what is refused and with which words, and our own runs and exports."""

import json
import shutil

import pytest
import torch

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.initialize.pair import initialize_pair
from tests.commits import NETWORK, random_pair, run_config, write_commit
from tests.reference.released_repositories import DELTA, POSITIONS, TABLE, Release, masked_lm, save

ES = {"embedding_sharing": "es", "update": "joint"}


@pytest.fixture(scope="module")
def config(dataset_folder):
    return run_config(dataset_folder, dataset_folder.parent / "no run")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def release(config):
    return Release(config)


@pytest.fixture
def repository(release, tmp_path):
    """A repository with both networks, for tests that damage it."""
    return release.write(tmp_path / "repository", generator="generator.bin")


def asked(dataset, path, **sections):
    """A run that continues `path`; sections are replaced as in `run_config`."""
    initialize = {"path": str(path), **sections.pop("initialize", {})}
    return run_config(dataset, dataset.parent / "no run", initialize=initialize, **sections)


def refusal(config, tokenizer) -> str:
    with pytest.raises(UserError) as error:
        initialize_pair(config, tokenizer)
    return str(error.value)


# Sizes.


def test_every_difference_is_named_at_once(repository, dataset_folder, tokenizer):
    wrong = {**NETWORK, "hidden_size": 36, "layer_norm_eps": 1e-7, "num_hidden_layers": 3}
    text = refusal(
        asked(
            dataset_folder,
            repository,
            generator=wrong,
            discriminator={**wrong, "num_attention_heads": 4, "conv_kernel_size": 3},
        ),
        tokenizer,
    )
    for line in (
        "generator.hidden_size is 36, ",
        "generator.embedding_size is 36, ",
        "generator.num_hidden_layers is 3, ",
        "generator.layer_norm_eps is 1e-07, ",
        "discriminator.hidden_size is 36, ",
        "discriminator.num_attention_heads is 4, ",
        "discriminator.conv_kernel_size is 3, ",
    ):
        assert text.count(line) == 1, line
    assert "generator.bin has 24: set generator.hidden_size=24" in text
    assert "discriminator.num_hidden_layers" not in text, "3 is right"


def test_a_configuration_that_its_own_weights_contradict(repository, dataset_folder, tokenizer):
    path = repository / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 2}))
    network = {**NETWORK, "num_hidden_layers": 2}
    text = refusal(asked(dataset_folder, repository, discriminator=network), tokenizer)
    assert "discriminator.num_hidden_layers is 2, " in text
    assert "model.safetensors has 3" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "electra"}, "model_type is 'electra', not deberta-v2"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"type_vocab_size": 2}, "type_vocab_size is 2"),
        ({"conv_groups": 2}, "conv_groups is 2"),
        ({"pos_att_type": ["c2p"]}, "pos_att_type is ['c2p']"),
        ({"share_att_key": False}, "share_att_key is false"),
        ({"norm_rel_ebd": "none"}, "norm_rel_ebd is not layer_norm"),
        ({"position_biased_input": True}, "discriminator.position_biased_input is False"),
        ({"position_buckets": -1}, "discriminator.position_buckets is 12"),
        ({"layer_norm_eps": 1e-12}, "set discriminator.layer_norm_eps=1e-12"),
        ({"num_attention_heads": 4}, "set discriminator.num_attention_heads=4"),
        ({"relative_attention": False}, "set discriminator.relative_attention=false"),
        ({"max_relative_positions": 30}, "set discriminator.max_relative_positions=30"),
        ({"max_position_embeddings": 64}, "shorter than the 64"),
    ],
)
def test_settings_that_weights_do_not_show(
    changes, says, release, dataset_folder, tokenizer, tmp_path
):
    path = release.write(tmp_path / "repository", generator="generator.bin", **changes)
    assert says in refusal(asked(dataset_folder, path), tokenizer)


def test_a_configuration_without_a_size(repository, dataset_folder, tokenizer):
    path = repository / "config.json"
    values = json.loads(path.read_text())
    del values["num_attention_heads"], values["hidden_size"]
    path.write_text(json.dumps(values))
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "config.json: hidden_size, num_attention_heads missing" in text


def test_a_shorter_context_is_refused(repository, dataset_folder, tokenizer):
    network = {**NETWORK, "max_position_embeddings": 44}
    run = asked(dataset_folder, repository, generator=network)
    text = refusal(run, tokenizer)
    assert "generator.max_position_embeddings is 44, shorter than the 48" in text
    assert "set generator.max_position_embeddings=48" in text


def test_buckets_that_end_elsewhere_for_no_reason(repository, dataset_folder, tokenizer):
    network = {**NETWORK, "max_position_embeddings": 96, "max_relative_positions": 64}
    text = refusal(asked(dataset_folder, repository, generator=network), tokenizer)
    assert "makes the buckets end at 64" in text
    assert "set generator.max_relative_positions=48" in text


def test_the_rule_beyond_the_buckets_is_told(repository, dataset_folder, tokenizer):
    network = {
        **NETWORK,
        "max_position_embeddings": 96,
        "max_relative_positions": 48,
        "relative_position_rule": "transformers",
    }
    notes = initialize_pair(asked(dataset_folder, repository, generator=network), tokenizer).notes
    assert any("read a row that was never trained" in note for note in notes)


def test_a_generator_without_a_configuration_is_measured(repository, dataset_folder, tokenizer):
    (repository / "generator_config.json").unlink()
    initialize_pair(asked(dataset_folder, repository), tokenizer)
    network = {**NETWORK, "num_hidden_layers": 3, "intermediate_size": 48}
    text = refusal(asked(dataset_folder, repository, generator=network), tokenizer)
    assert "generator.num_hidden_layers is 3, " in text
    assert "generator.intermediate_size is 48, " in text


def test_a_network_deeper_than_its_donor(release, dataset_folder, tokenizer, tmp_path):
    path = release.write(tmp_path / "alone")
    network = {**NETWORK, "num_hidden_layers": 4}
    text = refusal(asked(dataset_folder, path, generator=network), tokenizer)
    assert "generator.num_hidden_layers is 4, " in text
    assert "set generator.num_hidden_layers=3" in text


# Keys.


def test_missing_tensors_are_named(repository, release, dataset_folder, tokenizer):
    lost = ("mask_predictions.dense.bias", "deberta.encoder.layer.1.output.dense.weight")
    weights = {k: t for k, t in release.discriminator.items() if k not in lost}
    save(weights, repository / "model.safetensors")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "lacks 2 of the discriminator: " in text
    assert all(key in text for key in lost)


def test_a_delta_without_its_base_is_refused(release, dataset_folder, tokenizer, tmp_path):
    path = release.write(tmp_path / "alone")
    weights = {**release.discriminator, DELTA: release.delta}
    del weights[TABLE]
    save(weights, path / "model.safetensors")
    text = refusal(asked(dataset_folder, path), tokenizer)
    assert "lacks 1 of the generator: deberta.embeddings.word_embeddings.weight" in text


def test_shapes_that_no_size_explains(repository, release, dataset_folder, tokenizer):
    weights = {**release.discriminator, "mask_predictions.dense.weight": torch.zeros(5, 24)}
    save(weights, repository / "model.safetensors")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "mask_predictions.dense.weight is [5, 24], the discriminator needs [24, 24]" in text


def test_tables_of_different_lengths(repository, release, dataset_folder, tokenizer):
    release.generator[TABLE] = release.generator[TABLE][:-100]
    save(release.generator, repository / "generator.bin")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "the word tables have different numbers of rows" in text


def test_a_delta_of_another_size(repository, release, dataset_folder, tokenizer):
    weights = {**release.discriminator, DELTA: release.delta[:-1]}
    save(weights, repository / "model.safetensors")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "word_embeddings.weight is [699, 24] in the discriminator and [700, 24]" in text


def test_left_over_tensors_are_named_in_a_note(repository, dataset_folder, tokenizer):
    notes = initialize_pair(asked(dataset_folder, repository), tokenizer).notes
    (note,) = [note for note in notes if note.startswith("discriminator: 5 tensors")]
    assert "lm_predictions.lm_head.dense.weight" in note


def test_the_other_head_is_refused(repository, dataset_folder, tokenizer):
    run = asked(dataset_folder, repository, objective={"rtd_head": "electra"})
    assert "set objective.rtd_head=debertav3" in refusal(run, tokenizer)


# Files.


def test_a_path_may_be_the_file_itself(repository, release, dataset_folder, tokenizer):
    repository.joinpath("model.safetensors").rename(repository / "best.safetensors")
    run = asked(dataset_folder, repository / "best.safetensors")
    pair = initialize_pair(run, tokenizer).pair
    torch.testing.assert_close(
        pair.generator.state_dict()[TABLE] + pair.discriminator.state_dict()[DELTA],
        release.discriminator[TABLE],
    )


def test_a_path_that_is_nowhere(tmp_path, dataset_folder, tokenizer):
    text = refusal(asked(dataset_folder, tmp_path / "nowhere"), tokenizer)
    assert "nowhere is not there" in text


def test_a_folder_that_is_no_model(tmp_path, dataset_folder, tokenizer):
    text = refusal(asked(dataset_folder, tmp_path), tokenizer)
    assert "is neither a run, a commit nor an export, and no repository" in text
    assert "model.safetensors, model.safetensors.index.json, pytorch_model.bin" in text


def test_a_run_without_a_commit(tmp_path, dataset_folder, tokenizer):
    (tmp_path / "checkpoints").mkdir()
    text = refusal(asked(dataset_folder, tmp_path), tokenizer)
    assert "neither a run folder with a checkpoint nor a checkpoint" in text


def test_weights_without_a_configuration(repository, dataset_folder, tokenizer):
    (repository / "config.json").unlink()
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "config.json is missing beside model.safetensors" in text


def test_weights_of_another_architecture(repository, dataset_folder, tokenizer):
    save({"roberta.encoder.x": torch.ones(1)}, repository / "model.safetensors")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "holds no DeBERTa encoder with its word embeddings" in text
    assert "roberta.encoder.x" in text


def test_a_masked_language_model_given_as_a_discriminator(
    repository, release, dataset_folder, tokenizer
):
    save(release.generator, repository / "model.safetensors")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "but has no mask_predictions.*" in text


def test_a_discriminator_given_as_a_generator(repository, release, dataset_folder, tokenizer):
    save(release.discriminator, repository / "generator.bin")
    text = refusal(asked(dataset_folder, repository), tokenizer)
    assert "holds neither lm_predictions.* nor cls.predictions.*" in text
    assert "initialize.generator_path" in text


def test_a_generator_that_is_not_there(repository, dataset_folder, tokenizer, tmp_path):
    initialize = {"generator_path": str(tmp_path / "nowhere.bin")}
    text = refusal(asked(dataset_folder, repository, initialize=initialize), tokenizer)
    assert "nowhere.bin is not there" in text


# Our own runs, commits and exports.


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
