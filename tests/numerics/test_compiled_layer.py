"""Compiled functions inside a layer: the same numbers, the same masks, no new graph a step."""

from typing import Literal

import pytest
import torch

from pipeline.config import ModelSection
from pipeline.counter_rng import DropoutKey, dropout
from pipeline.modeling import compiled as module
from pipeline.modeling.compiled import KeptBits, compiled, draw_bits, drop, normalized_sum
from tests.engines import rig, small_config, small_pair
from tests.reference.small_networks import VOCABULARY, batch, discriminator, generator

CPU = torch.device("cpu")
# Dynamo looks at every argument's gradient, and hides the warning where warnings are not errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def key(step):
    return DropoutKey.derive(7, "generator", step, 0, 0, CPU)


class LayerCompiled(ModelSection):
    """[model] with compile = "layer"."""

    compile: Literal["none", "layer"] = "layer"


@pytest.fixture(scope="module")
def graphs():
    """Counts the graphs that are made, and makes them without a C++ compiler."""
    import torch._dynamo
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    count = []

    def backend(graph, _inputs):
        count.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        whole = aot_autograd(fw_compiler=backend, bw_compiler=backend)
        patch.setattr(module, "BACKEND", whole)
        yield count
    compiled.cache_clear()
    torch._dynamo.reset()


def step_results(model, dtype=torch.float32, dropout=None):
    """Losses, draws and all gradients of one micro step of both networks."""
    data, g = batch(), generator(dtype, layers=2, model=model)
    d = discriminator(dtype, layers=2, model=model)
    out = g(*data.generator_arguments(dropout))
    out.loss_sum.backward()
    labels = (torch.arange(data.ids.numel()).view(data.ids.shape) % 3 == 0).float()
    rtd = d(data.ids, g.token_embeddings(data.ids), data.mask, labels, dropout)
    rtd.loss_sum.backward()
    gradients = [p.grad for network in (g, d) for p in network.parameters()]
    return [out.loss_sum.detach(), out.drawn_BK, rtd.logits_BL.detach(), *gradients]


def sections(**choices):
    kinds = (ModelSection, LayerCompiled)
    return [kind(vocab_size=VOCABULARY).model_copy(update=choices) for kind in kinds]


def assert_close(found, expected, tolerance):
    for left, right in zip(found, expected, strict=True):
        limit = tolerance * max(1.0, right.abs().max().item())
        torch.testing.assert_close(left, right, rtol=0, atol=limit)


@pytest.mark.parametrize("p", [0.1, 0.5])
# The large one has halves of words that equal the threshold.
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 3, 8, 8), (64, 4096)])
@pytest.mark.usefixtures("graphs")
def test_drawn_bits_are_the_mask_of_the_site(shape, p):
    site = key(3).site(1 << 16, 2)
    bits = draw_bits(site, shape, p)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (torch.Size(shape).numel() + 7) // 8
    assert torch.equal(KeptBits(bits).keep_mask(shape, p), site.keep_mask(shape, p))
    x = torch.randn(shape)
    assert torch.equal(drop(x, p, site, compiles=True), drop(x, p, site, compiles=False))


@pytest.mark.usefixtures("graphs")
def test_nothing_is_drawn_where_nothing_is_dropped():
    x = torch.randn(3)
    assert drop(x, 0.1, None, compiles=True) is x
    assert drop(x, 0.0, key(0).site(0, 0), compiles=True) is x


@pytest.mark.parametrize(
    ("backend", "dropout"),
    [("torch", None), ("torch", key(3)), ("eager", key(3)), ("triton", key(3))],
)
@pytest.mark.usefixtures("graphs")
def test_the_numbers_are_those_of_the_uncompiled_layer(backend, dropout):
    plain, layer = sections(attention_backend=backend)
    expected = step_results(plain, torch.float64, dropout)
    found = step_results(layer, torch.float64, dropout)
    assert_close(found, expected, 1e-12)


@pytest.mark.usefixtures("graphs")
def test_recomputation_repeats_every_bit():
    kept, *again = (
        step_results(
            LayerCompiled(vocab_size=VOCABULARY, activation_checkpointing=choice), dropout=key(3)
        )
        for choice in ("none", "attention", "full")
    )
    for each in again:
        assert all(torch.equal(left, right) for left, right in zip(kept, each, strict=True))


@pytest.mark.usefixtures("graphs")
def test_autocast_goes_through():
    data, losses = batch(), []
    for model in sections():
        network = generator(layers=1, model=model)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(network(*data.generator_arguments(key(3))).loss_sum)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)


@pytest.mark.usefixtures("graphs")
def test_an_engine_of_zero_3_trains_the_same(world):
    """Its weights are there only while the module that owns them is called."""
    found = []
    for choice in ("none", "layer"):
        config = small_config()
        model = config.model.model_copy(update={"compile": choice})
        pair = small_pair(config=config.model_copy(update={"model": model}))
        one = rig(world, pair=pair, stage=3)
        found.append([one.run(step).sums for step in range(2)])
    for plain, compiled_sums in zip(*found, strict=True):
        torch.testing.assert_close(compiled_sums, plain, rtol=1e-5, atol=0)


def test_a_step_of_another_key_and_of_another_layer_makes_no_new_graph(graphs):
    _, layer = sections()
    first = step_results(layer, dropout=key(0))
    made = len(graphs)
    assert made > 0
    second = step_results(layer, dropout=key(1))
    assert len(graphs) == made
    assert not torch.equal(first[0], second[0])
    assert torch.equal(step_results(layer, dropout=key(0))[0], first[0])


def test_each_shape_has_a_graph_of_its_own_and_many_are_allowed(graphs):
    def double(x):
        return 2 * x

    made = len(graphs)
    for length in range(2, 14):
        assert torch.equal(compiled(double)(torch.ones(length)), torch.full((length,), 2.0))
    assert len(graphs) == made + 12


@pytest.mark.usefixtures("graphs")
def test_a_function_that_needs_two_graphs_raises():
    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(Exception, match="graph_break"):
        compiled(breaks)(torch.ones(2))


def test_inductor_gives_the_same_numbers_on_this_processor():
    """The compiler that training has; the others above only trace."""
    torch._dynamo.reset()
    compiled.cache_clear()
    x, residual = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 3, 24)
    weight, bias = torch.randn(24), torch.randn(24)
    site = key(3).site(1, 2)
    bits = draw_bits(site, x.shape, 0.1)
    assert torch.equal(KeptBits(bits).keep_mask(x.shape, 0.1), site.keep_mask(x.shape, 0.1))
    found = normalized_sum(x, residual, weight, bias, 1e-5, bits, 0.1)
    summed = residual + dropout(x, 0.1, site)
    expected = torch.nn.functional.layer_norm(summed, (24,), weight, bias, 1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    gradient = torch.randn(2, 3, 24)
    ours, theirs = (torch.autograd.grad(each, x, gradient)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
