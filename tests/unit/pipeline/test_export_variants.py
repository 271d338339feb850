"""Exports of every kind of objective and network: transformers computes the same states.

`export_run` itself compares hidden states, keys and token ids in a clean process and refuses what
differs; these tests hand it weights in which nothing is zero.
"""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM

from pipeline.evaluate.heldout_model import evaluate_heldout_model
from pipeline.evaluate.load import encoder_repository, load_pretrained
from pipeline.export import export_run
from pipeline.export_weights import read_tensors
from pipeline.hf_layout import WORD_TABLE
from tests.commits import NETWORK, run_config, write_commit

BERT = {"relative_attention": False, "position_biased_input": True}
NARROW = {"hidden_size": 12, "num_attention_heads": 2, "embedding_size": 24}
VARIANTS = {
    "mlm": {
        "objective": {"task": "mlm", "mask_token_prob": 0.8, "random_token_prob": 0.1},
        "discriminator": None,
    },
    "mlm-conv": {
        "objective": {"task": "mlm", "enhanced_mask_decoder": False},
        "generator": {**NETWORK, "conv_kernel_size": 3, "conv_act": "gelu"},
        "discriminator": None,
    },
    "bert": {
        "objective": {"task": "mlm", "enhanced_mask_decoder": False},
        "generator": {**NETWORK, **BERT},
        "discriminator": None,
    },
    "electra": {
        "objective": {
            "embedding_sharing": "es",
            "update": "joint",
            "enhanced_mask_decoder": False,
            "rtd_head": "electra",
        },
        "generator": {**NETWORK, **BERT, **NARROW},
        "discriminator": {**NETWORK, **BERT},
    },
    "gdes-joint-biased": {
        "objective": {"update": "joint", "enhanced_mask_decoder": False},
        "generator": {**NETWORK, **BERT},
        "discriminator": {**NETWORK, **BERT},
    },
    "nes": {"objective": {"embedding_sharing": "nes", "update": "joint"}},
    # Sequences of 40 tokens, buckets up to a distance of 15: transformers does not clamp.
    "clamped": {
        "generator": {**NETWORK, "max_relative_positions": 16},
        "discriminator": {**NETWORK, "max_relative_positions": 16},
    },
    "not-clamped": {
        "generator": {**NETWORK, "max_relative_positions": 16},
        "discriminator": {
            **NETWORK,
            "max_relative_positions": 16,
            "relative_position_rule": "transformers",
        },
    },
}

DECODES = ("mlm", "nes", "clamped", "not-clamped")
"""Variants with the enhanced mask decoder."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, dataset_folder, tmp_path_factory):
    """Name, run folder, export and its report."""
    folder = tmp_path_factory.mktemp(request.param)
    config = run_config(dataset_folder, folder / "run", **VARIANTS[request.param])
    write_commit(config, 7)
    report = export_run(folder / "run", folder / "export")
    return request.param, folder / "run", folder / "export", report


def test_every_network_is_exported_and_proven(variant):
    name, _, export, report = variant
    networks = (
        {"generator"} if name in ("mlm", "mlm-conv", "bert") else {"generator", "discriminator"}
    )
    assert {path.name for path in export.iterdir()} == networks
    assert {parity.network for parity in report.verification.parities} == networks
    with encoder_repository(export) as folder:
        assert folder == report.encoder
        assert folder.name == ("discriminator" if "discriminator" in networks else "generator")


def test_an_export_evaluates_as_its_run(variant, dataset_folder):
    _, run, export, _ = variant
    figures = [
        evaluate_heldout_model(model, dataset_folder, max_sequences=3, device="cpu").figures
        for model in (run, export)
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert ("eval/rtd_auc" in figures[0]) is (len(list(export.iterdir())) == 2)


def test_the_config_describes_the_network(variant):
    name, _, export, _ = variant
    values = json.loads((export / "generator" / "config.json").read_text())
    assert values["relative_attention"] is (name not in ("bert", "electra", "gdes-joint-biased"))
    assert values.get("conv_kernel_size", 0) == (3 if name == "mlm-conv" else 0)
    assert values["legacy"] is (name == "electra"), "only that head of transformers can be narrow"
    assert values.get("embedding_size", 24) == 24
    assert "relative_position_rule" not in values


@pytest.mark.parametrize("variant", ["electra", "nes"], indirect=True)
def test_shared_tables_are_equal(variant):
    name, _, export, _ = variant
    tables = [read_tensors(export / each)[WORD_TABLE] for each in ("generator", "discriminator")]
    assert torch.equal(*tables) is (name == "electra")


@pytest.mark.parametrize("variant", sorted({*VARIANTS} - {*DECODES}), indirect=True)
def test_fill_mask_is_the_trained_one_without_the_mask_decoder(variant):
    """What the enhanced mask decoder costs in transformers, the other models do not pay."""
    _, run, export, _ = variant
    model = AutoModelForMaskedLM.from_pretrained(export / "generator").eval()
    generator = load_pretrained(run).pair.generator
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    head, table = generator.lm_predictions.lm_head, generator.get_parameter(WORD_TABLE)
    with torch.no_grad():
        states = generator.encode(ids, None)
        hidden = head.LayerNorm(torch.nn.functional.gelu(head.dense(states)))
        expected = hidden @ table.T + head.bias
        found = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_cards_say_what_was_trained(variant):
    name, _, export, _ = variant
    cards = {path.name: (path / "README.md").read_text() for path in export.iterdir()}
    decodes = name in DECODES
    assert ("not the trained ones" in cards["generator"]) is decodes
    if "discriminator" in cards:
        assert ("LayerNorm(h_CLS" in cards["discriminator"]) is (name != "electra")
        assert ("E_G + Delta" in cards["discriminator"]) is (name not in ("electra", "nes"))
