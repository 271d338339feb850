"""Exports: what is in the repositories, that they are the commit, and that they are all or none."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data_prep.errors import CorruptError, UserError
from data_prep.tokenizer import Tokenizer
from pipeline import export, export_repositories
from pipeline.commands_export import export_command
from pipeline.export import export_run, find_commit
from pipeline.export_weights import read_tensors
from pipeline.hf_layout import pair_from_tensors
from tests.commits import flip_a_byte, padded_ids, run_config, write_commit

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "pretraining_config.json",
    "special_tokens_map.json",
    "spm.model",
    "tokenizer.json",
    "tokenizer_config.json",
}


def merged_table(random_run):
    generator, discriminator = random_run.pair.generator, random_run.pair.discriminator
    base = generator.deberta.embeddings.word_embeddings.weight
    return (base + discriminator.deberta.embeddings.word_embeddings._weight).detach()


def test_files(exported):
    assert {p.name for p in exported.folder.iterdir()} == {"discriminator", "generator"}
    for name in ("discriminator", "generator"):
        extra = {"modeling_rtd.py"} if name == "discriminator" else set()
        assert {p.name for p in (exported.folder / name).iterdir()} == FILES | extra
        modes = {p.stat().st_mode for p in (exported.folder / name).iterdir()}
        assert len(modes) == 1, "everybody who may read one file may read them all"
    assert not list(exported.folder.parent.glob("*.partial"))


def test_config_is_that_of_the_released_models(exported, random_run):
    released = {  # microsoft/deberta-v3-base, without its sizes
        "model_type": "deberta-v2",
        "relative_attention": True,
        "max_relative_positions": -1,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
    }
    layers = {"discriminator": 3, "generator": 2}
    for name, architecture in (
        ("discriminator", "DebertaV2Model"),
        ("generator", "DebertaV2ForMaskedLM"),
    ):
        values = json.loads((exported.folder / name / "config.json").read_text())
        assert values | released == values
        assert values["architectures"] == [architecture]
        assert values["legacy"] is False
        # Where it is true, transformers 5.17 to 5.20 cannot load a generator with legacy false.
        assert values["tie_word_embeddings"] is False
        assert values["dtype"] == "float32"
        assert values["num_hidden_layers"] == layers[name]
        assert values["position_buckets"] == 12
        assert values["vocab_size"] == random_run.config.model.vocab_size


def test_discriminator_tensors(exported, random_run):
    tensors = load_file(exported.folder / "discriminator" / "model.safetensors")
    theirs = dict(random_run.pair.discriminator.named_parameters())
    del theirs["deberta.embeddings.word_embeddings._weight"]
    theirs["deberta.embeddings.word_embeddings.weight"] = merged_table(random_run)
    assert tensors.keys() == theirs.keys()
    assert sum(name.startswith("mask_predictions.") for name in tensors) == 6
    for name, tensor in tensors.items():
        assert torch.equal(tensor, theirs[name]), name


def test_generator_tensors(exported, random_run):
    tensors = load_file(exported.folder / "generator" / "model.safetensors")
    theirs = dict(random_run.pair.generator.named_parameters())
    assert tensors.keys() == theirs.keys()
    assert "deberta.embeddings.position_embeddings.weight" in tensors
    assert "lm_predictions.lm_head.dense.weight" in tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, theirs[name]), name


def test_auto_model_loads_the_discriminator(exported, random_run):
    model, loading = AutoModel.from_pretrained(
        exported.folder / "discriminator", output_loading_info=True
    )
    assert loading["missing_keys"] == set()
    assert all(key.startswith("mask_predictions.") for key in loading["unexpected_keys"])
    ids, mask = padded_ids(random_run.config.model.vocab_size)
    pair = random_run.pair
    with torch.no_grad():
        found = model.eval()(ids, attention_mask=mask.long()).last_hidden_state
        rows = pair.generator.token_embeddings(ids)
        expected = pair.discriminator.encode(ids, rows, mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


def test_auto_model_loads_the_generator(exported, random_run):
    model, loading = AutoModelForMaskedLM.from_pretrained(
        exported.folder / "generator", output_loading_info=True
    )
    assert loading["missing_keys"] == set()
    assert all("position_embeddings" in key for key in loading["unexpected_keys"])
    ids, mask = padded_ids(random_run.config.model.vocab_size)
    generator = random_run.pair.generator
    with torch.no_grad():
        found = model.eval().deberta(ids, attention_mask=mask.long()).last_hidden_state
        expected = generator.encode(ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)
    dense = model.lm_predictions.lm_head.dense.weight
    assert torch.equal(dense, generator.lm_predictions.lm_head.dense.weight)


def test_tokenizer_gives_sentencepiece_ids(exported, dataset_folder):
    text = "of\ufb01ce \uff21\uff22 \u4eca\u65e5 \U0001f642 a\u00a0b America's future"
    ids = Tokenizer.load(dataset_folder / "tokenizer").encode(text)
    for name in ("discriminator", "generator"):
        tokenizer = AutoTokenizer.from_pretrained(exported.folder / name)
        assert tokenizer(text)["input_ids"] == [1, *ids, 2]
        assert tokenizer.model_max_length == 48


def test_report(exported, random_run):
    report = exported.report
    assert (report.commit, report.step) == (random_run.commit, random_run.step)
    parities = {(p.network, p.kind, p.dtype): p for p in report.verification.parities}
    assert len(parities) == 6
    for (_, _, dtype), parity in parities.items():
        assert 0 < parity.max_difference <= {"float32": 1e-5, "float64": 1e-9}[dtype]
    assert report.verification.texts >= 8
    assert report.verification.tokens > 160
    size = sum(p.numel() for p in random_run.pair.discriminator.parameters())
    assert report.parameters["discriminator"] == size
    json.dumps(report.to_dict())


def test_card(exported, random_run):
    texts = {}
    for name in ("discriminator", "generator"):
        card = ModelCard.load(exported.folder / name / "README.md")
        texts[name] = card.text
        assert card.data.license == "other"
        assert card.data.library_name == "transformers"
        assert name in card.data.tags
        assert "| mlm_loss | 6.2500 |" in card.text
        assert "At step 40" in card.text
        assert "| tokens seen | 12,800 |" in card.text
        assert "torch 0.0-test" in card.text
        assert "| dataset made by | `deberta-prep build a\\|b` |" in card.text
        # A commit without its run has neither curves nor times.
        assert "| computed on | not known: the rows of the run were not at hand |" in card.text
        assert "| energy | not estimated: the power of the device is not known |" in card.text
        assert "curves.png" not in card.text
        assert "Not chosen yet. Set `license` above" in card.text
        assert "secret-host" not in card.text
    fingerprint = find_commit(random_run.commit).read_json("train_state.json")["identity"]
    assert fingerprint["dataset_fingerprint"] in texts["discriminator"]
    assert "AutoModel.from_pretrained" in texts["discriminator"]
    assert "enhanced mask decoder" in texts["generator"]


def test_interruption_keeps_the_earlier_export(exported, random_run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(exported.folder, output)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "verify_export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(random_run.folder, output, force=True)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert list(tmp_path.iterdir()) == [output]


def test_half_precision_replaces_an_earlier_export(exported, random_run, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(exported.folder, output)
    (tmp_path / "out.partial").mkdir()  # of an export that was killed
    export_command(random_run.commit, output, dtype="bf16", force=True, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["output"], report["dtype"]) == (str(output), "bf16")
    assert list(tmp_path.iterdir()) == [output]
    table = load_file(output / "discriminator" / "model.safetensors")[
        "deberta.embeddings.word_embeddings.weight"
    ]
    assert torch.equal(table, merged_table(random_run).bfloat16())
    assert json.loads((output / "generator" / "config.json").read_text())["dtype"] == "bfloat16"


def test_existing_output(exported, random_run, tmp_path):
    with pytest.raises(UserError, match=r"export exists: choose another folder, or .* --force"):
        export_run(random_run.folder, exported.folder)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not an earlier export, and --force replaces nothing"):
        export_run(random_run.folder, tmp_path, force=True)
    assert (tmp_path / "thesis.txt").exists()


def test_output_that_cannot_be_written(random_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.out\.partial cannot be written: .*Not a directory"):
        export_run(random_run.folder, tmp_path / "file" / "out")


@pytest.fixture
def run_of_three(dataset_folder, tmp_path):
    """A run with commits at 10, 20 and 30."""
    config = run_config(dataset_folder, tmp_path / "run")
    return [write_commit(config, step) for step in (10, 20, 30)]


def test_newest_whole_commit_is_used(run_of_three, caplog):
    run = run_of_three[0].parent.parent
    assert find_commit(run).step == 30
    assert find_commit(run_of_three[0].parent).step == 30
    assert find_commit(run_of_three[0]).step == 10
    damaged = run_of_three[2] / "generator" / "rank-00001.safetensors"
    flip_a_byte(damaged)
    assert find_commit(run).step == 20
    assert f"{damaged}: sha256 is" in caplog.text
    assert "the checkpoint before it is used" in caplog.text
    with pytest.raises(CorruptError, match=r"step-00000030.generator.rank-00001.safetensors: sha"):
        find_commit(run_of_three[2])
    for commit in run_of_three[:2]:
        flip_a_byte(commit / "train_state.json")
    with pytest.raises(CorruptError, match=r"(?s)no checkpoint is whole:.*00030.*00020.*00010"):
        find_commit(run)


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"nothing: no such folder; name a run folder"):
        find_commit(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"neither a run folder with a checkpoint nor a checkpoint"):
        find_commit(tmp_path)


def test_moved_dataset(dataset_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(dataset_folder, moved)
    write_commit(run_config(moved, tmp_path / "run"), 10)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=r"moved \(data.path\) is not there; .* with --dataset"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_dataset_of_another_tokenizer(random_run, tmp_path, dataset_folder):
    commit = tmp_path / "step-00000040"
    shutil.copytree(random_run.commit, commit)
    with pytest.raises(UserError, match=r"made with another tokenizer \(spm.model [0-9a-f]{12}\)"):
        export.open_tokenized(random_run.config, dataset_folder, "0" * 64)


def test_tokenizer_without_its_hugging_face_form(dataset_folder, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    shutil.copy(dataset_folder / "tokenizer" / "spm.model", source)
    (tmp_path / "repository").mkdir()
    with pytest.raises(UserError, match=r"tokenizer.json is missing, .* build the dataset again"):
        export_repositories.copy_tokenizer(source, tmp_path / "repository", 512)


def test_weights_that_no_export_can_hold(random_run):
    pair, generator = random_run.pair, random_run.pair.generator
    bias = generator.lm_predictions.lm_head.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = 1e5
        with pytest.raises(UserError, match=r"lm_head.bias holds 1e\+05, too large for fp16: use"):
            export.repository_tensors(pair, random_run.config, "fp16")
        export.repository_tensors(pair, random_run.config, "bf16")
        bias.data[0] = torch.nan
        with pytest.raises(UserError, match=r"lm_head.bias holds values that are not finite"):
            export.repository_tensors(pair, random_run.config, "bf16")
    finally:
        bias.data.copy_(kept)


def test_networks_from_an_export(exported, random_run):
    tensors = {n: read_tensors(exported.folder / n) for n in ("discriminator", "generator")}
    pair = pair_from_tensors(random_run.config, tensors)
    theirs = random_run.pair.parameters()
    for (name, found), expected in zip(pair.named_parameters(), theirs, strict=True):
        atol = 1e-6 if name.endswith("_weight") else 0.0
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("network", "key", "message"),
    [
        ("generator", "deberta.embeddings.word_embeddings.weight", "weight is missing; export"),
        ("discriminator", "mask_predictions.dense.bias", "does not hold the weights that"),
    ],
)
def test_export_without_a_tensor(network, key, message, exported, random_run):
    tensors = {n: read_tensors(exported.folder / n) for n in ("discriminator", "generator")}
    del tensors[network][key]
    with pytest.raises(CorruptError, match=rf"^{network}/model.safetensors.*{message}"):
        pair_from_tensors(random_run.config, tensors)


def test_damaged_weights_file(exported, tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors: no such file; name a folder written"):
        read_tensors(tmp_path)
    content = (exported.folder / "generator" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CorruptError, match=r"model.safetensors: not a whole safetensors file"):
        read_tensors(tmp_path)
