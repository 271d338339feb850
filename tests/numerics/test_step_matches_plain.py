"""Losses, draws and gradients of both networks against the plain re-derivation, in fp64."""

import pytest
import torch

from pipeline.modeling.heads import MlmHead, RtdHead
from pipeline.rtd import DrawKey, gumbel_noise
from tests.reference import rtd_plain
from tests.reference.small_networks import (
    VOCABULARY,
    batch,
    discriminator,
    generator,
    leaves,
    model_section,
    network_section,
)

ROUNDING = {"rtol": 1e-10, "atol": 1e-11}
LAYERS = 2
LABELS = (torch.arange(36).view(3, 12) % 5 == 0).double()


def plain_generator(weights, data, network=None):
    noise = gumbel_noise(data.draw.sample_words_B2, data.positions, 0, VOCABULARY, data.draw.key)
    return rtd_plain.generator_step(
        weights,
        network or network_section(LAYERS),
        data.masked_ids,
        data.mask,
        data.positions,
        data.valid,
        data.targets,
        noise,
        data.draw.temperature,
    )


def assert_gradients_equal(network, weights, padding_row_from_lookup=None):
    """Compare every gradient; tables do not learn their padding row through the lookup."""
    for name, parameter in network.named_parameters():
        expected = weights[name].grad
        if name == padding_row_from_lookup:
            expected[0] = 0
        torch.testing.assert_close(
            parameter.grad, expected, **ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_generator_step_equals_the_plain_form(backend):
    data = batch(length=12)
    model = model_section(attention_backend=backend)
    ours = generator(torch.float64, LAYERS, model=model)
    weights = leaves(ours)
    out, expected = ours(*data.generator_arguments()), plain_generator(weights, data)
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, **ROUNDING)
    assert torch.equal(out.drawn_BK[data.valid], expected.drawn[data.valid])
    assert out.correct_sum == expected.correct
    out.loss_sum.backward()
    expected.loss_sum.backward()
    assert_gradients_equal(ours, weights)


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_discriminator_step_equals_the_plain_form(backend):
    data, base = batch(length=12), generator(torch.float64, LAYERS)
    data.ids[0, 4] = (
        0  # [PAD] drawn as a replacement: a token like any other, but it learns nothing
    )
    ours = discriminator(torch.float64, LAYERS, model=model_section(attention_backend=backend))
    weights, base_weights = leaves(ours), leaves(base)
    out = ours(data.ids, base.token_embeddings(data.ids), data.mask, LABELS, None)
    expected = rtd_plain.discriminator_step(
        base_weights, weights, network_section(LAYERS), data.ids, data.mask, LABELS
    )
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, **ROUNDING)
    torch.testing.assert_close(out.logits_BL[data.mask], expected.logits[data.mask], **ROUNDING)
    out.loss_sum.backward()
    expected.loss_sum.backward()
    assert_gradients_equal(ours, weights, "deberta.embeddings.word_embeddings._weight")


def test_replaced_token_loss_reaches_delta_and_never_the_generator():
    data, base, ours = batch(), generator(), discriminator()
    labels = torch.zeros(data.ids.shape)
    rtd_loss_weight = 50.0

    def loss():
        rows = base.token_embeddings(data.ids)
        return rtd_loss_weight * ours(data.ids, rows, data.mask, labels, None).loss_sum

    loss().backward()
    assert all(p.grad is None for p in base.parameters())

    # The same network with one untied table E_D = E_G + Delta, learning directly.
    untied = discriminator()
    table = untied.deberta.embeddings.word_embeddings._weight
    table.data += base.deberta.embeddings.word_embeddings.weight.detach()
    untied(data.ids, torch.zeros(*data.ids.shape, 24), data.mask, labels, None).loss_sum.backward()
    delta = ours.deberta.embeddings.word_embeddings._weight
    torch.testing.assert_close(
        delta.grad, rtd_loss_weight * table.grad, rtol=0, atol=2e-5 * delta.grad.abs().max().item()
    )
    assert delta.grad[data.ids[data.mask]].any()


