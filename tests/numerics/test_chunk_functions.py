"""The vocabulary head as graphs: the same losses, draws, hits and gradients as without them."""

from dataclasses import replace

import pytest
import torch

from pipeline.modeling import compiled as module
from pipeline.modeling.compiled import compiled
from pipeline.modeling.vocabulary_head import vocabulary_head
from pipeline.rtd import DrawKey

V, D = 61, 6  # the last chunk of ids is ragged
POSITIONS = torch.tensor([[1, 5, 9, 30], [2, 3, 4, 0]])
VALID = torch.tensor([[True, True, True, True], [True, True, True, False]])
DRAW = DrawKey((11, 12), torch.tensor([[0, 7], [1, 2**31]]), temperature=0.7)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Graphs are made, but not compiled."""
    compiled.cache_clear()
    monkeypatch.setattr(module, "BACKEND", "aot_eager")
    yield
    compiled.cache_clear()


def inputs(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 4, D), (V, D), (V,))
    weights = [torch.randn(s, generator=random).to(dtype).requires_grad_() for s in shapes]
    return *weights, torch.randint(V, (2, 4), generator=random)


def both(weights, targets, draw=DRAW, chunk_ids=20):
    """(outputs, gradients) without and with graphs."""
    found = []
    for form in ("torch", "compiled"):
        arguments = (*weights, VALID, targets, POSITIONS, draw, chunk_ids, form)
        out = vocabulary_head(*arguments)
        found.append((out, torch.autograd.grad(out.loss_sum, weights)))
    return found


def assert_same(plain, graphs, tolerance):
    assert torch.equal(graphs[0].drawn_BK, plain[0].drawn_BK)
    assert torch.equal(graphs[0].correct_sum, plain[0].correct_sum)
    torch.testing.assert_close(graphs[0].loss_sum, plain[0].loss_sum, rtol=tolerance, atol=0)
    for left, right in zip(graphs[1], plain[1], strict=True):
        assert left.dtype == right.dtype
        limit = tolerance * right.abs().max().item()
        torch.testing.assert_close(left, right, rtol=0, atol=limit)


@pytest.mark.parametrize("chunk_ids", [20, 64])
def test_chunks_of_all_sizes(chunk_ids):
    *weights, targets = inputs()
    assert_same(*both(weights, targets, chunk_ids=chunk_ids), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    *weights, targets = inputs(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert_same(*both(weights, targets, chunk_ids=64), tolerance)


@pytest.mark.parametrize("allowed", [range(4, 60), range(5, 18), range(60, 61)])
def test_forbidden_ids_are_never_drawn(allowed):
    *weights, targets = inputs()
    plain, graphs = both(weights, targets, replace(DRAW, allowed_ids=allowed))
    assert_same(plain, graphs, 1e-6)
    assert all(each in allowed for each in graphs[0].drawn_BK.flatten().tolist())


def test_ties_go_to_the_lowest_id():
    hidden, table, _, targets = inputs()
    # Beside such logits no noise is seen: draws tie too, within a quad and between quads.
    tied = torch.zeros(V).index_fill(0, torch.tensor([7, 10, 13, 14, 31]), 1e30).requires_grad_()
    silent = torch.zeros_like(table).requires_grad_()
    targets[:] = 7
    plain, graphs = both([hidden, silent, tied], targets)
    assert graphs[0].correct_sum == VALID.sum()
    assert (graphs[0].drawn_BK == 7).all()
    assert_same(plain, graphs, 1e-6)


def test_numbers_that_are_not_numbers_still_draw_an_id():
    hidden, *weights, targets = inputs()
    nan = (hidden * torch.nan).detach().requires_grad_()
    plain, graphs = both([nan, *weights], targets, replace(DRAW, allowed_ids=range(4, 9)))
    assert graphs[0].loss_sum.isnan()
    assert torch.equal(graphs[0].drawn_BK, plain[0].drawn_BK)
    assert (graphs[0].drawn_BK == 4).all()


def test_nothing_is_drawn_without_a_key():
    *weights, targets = inputs()
    arguments = (*weights, VALID, targets, POSITIONS, None, 20)
    assert vocabulary_head(*arguments, form="compiled").drawn_BK is None


def test_another_stream_and_another_chunk_make_no_new_graph():
    from torch._dynamo.utils import counters

    *weights, targets = inputs()
    arguments = (*weights, VALID, targets, POSITIONS)
    vocabulary_head(*arguments, DRAW, 20, "compiled")
    made = counters["stats"]["unique_graphs"]
    vocabulary_head(*arguments, replace(DRAW, key=(5, 6)), 20, "compiled")
    assert counters["stats"]["unique_graphs"] == made
