"""Dropout as a function of its key: recomputation, backends and sites."""

import pytest
import torch

from pipeline.counter_rng import DropoutKey
from tests.reference.small_networks import batch, discriminator, generator, model_section
from tests.watching import drop_only, saved_elements

CPU = torch.device("cpu")


def key(step=3, network="generator"):
    return DropoutKey.derive(7, network, step, 0, 0, CPU)


def step_results(checkpointing="none", backend="torch", dtype=torch.float32, dropout=None, **sizes):
    """Losses, draws and all gradients of one micro step of both networks."""
    model = model_section(attention_backend=backend, activation_checkpointing=checkpointing)
    data, g = batch(), generator(dtype, model=model, **sizes)
    d = discriminator(dtype, model=model, **sizes)
    out = g(*data.generator_arguments(dropout))
    out.loss_sum.backward()
    labels = (torch.arange(data.ids.numel()).view(data.ids.shape) % 3 == 0).float()
    rtd = d(data.ids, g.token_embeddings(data.ids), data.mask, labels, dropout)
    rtd.loss_sum.backward()
    gradients = [p.grad for network in (g, d) for p in network.parameters()]
    return [out.loss_sum.detach(), out.drawn_BK, rtd.logits_BL.detach(), *gradients]


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("checkpointing", ["attention", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_gives_the_same_bits(checkpointing, backend, dtype):
    plain = step_results("none", backend, dtype, key())
    recomputed = step_results(checkpointing, backend, dtype, key())
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_recomputation_really_recomputes(checkpointing):
    def saved_with(choice):
        model = model_section(activation_checkpointing=choice)
        data, network = batch(length=32), discriminator(layers=6, model=model)
        rows = torch.zeros(*data.ids.shape, 24)
        labels = torch.zeros(data.ids.shape)
        return saved_elements(lambda: network(data.ids, rows, data.mask, labels, key()))

    share = {"attention": 0.8, "full": 0.3}[checkpointing]
    assert saved_with(checkpointing) < share * saved_with("none")


def test_backends_agree_under_dropout():
    eager, sheared = (
        step_results(backend=backend, dtype=torch.float64, dropout=key())
        for backend in ("eager", "torch")
    )
    for left, right in zip(eager, sheared, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)


def test_dropout_is_a_function_of_its_key():
    first, again, other = (step_results(dropout=key(step)) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], step_results(dropout=None)[0])


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_probability_has_an_effect(field):
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    without = step_results(dropout=None)
    none_dropped = step_results(dropout=key(), **zero)
    assert all(torch.equal(a, b) for a, b in zip(without, none_dropped, strict=True))
    some = step_results(dropout=key(), **{**zero, field: 0.2})
    assert not torch.equal(some[0], without[0])
    assert not torch.equal(some[2], without[2])


PROBS, ATTENTION, FEED_FORWARD, TABLE = range(4)
EMBEDDINGS = (1 << 16, 0)
# Two layers: in the generator the second one runs twice, as layers 1 and 2.
SITES = {
    "generator": {
        EMBEDDINGS: (3, 20, 24),
        (0, TABLE): (16, 24),
        (0, PROBS): (3, 3, 20, 20),
        (0, ATTENTION): (3, 20, 24),
        (0, FEED_FORWARD): (3, 20, 24),
        **{(n, TABLE): (16, 24) for n in (1, 2)},
        **{(n, PROBS): (3, 3, 3, 20) for n in (1, 2)},
        **{(n, where): (3, 3, 24) for n in (1, 2) for where in (ATTENTION, FEED_FORWARD)},
    },
    "discriminator": {
        EMBEDDINGS: (3, 20, 24),
        **{(n, TABLE): (16, 24) for n in range(2)},
        **{(n, PROBS): (3, 3, 20, 20) for n in range(2)},
        **{(n, where): (3, 20, 24) for n in range(2) for where in (ATTENTION, FEED_FORWARD)},
    },
}


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("network", SITES)
def test_every_site_is_used_once_and_matters(monkeypatch, network, backend):
    model, data = model_section(attention_backend=backend), batch()
    if network == "generator":
        module, arguments = generator(layers=2, model=model), data.generator_arguments(key())
    else:
        module = discriminator(layers=2, model=model)
        rows = torch.zeros(*data.ids.shape, 24)
        arguments = (data.ids, rows, data.mask, torch.zeros(data.ids.shape), key())
    seen = []

    def loss_where_only(dropped):
        watched = drop_only(monkeypatch, dropped)
        loss = module(*arguments).loss_sum.item()
        seen[:] = watched
        return loss

    undropped = loss_where_only(None)
    assert len(seen) == len(SITES[network])
    assert dict(seen) == SITES[network]
    losses = [loss_where_only(site) for site in SITES[network]]
    assert undropped not in losses
    assert len(set(losses)) == len(losses)
