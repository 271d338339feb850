"""Parameter names and counts, initial weights, dtypes and gradients of the two networks."""

import pytest
import torch

from pipeline.config import ModelSection, NetworkSection, ObjectiveSection
from pipeline.modeling.networks import Discriminator, Generator, init_weights
from tests.reference.small_networks import (
    VOCABULARY,
    batch,
    discriminator,
    generator,
    model_section,
    network_section,
)

# Layers of D and G, hidden size, heads; trainable totals of D and G in the released code, which
# counts a 512 x H table in D that never gets a gradient.
PUBLISHED = {
    "xsmall": (12, 6, 384, 6, 71_027_713, 60_508_644, 21_490_944),
    "small": (6, 3, 768, 12, 142_290_433, 121_154_148, 42_921_984),
    "base": (12, 6, 768, 12, 184_817_665, 142_417_764, 85_449_216),
    "large": (24, 12, 1024, 16, 435_589_121, 284_561_508, 302_835_712),
}


def released_section(layers, hidden_size, heads):
    return NetworkSection(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
    )


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    d_layers, g_layers, hidden, heads, d_total, g_total, encoder = PUBLISHED[size]
    with torch.device("meta"):
        g = Generator(released_section(g_layers, hidden, heads), ModelSection(), ObjectiveSection())
        d = Discriminator(
            released_section(d_layers, hidden, heads), ModelSection(), ObjectiveSection()
        )
    assert count(g) == g_total
    assert count(d) == d_total - 512 * hidden
    assert count(d.deberta.encoder) == encoder


