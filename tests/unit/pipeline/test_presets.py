"""The presets: what each holds, against the papers' tables and the files of the released code.

The expected values were read in the sources themselves, and are written here as those have them;
how many parameters the networks have is in `test_preset_parameters.py`.
"""

import re
import tomllib

import pytest

from pipeline.config import PhaseSection, RunConfig
from pipeline.config_loading import load_run_config, preset_names
from tests.worlds import ROOT

PRESETS = ROOT / "pipeline" / "presets"
PUBLISHED = [name for name in preset_names() if not name.startswith("demo")]

V2_JSON = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "conv_kernel_size": 0,
}
"""What all of experiments/language_model/*.json have in common, under the names of [generator]."""
BERT_JSON = V2_JSON | {"relative_attention": False, "position_biased_input": True}
CONV_JSON = V2_JSON | {"conv_kernel_size": 3, "conv_act": "gelu"}
ELECTRA_PY = BERT_JSON | {"layer_norm_eps": 1e-12}


def test_preset_names():
    assert preset_names() == [
        "bert_base",
        "bert_large",
        "deberta_v2_xlarge",
        "deberta_v2_xxlarge",
        "deberta_v3_base",
        "deberta_v3_large",
        "deberta_v3_small",
        "deberta_v3_xsmall",
        "demo",
        "demo_electra",
        "demo_es",
        "demo_mlm",
        "demo_nes",
        "electra_base",
        "electra_large",
        "electra_small",
        "mdeberta_v3_base",
        "mlm_base",
        "mlm_large",
    ]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_value_has_its_source(preset):
    lines = (PRESETS / f"{preset}.toml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+ = ", line)]
    assert len(values) > 40
    assert [line for line in values if not re.search(r"  ?# \w.{2,}$", line)] == []


def sizes(network):
    return (
        network.num_hidden_layers,
        network.hidden_size,
        network.num_attention_heads,
        network.intermediate_size,
    )


def assert_has(network, values):
    assert {key: getattr(network, key) for key in values} == values


@pytest.mark.parametrize(
    ("preset", "generator", "discriminator", "common"),
    [  # (layers, width, heads, inner width), in the sources of each preset
        ("deberta_v3_xsmall", (6, 384, 6, 1536), (12, 384, 6, 1536), V2_JSON),
        ("deberta_v3_small", (3, 768, 12, 3072), (6, 768, 12, 3072), V2_JSON),
        ("deberta_v3_base", (6, 768, 12, 3072), (12, 768, 12, 3072), V2_JSON),
        ("deberta_v3_large", (12, 1024, 16, 4096), (24, 1024, 16, 4096), V2_JSON),
        ("mdeberta_v3_base", (6, 768, 12, 3072), (12, 768, 12, 3072), V2_JSON),
        ("deberta_v2_xlarge", (24, 1536, 24, 6144), None, CONV_JSON),
        ("deberta_v2_xxlarge", (48, 1536, 24, 6144), None, CONV_JSON),
        ("mlm_base", (12, 768, 12, 3072), None, V2_JSON),
        ("mlm_large", (24, 1024, 16, 4096), None, V2_JSON),
        ("bert_base", (12, 768, 12, 3072), None, BERT_JSON),
        ("bert_large", (24, 1024, 16, 4096), None, BERT_JSON),
        ("electra_small", (12, 64, 1, 256), (12, 256, 4, 1024), ELECTRA_PY),
        ("electra_base", (12, 256, 4, 1024), (12, 768, 12, 3072), ELECTRA_PY),
        ("electra_large", (24, 256, 4, 1024), (24, 1024, 16, 4096), ELECTRA_PY),
    ],
)
def test_networks(preset, generator, discriminator, common):
    config = load_run_config(preset)
    assert sizes(config.generator) == generator
    assert_has(config.generator, common)
    if discriminator is None:
        assert config.discriminator is None
    else:
        assert config.discriminator is not None
        assert sizes(config.discriminator) == discriminator
        assert_has(config.discriminator, common)


@pytest.mark.parametrize(
    ("preset", "vocab_size", "sequence_length", "embedding_size"),
    [
        ("deberta_v3_large", 128_100, 512, 1024),
        ("mdeberta_v3_base", 251_000, 512, 768),
        ("deberta_v2_xxlarge", 128_100, 512, 1536),
        ("mlm_base", 128_100, 512, 768),
        ("bert_base", 128_100, 512, 768),
        ("electra_small", 30_600, 128, 128),
        ("electra_base", 30_600, 512, 768),
        ("electra_large", 30_600, 512, 1024),
    ],
)
def test_vocabulary_and_length(preset, vocab_size, sequence_length, embedding_size):
    config = load_run_config(preset)
    assert (config.model.vocab_size, config.data.sequence_length) == (vocab_size, sequence_length)
    for network in config.networks.values():
        assert network.word_embedding_size == embedding_size


def recipe(config):
    """Learning rate, betas, batch, steps and warm-up: what a table of hyper-parameters lists."""
    optimizer, schedule = config.optimizer, config.schedule
    rates = {optimizer.learning_rate(network) for network in config.networks}
    (rate,) = rates
    batch = config.reference.train_batch_size
    return rate, optimizer.betas[1], batch, schedule.max_steps, schedule.warmup_steps


