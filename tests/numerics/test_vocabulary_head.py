"""The chunked head against cross entropy on logits that are held whole."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pipeline.modeling.vocabulary_head import CHUNK_IDS, vocabulary_head
from pipeline.rtd import DrawKey, gumbel_noise

B, K, D, V = 2, 5, 8, 61
VALID = torch.tensor([[True] * 5, [True, True, False, True, False]])
DRAW = DrawKey((5, 6), torch.tensor([[0, 1], [0, 2]]), temperature=0.7)
POSITIONS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 0, 6, 0]])
CHUNKS = [4, 16, 60, 64, 16_384]


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, table, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((B, K, D), (V, D), (V,))
    )
    targets = torch.randint(V, (B, K), generator=generator)
    return hidden, table, bias, targets


def head(hidden, table, bias, targets, chunk_ids=16, draw=DRAW):
    return vocabulary_head(hidden, table, bias, VALID, targets, POSITIONS, draw, chunk_ids)


def plain(hidden, table, bias, targets):
    logits = hidden @ table.mT + bias
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return logits, (losses * VALID.flatten()).sum()


@pytest.mark.parametrize("chunk_ids", CHUNKS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_plain_cross_entropy_in_value_and_gradients(chunk_ids, dtype, rtol):
    *weights, targets = inputs(dtype)
    _, expected = plain(*weights, targets)
    out = head(*weights, targets, chunk_ids)
    torch.testing.assert_close(out.loss_sum, expected, rtol=rtol, atol=0)
    ours = torch.autograd.grad(3.0 * out.loss_sum, weights)
    theirs = torch.autograd.grad(3.0 * expected, weights)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=rtol * right.abs().max().item())


def test_gradcheck():
    *weights, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *w: head(*w, targets).loss_sum, weights)


@pytest.mark.parametrize("chunk_ids", CHUNKS)
def test_draws_and_accuracy_equal_the_whole_softmax(chunk_ids):
    *weights, targets = inputs(torch.float32)
    logits, _ = plain(*weights, targets)
    targets[0, :3] = logits[0, :3].argmax(-1)  # make some predictions right
    out = head(*weights, targets, chunk_ids)
    noise = gumbel_noise(DRAW.sample_words_B2, POSITIONS, 0, V, DRAW.key)
    assert torch.equal(out.drawn_BK, (logits / 0.7 + noise).argmax(-1))
    assert out.correct_sum == ((logits.argmax(-1) == targets) & VALID).sum()
    assert out.correct_sum >= 3


@pytest.mark.parametrize("chunk_ids", CHUNKS)
@pytest.mark.parametrize("allowed", [range(4, 60), range(5, 18), range(60, 61)])
def test_forbidden_ids_leave_the_draws_alone(chunk_ids, allowed):
    *weights, targets = inputs(torch.float32)
    logits, _ = plain(*weights, targets)
    free = head(*weights, targets, chunk_ids)
    out = head(*weights, targets, chunk_ids, replace(DRAW, allowed_ids=allowed))
    noise = gumbel_noise(DRAW.sample_words_B2, POSITIONS, 0, V, DRAW.key)
    scores = (logits / 0.7 + noise)[..., allowed.start : allowed.stop]
    assert torch.equal(out.drawn_BK, scores.argmax(-1) + allowed.start)
    assert torch.equal(out.loss_sum, free.loss_sum), "forbidden ids stay in the softmax"
    assert torch.equal(out.correct_sum, free.correct_sum)
    ours, theirs = (torch.autograd.grad(each.loss_sum, weights) for each in (out, free))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_a_key_nothing_is_drawn_and_no_noise_is_computed(monkeypatch):
    *weights, targets = inputs(torch.float32)
    drawing = head(*weights, targets)
    monkeypatch.setattr("pipeline.modeling.vocabulary_sums.gumbel_noise", None)
    out = head(*weights, targets, draw=None)
    assert out.drawn_BK is None
    assert torch.equal(out.loss_sum, drawing.loss_sum)
    assert torch.equal(out.correct_sum, drawing.correct_sum)
    ours, theirs = (torch.autograd.grad(each.loss_sum, weights) for each in (out, drawing))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_draws_follow_the_softmax_at_the_temperature():
    slots = 40_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5])
    positions = torch.arange(slots)[None]
    draw = DrawKey((1, 2), torch.tensor([[0, 1]]), temperature=2.0)
    valid = torch.ones(1, slots, dtype=torch.bool)
    targets = torch.zeros(1, slots, dtype=torch.int64)
    hidden, table = torch.ones(1, slots, 1), torch.zeros(6, 1)
    out = vocabulary_head(hidden, table, logits, valid, targets, positions, draw, 4)
    observed = torch.bincount(out.drawn_BK.flatten(), minlength=6)
    expected = torch.softmax(logits / 2.0, -1) * slots
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_ties_go_to_the_lowest_id():
    hidden, table, bias, targets = inputs(torch.float32)
    silent, one = torch.zeros_like(table), torch.zeros_like(bias)
    one[[7, 30, 31]] = 5.0
    targets[:] = 7
    out = head(hidden, silent, one, targets, chunk_ids=8)
    assert out.correct_sum == VALID.sum()


def test_slots_that_do_not_count_give_no_loss_and_no_gradient():
    *weights, targets = inputs(torch.float32)
    out = head(*weights, targets)
    targets_changed = torch.where(VALID, targets, (targets + 1) % V)
    assert torch.equal(head(*weights, targets_changed).loss_sum, out.loss_sum)
    (d_hidden,) = torch.autograd.grad(out.loss_sum, weights[:1])
    assert not d_hidden[~VALID].any()
    assert d_hidden[VALID].any(-1).all()


def test_no_valid_slot_gives_zero_and_zero_gradients():
    *weights, targets = inputs(torch.float32)
    none = torch.zeros_like(VALID)
    out = vocabulary_head(*weights, none, targets, POSITIONS, DRAW)
    assert out.loss_sum == 0
    assert not any(g.any() for g in torch.autograd.grad(out.loss_sum, weights))


def test_numbers_that_are_not_numbers_still_draw_an_id():
    hidden, table, bias, targets = inputs(torch.float32)
    out = head(hidden * torch.nan, table, bias, targets)
    assert out.loss_sum.isnan()
    assert not out.drawn_BK.any()
    out = head(
        hidden * torch.nan, table, bias, targets, draw=replace(DRAW, allowed_ids=range(4, 9))
    )
    assert (out.drawn_BK == 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_fp32_logits(dtype):
    *weights, targets = inputs(dtype)
    _, expected = plain(*(w.float() for w in weights), targets)
    out = head(*weights, targets)
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(out.loss_sum, weights)
    theirs = torch.autograd.grad(expected, weights)
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps * right.abs().max().item()
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


def test_autocast_does_not_round_logits():
    *weights, targets = inputs(torch.float32)
    expected = head(*weights, targets)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(*weights, targets)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_a_vocabulary_of_several_default_chunks():
    ids, slot = CHUNK_IDS + 5, torch.zeros(1, 1, dtype=torch.int64)
    bias = torch.zeros(ids).index_fill(0, torch.tensor([ids - 1]), 100.0)
    arguments = torch.zeros(1, 1, 2), torch.zeros(ids, 2), bias, slot == 0, slot + ids - 1, slot
    out = vocabulary_head(*arguments, DrawKey((1, 2), torch.tensor([[0, 1]])))
    assert (out.loss_sum, out.correct_sum, out.drawn_BK) == (0, 1, ids - 1)


def test_logits_are_never_held_whole():
    slots, ids, width = 64, 40_000, 4
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, slots, width, generator=generator, requires_grad=True)
    table = torch.randn(ids, width, generator=generator, requires_grad=True)
    bias = torch.zeros(ids, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    with Watch():
        valid = torch.ones(1, slots, dtype=torch.bool)
        where = torch.arange(slots)[None]
        out = vocabulary_head(
            hidden, table, bias, valid, where, where, DrawKey((1, 2), torch.tensor([[0, 1]])), 4096
        )
        out.loss_sum.backward()
    assert largest <= max(slots * 4096, ids * width)