LAYER_PARAMETERS = {
    f"{module}.{kind}"
    for module in (
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
}
COMMON = {
    "deberta.embeddings.LayerNorm.weight",
    "deberta.embeddings.LayerNorm.bias",
    "deberta.encoder.rel_embeddings.weight",
    "deberta.encoder.LayerNorm.weight",
    "deberta.encoder.LayerNorm.bias",
    *(f"deberta.encoder.layer.{n}.{name}" for n in range(2) for name in LAYER_PARAMETERS),
}


def test_names_are_those_of_the_released_checkpoints():
    g, d = generator(layers=2), discriminator(layers=2)
    assert set(g.state_dict()) == COMMON | {
        "deberta.embeddings.word_embeddings.weight",
        "deberta.embeddings.position_embeddings.weight",
        "lm_predictions.lm_head.bias",
        *(
            f"lm_predictions.lm_head.{m}.{k}"
            for m in ("dense", "LayerNorm")
            for k in ("weight", "bias")
        ),
    }
    assert set(d.state_dict()) == COMMON | {
        "deberta.embeddings.word_embeddings._weight",
        *(
            f"mask_predictions.{m}.{k}"
            for m in ("dense", "LayerNorm", "classifier")
            for k in ("weight", "bias")
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_every_dtype_trains_with_wide_losses(dtype, backend):
    model = model_section(attention_backend=backend)
    data, g, d = batch(), generator(dtype, model=model), discriminator(dtype, model=model)
    exact_g, exact_d = generator(torch.float64), discriminator(torch.float64)
    rows = g.token_embeddings(data.ids)
    labels = torch.zeros(data.ids.shape)
    out, rtd = g(*data.generator_arguments()), d(data.ids, rows, data.mask, labels, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {out.loss_sum.dtype, rtd.loss_sum.dtype, rtd.logits_BL.dtype, rows.dtype} == {wide}
    exact_rows = exact_g.token_embeddings(data.ids)
    exact = (
        exact_g(*data.generator_arguments()),
        exact_d(data.ids, exact_rows, data.mask, labels, None),
    )
    for ours, theirs in zip((out, rtd), exact, strict=True):
        error = (ours.loss_sum - theirs.loss_sum).abs() / theirs.loss_sum
        assert error < 10 * torch.finfo(dtype).eps
    (out.loss_sum + rtd.loss_sum).backward()
    for network in (g, d):
        for name, parameter in network.named_parameters():
            assert parameter.grad.dtype == dtype, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_autocast_trains_fp32_weights_with_fp32_losses(backend):
    data, model = batch(), model_section(attention_backend=backend)
    g, d = generator(model=model), discriminator(model=model)
    labels = torch.zeros(data.ids.shape)

    def losses():
        rows = g.token_embeddings(data.ids)
        out = g(*data.generator_arguments())
        return out.loss_sum, d(data.ids, rows, data.mask, labels, None).loss_sum

    exact = losses()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses()
    for left, right in zip(rounded, exact, strict=True):
        assert left.dtype == torch.float32
        assert left != right
        torch.testing.assert_close(left, right, rtol=0.02, atol=0)
    sum(rounded).backward()
    for network in (g, d):
        for name, parameter in network.named_parameters():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name


def test_every_parameter_learns():
    data, g, d = batch(length=32), generator(), discriminator()
    g(*data.generator_arguments()).loss_sum.backward()
    labels = torch.zeros(data.ids.shape)
    d(data.ids, g.token_embeddings(data.ids), data.mask, labels, None).loss_sum.backward()
    for network in (g, d):
        for name, parameter in network.named_parameters():
            assert parameter.grad.any(), name


@pytest.mark.parametrize("network", [generator, discriminator])
def test_the_padding_row_learns_nothing_through_the_lookup(network):
    embedding = network().deberta.embeddings.word_embeddings
    embedding(torch.tensor([[0, 5]])).sum().backward()
    (table,) = embedding.parameters()
    assert not table.grad[0].any()
    assert table.grad[5].all()


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_evaluation_gives_the_numbers_of_training_without_dropout(checkpointing):
    model = model_section(activation_checkpointing=checkpointing)
    data, g, d = batch(), generator(model=model), discriminator(model=model)
    arguments = (data.ids, g.token_embeddings(data.ids), data.mask, torch.zeros(data.ids.shape))
    with torch.inference_mode():
        evaluated = g(*data.generator_arguments()), d(*arguments, None)
    trained = g(*data.generator_arguments()), d(*arguments, None)
    for left, right in zip(evaluated, trained, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_parameter_gets_a_zero_gradient_where_no_slot_is_valid():
    data, g = batch(), generator()
    data.valid = torch.zeros_like(data.valid)
    out = g(*data.generator_arguments())
    out.loss_sum.backward()
    assert (out.loss_sum, out.correct_sum) == (0, 0)
    for name, parameter in g.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_slots_that_do_not_count_change_nothing():
    data, g = batch(), generator(torch.float64)
    before = g(*data.generator_arguments())
    data.positions[1, 2], data.targets[1, 2] = 5, 9
    after = g(*data.generator_arguments())
    assert torch.equal(before.loss_sum, after.loss_sum)
    assert torch.equal(before.drawn_BK[data.valid], after.drawn_BK[data.valid])


def test_cls_and_sep_count_in_the_loss_and_padding_does_not():
    data, g, d = batch(), generator(), discriminator()
    rows = g.token_embeddings(data.ids)
    labels = torch.zeros(data.ids.shape)
    out = d(data.ids, rows, data.mask, labels, None)
    expected = torch.nn.functional.softplus(out.logits_BL)[data.mask].sum()
    torch.testing.assert_close(out.loss_sum, expected)
    flipped = torch.where(data.mask, labels, 1.0)
    assert torch.equal(d(data.ids, rows, data.mask, flipped, None).loss_sum, out.loss_sum)


def new_generator():
    return Generator(network_section(), model_section(), ObjectiveSection())


class TestInitialWeights:
    def test_follow_the_published_law(self):
        section, model = network_section(2, hidden_size=96), model_section(vocab_size=500)
        g = Generator(section, model, ObjectiveSection())
        d = Discriminator(section, model, ObjectiveSection())
        for network in (g, d):
            for parameter in network.parameters():
                parameter.data.fill_(9.0)
            init_weights(network, seed=3)
            for name, parameter in network.named_parameters():
                if name.endswith("_weight") or name.endswith("bias"):
                    assert not parameter.any(), name
                elif name.endswith("LayerNorm.weight"):
                    assert (parameter == 1).all(), name
                else:
                    assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
                    assert abs(parameter.mean().item()) < 0.005, name
        assert g.deberta.embeddings.word_embeddings.weight[0].any()  # [PAD] is drawn as well

    def test_depend_on_seed_network_and_name_alone(self):
        first, second = (new_generator() for _ in range(2))
        init_weights(first, seed=3)
        torch.manual_seed(99)
        torch.randn(7)
        init_weights(second, seed=3)
        for name, parameter in first.named_parameters():
            assert torch.equal(parameter, second.state_dict()[name]), name
        init_weights(second, seed=4)
        d = Discriminator(network_section(), model_section(), ObjectiveSection())
        init_weights(d, seed=3)
        shared = "deberta.encoder.layer.1.attention.self.query_proj.weight"
        layers = [w for n, w in first.named_parameters() if n.endswith("query_proj.weight")]
        drawn = [second.state_dict()[shared], d.state_dict()[shared], *layers]
        for position, left in enumerate(drawn):
            assert not any(torch.equal(left, right) for right in drawn[position + 1 :])

    def test_are_rounded_from_fp32(self):
        wide, narrow = (new_generator() for _ in range(2))
        init_weights(wide, seed=3)
        narrow.bfloat16()
        init_weights(narrow, seed=3)
        for name, parameter in wide.named_parameters():
            assert torch.equal(parameter.bfloat16(), narrow.state_dict()[name]), name

    def test_refuse_a_parameter_without_a_rule(self):
        g = new_generator()
        g.register_parameter("stray", torch.nn.Parameter(torch.zeros(3)))
        with pytest.raises(TypeError, match="no initialization rule for stray"):
            init_weights(g, seed=0)


def test_draws_stay_in_the_vocabulary():
    data, g = batch(), generator()
    drawn = g(*data.generator_arguments()).drawn_BK
    assert drawn.dtype == torch.int64
    assert ((drawn >= 0) & (drawn < VOCABULARY)).all()
