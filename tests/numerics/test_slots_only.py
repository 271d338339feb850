"""`Encoder.decode` without the enhanced mask decoder is `Encoder.forward`, read at the slots."""

import pytest
import torch

from pipeline.counter_rng import DropoutKey
from pipeline.modeling.encoder import Encoder
from tests.reference.small_networks import batch, model_section, network_section, scramble
from tests.watching import drop_only

CPU = torch.device("cpu")
ABSOLUTE = {"relative_attention": False, "position_biased_input": True}
VARIANTS = {
    "v3": (3, {}),
    "one-layer": (1, {}),
    "one-absolute-layer": (1, ABSOLUTE),
    "conv": (2, {"conv_kernel_size": 3}),
    "absolute": (3, ABSOLUTE),
    "far": (2, {"max_relative_positions": 8, "relative_position_rule": "transformers"}),
}
PROBS, ATTENTION, FEED_FORWARD, TABLE, CONVOLUTION = range(5)


def build(name, **model):
    layers, changes = VARIANTS[name]
    module = Encoder(network_section(layers, **changes), model_section(**model))
    return scramble(module, seed=1).double()


def states():
    data = batch()
    hidden = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(2))
    return (hidden * data.mask[:, :, None]).double().requires_grad_(), data


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_are_those_of_the_whole_pass(name, backend, checkpointing):
    module = build(name, attention_backend=backend, activation_checkpointing=checkpointing)
    hidden, data = states()
    rows = torch.arange(3)[:, None]
    outputs = [
        module(hidden, data.mask, None)[rows, data.positions],
        module.decode(hidden, data.mask, None, data.positions),
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    weights = torch.sin(torch.arange(outputs[0].numel())).view_as(outputs[0])
    whole, slots = (
        torch.autograd.grad((output * weights).sum(), [hidden, *module.parameters()])
        for output in outputs
    )
    for left, right in zip(whole, slots, strict=True):
        scale = max(1.0, left.abs().max().item())
        torch.testing.assert_close(right, left, rtol=0, atol=1e-12 * scale)


def test_the_enhanced_mask_decoder_is_something_else():
    module, (hidden, data) = build("v3"), states()
    once = module.decode(hidden, data.mask, None, data.positions)
    twice = module.decode(hidden, data.mask, None, data.positions, torch.zeros_like(once))
    assert (once - twice).abs().max() > 0.01


def layer_sites(layer, rows, table=True):
    """Sites of a layer whose queries are `rows`, with the shapes of their masks."""
    sites = {
        (layer, PROBS): (3, 3, rows, 20),
        (layer, ATTENTION): (3, rows, 24),
        (layer, FEED_FORWARD): (3, rows, 24),
    }
    return {**sites, (layer, TABLE): (16, 24)} if table else sites


# Three slots: the last layer draws for three rows, and its number is used once.
SITES = {
    "v3": layer_sites(0, 20) | layer_sites(1, 20) | layer_sites(2, 3),
    "one-layer": layer_sites(0, 3),
    "conv": layer_sites(0, 20) | {(0, CONVOLUTION): (3, 20, 24)} | layer_sites(1, 3),
    "absolute": layer_sites(0, 20, False) | layer_sites(1, 20, False) | layer_sites(2, 3, False),
}


@pytest.mark.parametrize("name", SITES)
def test_every_dropout_site_is_used_once_and_matters(monkeypatch, name):
    module, (hidden, data) = build(name), states()
    key = DropoutKey.derive(7, "generator", 3, 0, 0, CPU)
    seen = []

    def output_where_only(dropped):
        watched = drop_only(monkeypatch, dropped)
        total = module.decode(hidden, data.mask, key, data.positions).square().sum().item()
        seen[:] = watched
        return total

    undropped = output_where_only(None)
    assert len(seen) == len(SITES[name])
    assert dict(seen) == SITES[name]
    outputs = {output_where_only(site) for site in SITES[name]}
    assert undropped not in outputs
    assert len(outputs) == len(SITES[name])
