"""How many parameters each preset's networks have: to the unit, and near the published figures.

The networks are built on torch's meta device, so that 1.6 billion parameters cost nothing. Counted
by hand, with V rows of the word table, E its width, P positions, L layers of width H, F the inner
width of the feed-forward block and R rows of the relative table. KERAS_HUB are the counts in the
preset files of keras-team/keras-hub, which built the same encoders anew and loaded the released
weights into them.
"""

import pytest
import torch

from pipeline.config_loading import load_run_config, preset_names
from pipeline.flops import training_flops
from pipeline.modeling.pair import NetworkPair
from tests.worlds import ROOT

P = 512
R = 512


def count(preset):
    with torch.device("meta"):
        pair = NetworkPair(load_run_config(preset))
    networks = {"generator": pair.generator, "discriminator": pair.discriminator}
    return {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in networks.items()
        if network is not None
    }


# debertav3-facts.md 1.2, instantiated there from the released classes and files. The figures of
# discriminators include a table of P x H that never gets a gradient and that we do not build.
FACTS = {
    "deberta_v3_xsmall": (60_508_644, 71_027_713, 384),
    "deberta_v3_small": (121_154_148, 142_290_433, 768),
    "deberta_v3_base": (142_417_764, 184_817_665, 768),
    "deberta_v3_large": (284_561_508, 435_589_121, 1024),
}


@pytest.mark.parametrize("preset", FACTS)
def test_debertav3_has_the_released_classes_parameters(preset):
    generator, discriminator, hidden_size = FACTS[preset]
    assert count(preset) == {
        "generator": generator,
        "discriminator": discriminator - P * hidden_size,
    }


def layers(L, H, F):
    attention = 4 * (H * H + H)  # query, key, value and output, with biases
    feed_forward = H * F + F + F * H + H
    return L * (attention + feed_forward + 2 * 2 * H)  # and two LayerNorms


def relative(H):
    return R * H + 2 * H  # the table and its LayerNorm


def convolution(H, kernel=3):
    return kernel * H * H + H + 2 * H  # weights, bias, LayerNorm


def mlm_head(H, E, V):
    return H * E + E + 2 * E + V  # dense, LayerNorm, bias of the tied output


def electra_head(H):
    return H * H + H + H + 1  # dense, one output


def debertav3_head(H):
    return 2 * H + electra_head(H)  # LayerNorm before


def by_hand(preset):
    """One formula for each preset that the facts do not count."""
    H, F, V = 768, 3072, 128_100
    if preset == "mdeberta_v3_base":
        V = 251_000
        generator = V * H + P * H + 2 * H + layers(6, H, F) + relative(H) + mlm_head(H, H, V)
        discriminator = V * H + 2 * H + layers(12, H, F) + relative(H) + debertav3_head(H)
        return {"generator": generator, "discriminator": discriminator}
    if preset in ("deberta_v2_xlarge", "deberta_v2_xxlarge"):
        H, F, L = 1536, 6144, 24 if preset == "deberta_v2_xlarge" else 48
        encoder = layers(L, H, F) + relative(H) + convolution(H)
        return {"generator": V * H + P * H + 2 * H + encoder + mlm_head(H, H, V)}
    if preset in ("mlm_base", "mlm_large", "bert_base", "bert_large"):
        L = 12
        if preset.endswith("large"):
            H, F, L = 1024, 4096, 24
        # Positions lie beside the words: for the decoder in DeBERTa, for the input in BERT.
        words = V * H + P * H + 2 * H
        encoder = layers(L, H, F) + (relative(H) if preset.startswith("mlm") else 0)
        return {"generator": words + encoder + mlm_head(H, H, V)}
    V = 30_600
    G, J, L = 256, 1024, 12  # the generator's widths
    if preset == "electra_small":
        H, F, E, G, J = 256, 1024, 128, 64, 256
    elif preset == "electra_base":
        E = 768
    else:
        H, F, E, L = 1024, 4096, 1024, 24
    generator = V * E + P * E + E * G + 2 * G + layers(L, G, J) + mlm_head(G, E, V)
    projection = E * H if E != H else 0
    return {
        "generator": generator,
        # The tables of words and positions are the generator's.
        "discriminator": projection + 2 * H + layers(L, H, F) + electra_head(H),
    }


