"""Layers with the fused attention, interpreted: compiled or not, recomputed or not."""

import itertools

import pytest
import torch

from pipeline.config import ModelSection
from pipeline.counter_rng import DropoutKey
from pipeline.modeling import compiled as module
from pipeline.modeling.compiled import compiled
from tests.interpreting import needs_triton
from tests.numerics.test_compiled_layer import assert_close
from tests.reference.small_networks import VOCABULARY, batch, discriminator
from tests.watching import saved_elements

# Dynamo looks at every argument's gradient, and hides the warning where warnings are not errors.
pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("interpreter", "graphs"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

HEADS_OF_32 = {"hidden_size": 64, "num_attention_heads": 2, "layers": 1}
COMPILE = ("none", "layer")


@pytest.fixture(scope="module")
def graphs():
    """Graphs that need no C++ compiler."""
    torch._dynamo.reset()
    compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BACKEND", "aot_eager")
        yield
    compiled.cache_clear()
    torch._dynamo.reset()


def network(backend, compile_choice, recomputed):
    words = {
        "attention_backend": backend,
        "compile": compile_choice,
        "activation_checkpointing": recomputed,
    }
    model = ModelSection(vocab_size=VOCABULARY).model_copy(update=words)
    return discriminator(model=model, **HEADS_OF_32)


def logits(of):
    data, key = batch(), DropoutKey.derive(7, "discriminator", 3, 0, 0, torch.device("cpu"))
    rows = torch.zeros(*data.ids.shape, HEADS_OF_32["hidden_size"])
    out = of(data.ids, rows, data.mask, torch.zeros(data.ids.shape), key)
    return out.logits_BL, out.loss_sum


def results(*choices):
    """Logits and all gradients under dropout."""
    of = network(*choices)
    found, loss = logits(of)
    loss.backward()
    return [found.detach(), *(each.grad for each in of.parameters())]


@pytest.fixture(scope="module")
def kept():
    """Both compile modes with nothing recomputed."""
    return {choice: results("triton", choice, "none") for choice in COMPILE}


def test_the_numbers_are_those_of_torch(kept):
    expected = results("torch", "none", "none")
    for found in kept.values():
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("choice", "recomputed"), itertools.product(COMPILE, ("attention", "full"))
)
def test_recomputation_repeats_every_bit(kept, choice, recomputed):
    found = results("triton", choice, recomputed)
    assert all(torch.equal(*pair) for pair in zip(found, kept[choice], strict=True))


def test_the_fused_attention_keeps_no_matrix_of_scores():
    def saved(backend, recomputed):
        return saved_elements(lambda: logits(network(backend, "none", recomputed)))

    fused = saved("triton", "none")
    # Probabilities and a dropout mask of [2, 3, 20, 20] each.
    assert fused <= saved("torch", "none") - 2 * 2 * 3 * 20 * 20 / 2
    assert saved("triton", "full") < fused
