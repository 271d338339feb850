"""Every kind of encoder against transformers and the authors' one: values and gradients.

Encoder level: both sides get the same embedded tokens, zero at padding as embeddings are, and the
same weights, all of them random. Loading is strict, so that the parameter names are held too.
"""

import pytest
import torch

from pipeline.modeling.encoder import Encoder
from tests.reference import released_encoder, transformers_encoder
from tests.reference.plain_encoder import bucket
from tests.reference.small_networks import (
    VOCABULARY,
    batch,
    model_section,
    network_section,
    scramble,
)

FP32_TOLERANCE = 1e-5
FP64_TOLERANCE = 1e-10
ABSOLUTE = {"relative_attention": False, "position_biased_input": True}
FAR = {"max_position_embeddings": 64, "max_relative_positions": 16}
LIKE_TRANSFORMERS = {"relative_position_rule": "transformers"}
VARIANTS = {
    "v3": {},
    "tanh": {"conv_kernel_size": 3, "conv_act": "tanh"},
    "gelu": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "relu": {"conv_kernel_size": 5, "conv_act": "relu"},
    "absolute": ABSOLUTE,
    "absolute-conv": {**ABSOLUTE, "conv_kernel_size": 3},
    "far-clamp": FAR,
    "far-transformers": {**FAR, **LIKE_TRANSFORMERS},
    "far-conv": {**FAR, "conv_kernel_size": 3},
}
LENGTH = 40  # longer than 16 and, but for "far", than the 32 positions of the small networks


@pytest.fixture
def released():
    with released_encoder.loaded() as module:
        yield module


def encoder(name, dtype=torch.float64, backend="torch", layers=3, seed=1, **model):
    model = model_section(attention_backend=backend, **model)
    network = network_section(layers, **VARIANTS[name])
    return scramble(Encoder(network, model), seed).to(dtype), network


def embedded(dtype, length=LENGTH, width=24):
    mask = batch(length).mask
    states = torch.randn(3, length, width, generator=torch.Generator().manual_seed(5))
    return (states * mask[:, :, None]).to(dtype), mask


def given_positions(network, length=LENGTH):
    """Bucketed distances for an encoder that does not clamp by itself; None to let it be."""
    if not network.relative_attention or network.relative_position_rule == "transformers":
        return None
    sizes = network.position_buckets, network.last_relative_position + 1
    return torch.tensor([[[bucket(i - j, *sizes) for j in range(length)] for i in range(length)]])


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, FP32_TOLERANCE), (torch.float64, FP64_TOLERANCE)]
)
def test_equals_transformers(name, backend, dtype, atol):
    ours, network = encoder(name, dtype, backend)
    theirs = transformers_encoder.model(network, VOCABULARY, dtype).encoder
    theirs.load_state_dict(ours.state_dict())
    states, mask = embedded(dtype)
    hidden = ours(states, mask, None)[mask]
    given = given_positions(network)
    expected = theirs(states, mask.long(), relative_pos=given).last_hidden_state[mask]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=atol)
    if dtype == torch.float64:
        weights = torch.sin(torch.arange(hidden.numel(), dtype=dtype)).view_as(hidden)
        (hidden * weights).sum().backward()
        (expected * weights).sum().backward()
        for (parameter, gradient), their in zip(
            gradients(ours).items(), theirs.parameters(), strict=True
        ):
            scale = max(1.0, their.grad.abs().max().item())
            torch.testing.assert_close(
                gradient, their.grad, rtol=0, atol=atol * scale, msg=lambda m, p=parameter: p + m
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_authors_encoder(released, name):
    ours, network = encoder(name, torch.float32)
    theirs = released.BertEncoder(released_encoder.config(network, VOCABULARY)).eval()
    theirs.load_state_dict(ours.state_dict())
    states, mask = embedded(torch.float32)
    with torch.no_grad():
        hidden = ours(states, mask, None)
        expected = theirs(states, mask.long(), relative_pos=given_positions(network))[-1]
    torch.testing.assert_close(hidden[mask], expected[mask], rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.parametrize("rule", ["clamp", "transformers"])
def test_released_bucket_sizes_beyond_their_length(released, rule):
    length, sizes = 600, {"position_buckets": 256, "hidden_size": 6, "intermediate_size": 8}
    network = network_section(
        1,
        **sizes,
        max_position_embeddings=1024,
        max_relative_positions=512,
        relative_position_rule=rule,
    )
    ours = scramble(Encoder(network, model_section()), seed=3)
    theirs = transformers_encoder.model(network, VOCABULARY, torch.float32).encoder
    authors = released.BertEncoder(released_encoder.config(network, VOCABULARY)).eval()
    theirs.load_state_dict(ours.state_dict())
    authors.load_state_dict(ours.state_dict())
    states, mask = embedded(torch.float32, length, width=6)
    with torch.no_grad():
        hidden = ours(states, mask, None)[mask]
        native = theirs(states, mask.long()).last_hidden_state[mask]
        given = given_positions(network, length)
        fed = theirs(states, mask.long(), relative_pos=given).last_hidden_state[mask]
        of_authors = authors(states, mask.long(), relative_pos=given)[-1][mask]
    torch.testing.assert_close(hidden, fed, rtol=0, atol=FP32_TOLERANCE)
    torch.testing.assert_close(hidden, of_authors, rtol=0, atol=FP32_TOLERANCE)
    # The other rule is seen: what transformers does by itself is far from the clamp.
    assert ((hidden - native).abs().max() > 100 * FP32_TOLERANCE) == (rule == "clamp")


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_that_exists_gets_a_gradient(name, decodes, backend):
    ours, network = encoder(name, backend=backend)
    states, mask = embedded(torch.float64)
    positions = batch(LENGTH).positions
    hidden = ours.decode(states, mask, None, positions) if decodes else ours(states, mask, None)
    (hidden * torch.sin(torch.arange(hidden.numel())).view_as(hidden)).sum().backward()
    found = gradients(ours)
    assert all(gradient is not None for gradient in found.values())
    # Plain attention does not see what all keys have in common.
    exempt = "key_proj.bias" if not network.relative_attention else "nothing"
    assert all(g.abs().max() > 1e-9 for name, g in found.items() if exempt not in name)
    assert ("rel_embeddings.weight" in found) == network.relative_attention
    assert ("LayerNorm.weight" in found) == network.relative_attention
    assert ("conv.conv.weight" in found) == (network.conv_kernel_size > 0)


@pytest.mark.parametrize(("name", "learns"), [("far-clamp", False), ("far-transformers", True)])
def test_row_zero_learns_by_the_rule_of_transformers_alone(name, learns):
    ours, _ = encoder(name)
    states, mask = embedded(torch.float64)
    ours(states, mask, None).square().sum().backward()
    learned = ours.rel_embeddings.weight.grad.abs().sum(1) > 0
    assert learned[1:].all()
    assert learned[0] == learns