def test_discriminator_follows_the_generators_table():
    data, base, ours = batch(), generator(), discriminator()
    ours.deberta.embeddings.word_embeddings._weight.data.zero_()
    before = ours.encode(data.ids, base.token_embeddings(data.ids), data.mask)
    base.deberta.embeddings.word_embeddings.weight.data += 0.1 * torch.randn(VOCABULARY, 24)
    after = ours.encode(data.ids, base.token_embeddings(data.ids), data.mask)
    assert (before - after)[data.mask].abs().max() > 1e-3


def test_a_small_delta_survives_in_half_precision():
    data = batch()
    base, ours = generator(), discriminator()
    delta = ours.deberta.embeddings.word_embeddings._weight
    delta.data.normal_(std=1e-4, generator=torch.Generator().manual_seed(0))
    seen = []
    ours.bfloat16().deberta.embeddings.LayerNorm.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    rows = base.bfloat16().token_embeddings(data.ids)
    ours.encode(data.ids, rows, data.mask)
    moved = (seen[0] - rows)[data.mask]
    stacked = torch.stack([moved.flatten(), delta[data.ids[data.mask]].float().flatten()])
    assert torch.corrcoef(stacked)[0, 1] > 0.99


def test_positions_reach_the_generators_predictions_through_the_decoder_alone():
    data, ours = batch(), generator()
    ours(*data.generator_arguments()).loss_sum.backward()
    gradient = ours.deberta.embeddings.position_embeddings.weight.grad
    used = data.positions[data.valid].unique()
    assert gradient[used].any(-1).all()
    unused = torch.ones(len(gradient), dtype=torch.bool)
    unused[used] = False
    assert not gradient[unused].any()
    hidden = ours.encode(data.ids, data.mask)
    loss = ours(*data.generator_arguments()).loss_sum
    table = ours.deberta.embeddings.position_embeddings.weight
    table.data = table.data.flip(0)
    assert torch.equal(ours.encode(data.ids, data.mask), hidden)
    assert (ours(*data.generator_arguments()).loss_sum - loss).abs() > 1e-3


def test_every_token_sees_the_state_of_cls():
    head = discriminator().mask_predictions
    hidden = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    before = head(hidden)
    hidden[0, 0] += torch.randn(24, generator=torch.Generator().manual_seed(1))
    after = head(hidden)
    assert ((before - after)[0].abs() > 1e-4).all()
    assert torch.equal(before[1], after[1])


def test_the_heads_have_opposite_orders():
    network = network_section(hidden_size=8, num_attention_heads=2)
    mlm, rtd = MlmHead(network, model_section()), RtdHead(network)
    rtd.dense.load_state_dict(mlm.dense.state_dict())
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    transformed = []
    mlm.LayerNorm.register_forward_hook(lambda m, arguments, out: transformed.append(out))
    rtd.classifier.register_forward_pre_hook(lambda m, arguments: transformed.append(arguments[0]))
    rtd(x)
    table = torch.nn.Embedding(VOCABULARY, 8)
    slots = torch.zeros(1, 5, dtype=torch.int64)
    draw = DrawKey((1, 2), torch.zeros(1, 2, dtype=torch.int64))
    mlm(x, table, slots == 0, slots, slots, draw)
    after_classifier_input, after_norm = transformed
    # dense -> GELU -> LayerNorm has zero mean; LayerNorm -> dense -> GELU has not.
    assert after_norm.mean(-1).abs().max() < 1e-6
    assert after_classifier_input.mean(-1).abs().max() > 1e-2


def test_padding_changes_neither_loss():
    data, base, ours = batch(length=20), generator(torch.float64), discriminator(torch.float64)
    longer = batch(length=20)
    for name in ("ids", "masked_ids"):
        setattr(longer, name, torch.nn.functional.pad(getattr(data, name), (0, 5), value=17))
    longer.mask = torch.nn.functional.pad(data.mask, (0, 5))
    short, long = (base(*b.generator_arguments()) for b in (data, longer))
    torch.testing.assert_close(long.loss_sum, short.loss_sum, **ROUNDING)
    assert torch.equal(long.drawn_BK[data.valid], short.drawn_BK[data.valid])
    short, long = (
        ours(b.ids, base.token_embeddings(b.ids), b.mask, torch.zeros(b.ids.shape), None).loss_sum
        for b in (data, longer)
    )
    torch.testing.assert_close(long, short, **ROUNDING)
