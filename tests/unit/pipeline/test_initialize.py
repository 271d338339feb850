"""What a repository must be to be continued, and with which words it is refused."""

import json

import pytest
import torch

from pipeline.initialize.pair import initialize_pair
from tests.commits import NETWORK
from tests.initializing import asked, refusal
from tests.reference.released_repositories import DELTA, TABLE, save

ES = {"embedding_sharing": "es", "update": "joint"}


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
