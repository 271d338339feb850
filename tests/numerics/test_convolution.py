"""The convolution of DeBERTa-v2-xlarge by itself: every row, gradients, dropout, recomputation."""

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import ConvLayer

from pipeline.counter_rng import DropoutKey
from pipeline.modeling.convolution import Convolution
from pipeline.modeling.encoder import Encoder
from tests.reference import transformers_encoder
from tests.reference.small_networks import (
    VOCABULARY,
    batch,
    model_section,
    network_section,
    scramble,
)
from tests.watching import saved_elements

CPU = torch.device("cpu")


def inputs(dtype=torch.float64):
    data, generator = batch(), torch.Generator().manual_seed(3)
    embedded, output = (torch.randn(3, 20, 24, generator=generator) for _ in range(2))
    return (embedded * data.mask[:, :, None]).to(dtype), output.to(dtype), data.mask


@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_equals_the_layer_of_transformers_at_every_row_padding_included(activation, kernel):
    network = network_section(conv_kernel_size=kernel, conv_act=activation)
    ours = scramble(Convolution(network), seed=4).double()
    config = transformers_encoder.model(network, VOCABULARY, torch.float64).config
    theirs = ConvLayer(config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    embedded, output, mask = inputs()
    leaves = [t.requires_grad_() for t in (embedded, output)]
    result, expected = ours(*leaves, mask, None), theirs(*leaves, mask.long())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert not result[~mask].any()
    weights = torch.sin(torch.arange(result.numel())).view_as(result)
    mine, their = (
        torch.autograd.grad((out * weights).sum(), [*leaves, *module.parameters()])
        for out, module in ((result, ours), (expected, theirs))
    )
    for left, right in zip(mine, their, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_dropout_comes_before_the_activation():
    # tanh saturates at 1: what dropout scales by 2 before it stays 1, and would be 2 behind it.
    network = network_section(conv_kernel_size=1, conv_act="tanh", hidden_dropout_prob=0.5)
    module = scramble(Convolution(network), seed=4).double()
    torch.nn.init.zeros_(module.conv.weight)
    torch.nn.init.constant_(module.conv.bias, 20.0)
    module.LayerNorm = torch.nn.Identity()
    embedded, output, _ = inputs()
    key = DropoutKey.derive(7, "generator", 3, 0, 0, CPU)
    added = module(embedded, output, None, key) - output
    kept = key.site(0, 4).keep_mask(added.shape, 0.5)
    torch.testing.assert_close(added, kept.double(), rtol=0, atol=1e-12)
    assert 0.4 < kept.double().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decodes", [False, True])
def test_recomputation_gives_the_same_bits(decodes, dtype):
    key = DropoutKey.derive(7, "generator", 3, 0, 0, CPU)
    results = []
    for choice in ("none", "full"):
        network = network_section(conv_kernel_size=3)
        module = Encoder(network, model_section(activation_checkpointing=choice))
        module = scramble(module, seed=4).to(dtype)
        embedded, _, mask = inputs(dtype)
        embedded.requires_grad_()
        arguments = (embedded, mask, key)
        positions = batch().positions
        hidden = module.decode(*arguments, positions) if decodes else module(*arguments)
        assert hidden.dtype == dtype
        hidden.float().square().sum().backward()
        results.append([hidden, embedded.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_whole_layer_is_recomputed_with_the_convolution():
    def saved_with(kernel, choice):
        network = network_section(conv_kernel_size=kernel)
        module = Encoder(network, model_section(activation_checkpointing=choice))
        embedded, _, mask = inputs(torch.float32)
        return saved_elements(lambda: module(embedded.requires_grad_(), mask, None))

    activations = 3 * 20 * 24
    without, kept = saved_with(0, "full"), saved_with(3, "none") - saved_with(0, "none")
    # Two inputs and the mask are kept; the convolved, activated and normalized states are not.
    assert saved_with(3, "full") - without <= 2 * activations + 3 * 20
    assert kept > 3 * activations
