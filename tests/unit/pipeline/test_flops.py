"""FLOPs of the minimal algorithm: the published figure, sums by hand, and what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelSection, NetworkSection, ObjectiveSection, RunConfig
from pipeline.config_loading import load_run_config
from pipeline.flops import peak_flops, training_flops, training_flops_per_token
from pipeline.modeling.networks import Discriminator, Generator
from pipeline.rtd import DrawKey

WIDTH, INNER, LENGTH, ROWS, VOCABULARY, NARROW = 32, 56, 20, 2 * 6, 104, 12
SHARE = 0.15  # of tokens that are masked: three of twenty
ABSOLUTE = {"relative_attention": False, "position_biased_input": True}


def product(rows, inner, columns):
    """Operations of one matrix product, a multiply-add being two."""
    return 2 * rows * inner * columns


def layer_attention(length=LENGTH):
    return 2 * product(1, WIDTH, length)


def layer(relative=True):
    """One token through one layer: four projections, two attention products, feed-forward."""
    projections = 4 * product(1, WIDTH, WIDTH)
    both_position_terms = 2 * product(1, WIDTH, ROWS) if relative else 0
    feed_forward = 2 * product(1, WIDTH, INNER)
    return projections + layer_attention() + both_position_terms + feed_forward


def keys_for_slots(relative=True):
    """What the last layer needs of every token: keys, values, position to content."""
    return 2 * product(1, WIDTH, WIDTH) + (product(1, WIDTH, ROWS) if relative else 0)


def pass_over_a_slot(relative=True):
    """The last layer at one slot: query, output, two attention products, content to position."""
    content_to_position = product(1, WIDTH, ROWS) if relative else 0
    dense = 2 * product(1, WIDTH, WIDTH) + 2 * product(1, WIDTH, INNER)
    return dense + layer_attention() + content_to_position


def mlm_head(width=WIDTH):
    return product(1, WIDTH, width) + product(1, width, VOCABULARY)


RTD_HEAD = product(1, WIDTH, WIDTH)


def network(layers, **changes):
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": LENGTH,
        "position_buckets": ROWS // 2,
    }
    return NetworkSection.model_validate({**sizes, **changes})


def run(layers=(3, 4), objective=None, phases=(), **changes):
    """A run with (generator, discriminator) layers; one number is a masked language model."""
    sections = {"generator": network(layers[0], **changes)}
    if len(layers) == 2:
        sections["discriminator"] = network(layers[1], **changes)
    else:
        objective = {"task": "mlm", **(objective or {})}
    return RunConfig.model_validate(
        {
            **sections,
            "data": {"sequence_length": LENGTH},
            "model": {"vocab_size": VOCABULARY},
            "objective": objective or {},
            "optimizer": {"generator_learning_rate": 1},
            "schedule": {"max_steps": 10, "warmup_steps": 0, "phases": list(phases)},
        }
    )


def test_large_at_512():
    """performance.md 1: 3.246 GFLOP a token, 707 MFLOP of them the discriminator's forward."""
    large = load_run_config("deberta_v3_large", [])
    assert training_flops_per_token(large) == pytest.approx(3.246e9, rel=2e-4)
    almost_no_generator = large.model_copy(
        update={
            "generator": large.generator.model_copy(
                update={"num_hidden_layers": 2, "intermediate_size": 1}
            ),
            "model": ModelSection(vocab_size=1),
            "objective": large.objective.model_copy(update={"mask_prob": 1e-9}),
        }
    )
    h = 1024
    layer_and_keys = 8 * h * h + 4 * h * 1 + 4 * 512 * h + 4 * 512 * h + 4 * h * h + 2 * 512 * h
    discriminator = training_flops_per_token(almost_no_generator) / 3 - layer_and_keys
    assert discriminator == pytest.approx(707e6, rel=1e-3)


@pytest.mark.parametrize("rtd_head", ["debertav3", "electra"])
def test_both_networks_by_hand(rtd_head):
    expected = (
        2 * layer()
        + keys_for_slots()
        + SHARE * (2 * pass_over_a_slot() + mlm_head())
        + 4 * layer()
        + RTD_HEAD
    )
    config = run(objective={"rtd_head": rtd_head})
    assert training_flops_per_token(config) == pytest.approx(3 * expected, rel=1e-12)


def test_without_the_enhanced_mask_decoder_slots_pass_once():
    with_it, without = run(), run(objective={"enhanced_mask_decoder": False})
    saved = training_flops_per_token(with_it) - training_flops_per_token(without)
    assert saved == pytest.approx(3 * SHARE * pass_over_a_slot())


def test_a_masked_language_model_by_hand():
    slots = SHARE * (pass_over_a_slot() + mlm_head())
    config = run([1], objective={"enhanced_mask_decoder": False})
    assert training_flops_per_token(config) == pytest.approx(3 * (keys_for_slots() + slots))
    deeper = run([3], objective={"enhanced_mask_decoder": False})
    more = training_flops_per_token(deeper) - training_flops_per_token(config)
    assert more == pytest.approx(3 * 2 * layer())


