"""Losses, draws and gradients of both networks against the plain re-derivation, in fp64.

Every variant of the networks that a configuration may ask for; `test_fifty_steps.py` trains them.
"""

import pytest
import torch

from pipeline.config import ObjectiveSection
from pipeline.modeling.pair import shared_rows
from tests.reference.plain_encoder import logits_at_once, logits_by_pairs
from tests.reference.plain_judges import discriminator_gap, generator_gap, worst
from tests.reference.small_networks import VOCABULARY, batch, discriminator, generator

FP64_ROUNDING = 1e-9
BACKENDS = ["eager", "torch"]
BERT = {"relative_attention": False, "position_biased_input": True}
NETWORKS = {
    "debertav3": {},
    "position_biased_input": {"position_biased_input": True},
    "bert": BERT,
    "conv_tanh": {"conv_kernel_size": 3, "conv_act": "tanh"},
    "conv_gelu": {"conv_kernel_size": 5, "conv_act": "gelu"},
    "conv_relu": {"conv_kernel_size": 3, "conv_act": "relu"},
    "clamped": {"max_relative_positions": 6, "position_buckets": 4},
    "not_clamped": {
        "max_relative_positions": 6,
        "position_buckets": 4,
        "relative_position_rule": "transformers",
    },
}
NARROW = {
    "narrow": {"embedding_size": 16},
    "electra_small": {"embedding_size": 16, **BERT},
    "narrow_conv": {"embedding_size": 16, "conv_kernel_size": 3},
}
NO_DECODER = ObjectiveSection(enhanced_mask_decoder=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_generator_with_the_mask_decoder(name, backend):
    findings = generator_gap(backend=backend, **NETWORKS[name])
    assert worst(findings) < FP64_ROUNDING, findings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS | NARROW)
def test_generator_without_the_mask_decoder(name, backend):
    network = (NETWORKS | NARROW)[name]
    findings = generator_gap(NO_DECODER, backend, logits_at_once, **network)
    assert worst(findings) < FP64_ROUNDING, findings


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
@pytest.mark.parametrize("rtd_head", ["debertav3", "electra"])
@pytest.mark.parametrize("name", NETWORKS | NARROW)
def test_discriminator(name, rtd_head, sharing):
    objective = ObjectiveSection(
        enhanced_mask_decoder=False, embedding_sharing=sharing, update="joint", rtd_head=rtd_head
    )
    findings = discriminator_gap(objective, "torch", logits_at_once, **(NETWORKS | NARROW)[name])
    assert worst(findings) < FP64_ROUNDING, findings
    reached = [what for what in findings if what.startswith("generator's gradient")]
    names = {"es": 2 if (NETWORKS | NARROW)[name].get("position_biased_input") else 1}
    assert len(reached) == names.get(sharing, 0), "the tables alone are shared, and in es alone"


@pytest.mark.parametrize("name", NETWORKS)
def test_discriminator_by_the_definition_of_attention(name):
    findings = discriminator_gap(backend="eager", **NETWORKS[name])
    assert worst(findings) < FP64_ROUNDING, findings


@pytest.mark.parametrize("rule", ["clamp", "transformers"])
def test_the_reference_s_two_forms_of_the_attention_logits_agree(rule):
    source = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 13, 4, generator=source, dtype=torch.float64)
    rel_key, rel_query = torch.randn(2, 3, 8, 4, generator=source, dtype=torch.float64)
    for tables in ((rel_key, rel_query), (None, None)):
        slow = logits_by_pairs(query, key, *tables, 4, 7, rule)
        fast = logits_at_once(query, key, *tables, 4, 7, rule)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-13)


def test_replaced_token_loss_reaches_delta_and_never_the_generator():
    data, base, ours = batch(), generator(), discriminator()
    labels = torch.zeros(data.ids.shape)
    rtd_loss_weight = 50.0
    rows = shared_rows(base, ours, data.ids)
    (rtd_loss_weight * ours(data.ids, rows, data.mask, labels, None).loss_sum).backward()
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


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
def test_whether_the_discriminator_follows_the_generators_table(sharing):
    objective = ObjectiveSection(embedding_sharing=sharing, update="joint")
    data, base, ours = batch(), generator(), discriminator(objective=objective)
    before = ours.encode(data.ids, shared_rows(base, ours, data.ids), data.mask)
    base.deberta.embeddings.word_embeddings.weight.data += 0.1 * torch.randn(VOCABULARY, 24)
    after = ours.encode(data.ids, shared_rows(base, ours, data.ids), data.mask)
    moved = (before - after)[data.mask].abs().max()
    assert moved > 1e-3 if sharing != "nes" else moved == 0


def test_positions_reach_the_generators_predictions_through_the_decoder_alone():
    data, ours = batch(), generator()
    ours(*data.generator_arguments()).loss_sum.backward()
    gradient = ours.deberta.embeddings.position_embeddings.weight.grad
    used = data.positions[data.valid].unique()
    assert gradient[used].any(-1).all()
    unused = torch.ones(len(gradient), dtype=torch.bool)
    unused[used] = False
    assert not gradient[unused].any()


@pytest.mark.parametrize("network", [{}, BERT, {"conv_kernel_size": 3}])
def test_padding_changes_neither_loss(network):
    data = batch(length=20)
    base = generator(torch.float64, **network)
    ours = discriminator(torch.float64, **network)
    longer = batch(length=20)
    for name in ("ids", "masked_ids"):
        setattr(longer, name, torch.nn.functional.pad(getattr(data, name), (0, 5), value=17))
    longer.mask = torch.nn.functional.pad(data.mask, (0, 5))
    short, long = (base(*b.generator_arguments()) for b in (data, longer))
    torch.testing.assert_close(long.loss_sum, short.loss_sum, rtol=1e-10, atol=1e-11)
    assert torch.equal(long.drawn_BK[data.valid], short.drawn_BK[data.valid])
    short, long = (
        ours(b.ids, shared_rows(base, ours, b.ids), b.mask, torch.zeros(b.ids.shape), None).loss_sum
        for b in (data, longer)
    )
    torch.testing.assert_close(long, short, rtol=1e-10, atol=1e-11)