RECIPES = {  # by the paper, by the released code
    # arXiv:2111.09543, table 14; rtd.sh, args.py
    "deberta_v3_xsmall": [(6e-4, 0.98, 8192, 500_000, 10_000), (3e-4, 0.999, 64, 10**6, 10_000)],
    "deberta_v3_small": [(6e-4, 0.98, 8192, 500_000, 10_000), (1e-4, 0.999, 256, 10**6, 10_000)],
    "deberta_v3_base": [(6e-4, 0.98, 8192, 500_000, 10_000), (1e-4, 0.999, 256, 10**6, 10_000)],
    "deberta_v3_large": [(3e-4, 0.98, 8192, 500_000, 10_000), (1e-4, 0.999, 256, 10**6, 10_000)],
    "mdeberta_v3_base": [(6e-4, 0.98, 8192, 500_000, 10_000), (1e-4, 0.999, 256, 10**6, 10_000)],
    # arXiv:2006.03654, table 8; mlm.sh, args.py
    "deberta_v2_xlarge": [(1.5e-4, 0.999, 2048, 10**6, 10_000), (1e-4, 0.999, 32, 10**6, 1000)],
    "deberta_v2_xxlarge": [(1.5e-4, 0.999, 2048, 10**6, 10_000), (1e-4, 0.999, 32, 10**6, 1000)],
    "mlm_base": [(2e-4, 0.999, 2048, 10**6, 10_000), (1e-4, 0.999, 256, 10**6, 10_000)],
    "mlm_large": [(2e-4, 0.999, 2048, 10**6, 10_000), (1e-4, 0.999, 256, 10**6, 10_000)],
    # arXiv:1810.04805, A.2; mlm.sh, args.py
    "bert_base": [(1e-4, 0.999, 256, 10**6, 10_000)] * 2,
    "bert_large": [(1e-4, 0.999, 256, 10**6, 10_000)] * 2,
    # arXiv:2003.10555, table 6; configure_pretraining.py, optimization.py
    "electra_small": [(5e-4, 0.999, 128, 10**6, 10_000)] * 2,
    "electra_base": [(2e-4, 0.999, 256, 766_000, 10_000)] * 2,
    "electra_large": [(2e-4, 0.999, 2048, 400_000, 10_000)] * 2,
}


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("which", ["paper", "released_code"])
def test_optimizer_and_schedule(preset, which):
    config = load_run_config(preset, [f"recipe={which}"])
    is_released = which == "released_code"
    assert recipe(config) == RECIPES[preset][is_released]
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (1e-6, 0.01)
    assert config.optimizer.betas[0] == 0.9
    assert config.optimizer.bias_correction is not is_released
    assert config.schedule.decay == ("linear_released" if is_released else "linear")
    assert config.reference.gradient_clipping == 1.0


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("which", ["paper", "released_code"])
def test_objective(preset, which):
    """The papers on the objective; rtd_task.py, mlm_task.py and electra/run_pretraining.py."""
    objective = load_run_config(preset, [f"recipe={which}"]).objective
    family, is_released = preset.split("_")[0], which == "released_code"
    expected = {"task": "mlm" if family in ("mlm", "bert") or "_v2_" in preset else "rtd"}
    expected["masking_law"] = "windowed" if is_released and family != "electra" else "uniform"
    expected["mask_prob"] = 0.25 if preset == "electra_large" else 0.15
    expected["enhanced_mask_decoder"] = family not in ("bert", "electra")
    expected["max_ngram"] = 3 if family == "mlm" or "_v2_" in preset else 1
    expected["whole_word_masking"] = expected["max_ngram"] == 3
    replaced = {"electra": (0.85 if is_released else 1.0, 0.0)}
    default = (0.8, 0.1) if expected["task"] == "mlm" else (1.0, 0.0)
    masked, random = replaced.get(family, default)
    expected |= {"mask_token_prob": masked, "random_token_prob": random}
    if family == "electra":
        expected |= {"rtd_head": "electra", "embedding_sharing": "es", "update": "joint"}
        expected["rtd_loss_weight"] = 50.0
    elif expected["task"] == "rtd":
        expected |= {"rtd_head": "debertav3", "embedding_sharing": "gdes", "update": "decoupled"}
        expected["rtd_loss_weight"] = 10.0 if is_released else 50.0
        expected |= {"sampling_temperature": 1.0, "draw_special_ids": True}
    assert_has(objective, expected)


def test_bert_trains_on_short_sequences_first():
    """arXiv:1810.04805, A.2: 90 % of the steps with 128 tokens; mlm.sh has 512 throughout."""
    for preset in ("bert_base", "bert_large"):
        short = (PhaseSection(until_step=900_000, sequence_length=128),)
        assert load_run_config(preset).schedule.phases == short
        assert load_run_config(preset, ["recipe=released_code"]).schedule.phases == ()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_released_code_s_table_holds_differences_only(preset):
    document = tomllib.loads((PRESETS / f"{preset}.toml").read_text())
    overlay = document.pop("released_code")
    paper = RunConfig.model_validate(document).model_dump(mode="json")
    assert overlay
    for section, table in overlay.items():
        assert table
        for key, value in table.items():
            assert paper[section][key] != value, f"{section}.{key}"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_run_folders_differ(preset):
    """Two presets that are tried out with their defaults must not meet in one folder."""
    assert load_run_config(preset).run.folder == f"runs/{preset}"