OTHERS = [name for name in preset_names() if name not in FACTS and not name.startswith("demo")]


@pytest.mark.parametrize("preset", OTHERS)
def test_all_others_have_the_parameters_counted_by_hand(preset):
    assert count(preset) == by_hand(preset)


def backbone(preset, name="discriminator"):
    """The published encoder: no head, and the tables that training shares or keeps elsewhere."""
    config, sizes = load_run_config(preset), count(preset)
    network = config.networks[name]
    H, E, V = network.hidden_size, network.word_embedding_size, config.model.vocab_size
    if name == "generator":
        positions = 0 if network.position_biased_input else P * H  # else the decoder's
        return sizes[name] - mlm_head(H, E, V) - positions
    if config.objective.embedding_sharing == "es":
        return sizes[name] - electra_head(H) + V * E + P * E
    return sizes[name] - debertav3_head(H)


@pytest.mark.parametrize(
    ("preset", "keras_hub"),
    [
        ("deberta_v3_xsmall", 70_682_112),
        ("deberta_v3_small", 141_304_320),
        ("deberta_v3_base", 183_831_552),
        ("deberta_v3_large", 434_012_160),
        ("mdeberta_v3_base", 278_218_752),
    ],
)
def test_debertav3_equals_keras_hub_s(preset, keras_hub):
    assert backbone(preset) == keras_hub


@pytest.mark.parametrize(
    ("preset", "name", "keras_hub"),
    [
        ("bert_base", "generator", 109_482_240),
        ("bert_large", "generator", 335_141_888),
        ("electra_small", "discriminator", 13_548_800),
        ("electra_base", "discriminator", 109_482_240),
        ("electra_large", "discriminator", 335_141_888),
        ("electra_base", "generator", 33_576_960),
        ("electra_large", "generator", 51_065_344),
    ],
)
def test_bert_and_electra_equal_keras_hub_s_but_for_what_the_presets_name(preset, name, keras_hub):
    """The released models have 30,522 words, segments, a pooler and another projection of words."""
    config = load_run_config(preset)
    network = config.networks[name]
    H, E = network.hidden_size, network.word_embedding_size
    words = (30_522 - config.model.vocab_size) * E
    segments, pooler = 2 * E, H * H + H
    projection = 0 if E == H else H + 2 * E - 2 * H  # with a bias, behind the LayerNorm
    assert backbone(preset, name) + words + segments + pooler + projection == keras_hub


def test_the_released_v2_models():
    """The cards say 900M and 1.5B; the file of the second, in fp16 with its head, has 3.14 GB."""
    assert round(backbone("deberta_v2_xlarge", "generator") / 1e8) == 9
    assert int(backbone("deberta_v2_xxlarge", "generator") / 1e8) == 15, "cut, not rounded"
    assert round(2 * count("deberta_v2_xxlarge")["generator"] / 1e9, 2) == 3.14


def test_readme_s_table():
    """A row a preset: parameters, batch, steps and operations as the code counts them.

    The relatives of `demo` are left out: they are of its size.
    """
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| preset | system |")) + 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    rows = rows[: next(i for i, row in enumerate(rows) if row == [""])]
    listed = [name for name in preset_names() if not name.startswith("demo_")]
    assert sorted(row[0] for row in rows) == sorted(f"`{name}`" for name in listed)
    for name, _system, parameters, batch, steps, days in rows:
        preset = name.strip("`")
        config, counts = load_run_config(preset), count(preset)
        sequences = config.reference.train_batch_size
        assert sequences is not None
        flops = training_flops(config, sequences)
        assert [parameters, batch, steps, days] == [
            " + ".join(f"{number / 1e6:.1f}" for number in counts.values()),
            f"{sequences:,}",
            f"{config.schedule.max_steps:,}",
            f"{flops / 86_400e15:.3g}",
        ], preset