def test_a_narrow_table_costs_a_projection_a_network_and_saves_in_the_softmax():
    no_decoder = {"enhanced_mask_decoder": False}
    wide, narrow = run(objective=no_decoder), run(objective=no_decoder, embedding_size=NARROW)
    difference = training_flops_per_token(narrow) - training_flops_per_token(wide)
    projections = 2 * product(1, NARROW, WIDTH)
    heads = SHARE * (mlm_head(NARROW) - mlm_head())
    assert difference == pytest.approx(3 * (projections + heads))


def test_a_convolution_is_a_product_for_each_tap_in_each_network():
    difference = training_flops_per_token(run(conv_kernel_size=5)) - training_flops_per_token(run())
    assert difference == pytest.approx(3 * 2 * 5 * product(1, WIDTH, WIDTH))


def test_without_relative_attention_by_hand():
    no_decoder = {"enhanced_mask_decoder": False}
    expected = (
        (2 + 4) * layer(relative=False)
        + keys_for_slots(relative=False)
        + SHARE * (pass_over_a_slot(relative=False) + mlm_head())
        + RTD_HEAD
    )
    config = run(objective=no_decoder, **ABSOLUTE)
    assert training_flops_per_token(config) == pytest.approx(3 * expected)


def test_a_shorter_sequence_saves_in_two_products_of_attention():
    config = run()
    assert training_flops_per_token(config, LENGTH) == training_flops_per_token(config)
    saved = training_flops_per_token(config) - training_flops_per_token(config, LENGTH - 8)
    rows = 2 + 4 + SHARE * 2  # whole layers, and the slots' two passes
    assert saved == pytest.approx(3 * rows * (layer_attention() - layer_attention(LENGTH - 8)))


def test_a_run_is_the_sum_of_its_phases():
    plain = run()
    assert training_flops(plain, 6) == 10 * 6 * LENGTH * training_flops_per_token(plain)
    phases = [
        {"until_step": 2, "sequence_length": 8, "train_batch_size": 3},
        {"until_step": 5, "sequence_length": 12},
        {"until_step": 9, "train_batch_size": 4},
    ]
    config = run(phases=phases)
    parts = [(2, 3, 8), (3, 6, 12), (4, 4, LENGTH), (1, 6, LENGTH)]
    expected = sum(
        steps * batch * length * training_flops_per_token(config, length)
        for steps, batch, length in parts
    )
    assert training_flops(config, 6) == pytest.approx(expected, rel=1e-12)


VARIANTS = {
    "v3": {},
    "once": {"objective": {"enhanced_mask_decoder": False}},
    "conv": {"conv_kernel_size": 3},
    "absolute": {"objective": {"enhanced_mask_decoder": False}, **ABSOLUTE},
    "narrow": {"objective": {"enhanced_mask_decoder": False}, "embedding_size": NARROW},
    "electra": {"objective": {"rtd_head": "electra"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_what_torch_counts(variant):
    """Forward matrix products of both networks, to the operation.

    Three things that the formula leaves out are added by hand: the last product of the
    discriminator's head; the projections of the relative table, once a layer and batch; and the
    position-to-content product that the enhanced mask decoder's second pass repeats.
    """
    config = run(**VARIANTS[variant])
    batch, slots = 64, 3
    model = ModelSection(vocab_size=VOCABULARY, attention_backend="eager")
    objective = ObjectiveSection.model_validate(VARIANTS[variant].get("objective", {}))
    assert config.discriminator is not None
    generator = Generator(config.generator, model, objective)
    discriminator = Discriminator(config.discriminator, model, objective)
    ids = torch.randint(4, 104, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[2, 7, 11]]).expand(batch, -1)
    draw = DrawKey((1, 2), torch.zeros(batch, 2, dtype=torch.int64))
    targets = ids.gather(1, positions)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator(ids, None, positions, positions > 0, targets, draw, None)
        rows = generator.token_embeddings(ids, config.discriminator.position_biased_input)
        discriminator(ids, rows, None, torch.zeros(ids.shape), None)
    counted = counter.get_total_flops() / (batch * LENGTH)
    ours = training_flops_per_token(config) / 3
    assert slots / LENGTH == config.objective.mask_prob
    left_out = product(1, WIDTH, 1)
    if config.generator.relative_attention:
        left_out += 7 * 2 * product(ROWS, WIDTH, WIDTH) / (batch * LENGTH)
        left_out += product(1, WIDTH, ROWS) if objective.enhanced_mask_decoder else 0
    assert ours + left_out == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu", None),
    ],
)
def test_peak_rates(name, rate):
    assert peak_flops(name) == rate
