"""Attention: brute force against `eager`, `eager` against `torch`, values, gradients and bits."""

import math

import pytest
import torch

from pipeline.counter_rng import DropoutKey
from pipeline.modeling.attention import KeySide, disentangled_attention
from pipeline.modeling.relative_positions import relative_positions
from tests.reference.plain_encoder import attention_logits

CPU = torch.device("cpu")
HEADS, BATCH, LENGTH, SIZE, BUCKETS, MAX_POSITION = 2, 3, 13, 4, 4, 11
POSITIONS = torch.tensor([[3, 12, 0, 0], [1, 2, 7, 11], [5, 4, 0, 9]])  # unsorted, with repeats
MASK = torch.arange(LENGTH) < torch.tensor([LENGTH, 8, 5])[:, None]
FP32_ROUNDING = 2e-6


def inputs(dtype, length=LENGTH, num_queries=None, seed=0, max_position=MAX_POSITION):
    generator = torch.Generator().manual_seed(seed)
    num_queries = num_queries or length
    shapes = [
        (HEADS, BATCH, num_queries, SIZE),
        (HEADS, BATCH, length, SIZE),
        (HEADS, BATCH, length, SIZE),
        (HEADS, 2 * BUCKETS, SIZE),
        (HEADS, 2 * BUCKETS, SIZE),
    ]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    relative = relative_positions(length, BUCKETS, max_position, CPU)
    return [t.to(dtype).requires_grad_() for t in tensors], relative


def attend(backend, tensors, relative, mask=MASK, dropout_p=0.0, site=None):
    query, *keys = tensors
    return disentangled_attention(backend, query, KeySide(*keys), relative, mask, dropout_p, site)


def value_and_gradients(backend, tensors, *args, **kwargs):
    context = attend(backend, tensors, *args, **kwargs)
    weights = torch.sin(torch.arange(context.numel())).view(context.shape).to(context.dtype)
    return [context, *torch.autograd.grad((context * weights).sum(), tensors)]


def test_eager_equals_a_double_loop_over_pairs():
    tensors, relative = inputs(torch.float64)
    query, key, value, rel_key, rel_query = tensors
    ours = attend("eager", tensors, relative, mask=None)
    for head in range(HEADS):
        for sequence in range(BATCH):
            logits = attention_logits(
                query[head, sequence],
                key[head, sequence],
                rel_key[head],
                rel_query[head],
                BUCKETS,
                MAX_POSITION,
            )
            expected = torch.softmax(logits, -1) @ value[head, sequence]
            torch.testing.assert_close(ours[head, sequence], expected, rtol=0, atol=1e-12)


def test_position_to_content_reads_the_row_of_query_minus_key():
    # Content is silent but for K_j . Qr: the paper's index, j - i, would mirror this pattern.
    tensors, relative = inputs(torch.float64)
    query, key, value, rel_key, rel_query = (torch.zeros_like(t) for t in tensors)
    key[..., 0] = 1.0
    rel_query[:, BUCKETS + 2, 0] = 50.0  # the row of i - j = 2
    value[..., 0] = torch.arange(LENGTH)
    for backend in ("eager", "torch"):
        context = attend(backend, [query, key, value, rel_key, rel_query], relative, mask=None)
        assert context[0, 0, 9, 0].item() == pytest.approx(7.0, abs=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("positions", [None, POSITIONS])
@pytest.mark.parametrize("mask", [None, MASK])
def test_backends_agree_in_values_and_gradients(dropout_p, positions, mask):
    num_queries = None if positions is None else positions.shape[1]
    for dtype, atol in ((torch.float32, FP32_ROUNDING), (torch.float64, 1e-14)):
        tensors, relative = inputs(dtype, num_queries=num_queries)
        relative = relative if positions is None else relative.at(positions)
        site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 0)
        eager, sheared = (
            value_and_gradients(backend, tensors, relative, mask, dropout_p, site)
            for backend in ("eager", "torch")
        )
        for left, right in zip(eager, sheared, strict=True):
            assert left.abs().max() > 0
            torch.testing.assert_close(right, left, rtol=0, atol=atol * left.abs().max().item())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("num_queries", [LENGTH, 4])
@pytest.mark.parametrize("mask", [None, MASK])
def test_backends_agree_without_a_table(dropout_p, num_queries, mask):
    for dtype, atol in ((torch.float32, FP32_ROUNDING), (torch.float64, 1e-14)):
        tensors = inputs(dtype, num_queries=num_queries)[0][:3]
        site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 0)
        eager, plain = (
            value_and_gradients(backend, tensors, None, mask, dropout_p, site)
            for backend in ("eager", "torch")
        )
        for left, right in zip(eager, plain, strict=True):
            assert left.abs().max() > 0
            torch.testing.assert_close(right, left, rtol=0, atol=atol * left.abs().max().item())


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_without_a_table_it_is_the_attention_of_torch(backend, mask):
    # Heads of 4: the root is exact, so that its rounding to fp32 does not show.
    query, key, value = tensors = inputs(torch.float64)[0][:3]
    batch_first = [t.transpose(0, 1) for t in (query, key, value)]
    keys_B11L = None if mask is None else mask[:, None, None, :]
    theirs = torch.nn.functional.scaled_dot_product_attention(*batch_first, attn_mask=keys_B11L)
    context, *gradients = value_and_gradients(backend, tensors, None, mask)
    torch.testing.assert_close(context, theirs.transpose(0, 1), rtol=0, atol=1e-14)
    weights = torch.sin(torch.arange(context.numel())).view(context.shape).to(context.dtype)
    expected = torch.autograd.grad((theirs.transpose(0, 1) * weights).sum(), tensors)
    for left, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


def test_gradcheck_without_a_table():
    tensors = inputs(torch.float64, num_queries=4)[0][:3]
    site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 0)
    assert torch.autograd.gradcheck(
        lambda *t: attend("torch", t, None, MASK, 0.3, site), tensors, fast_mode=True
    )


def test_both_backends_drop_the_same_probabilities():
    tensors, relative = inputs(torch.float64)
    site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 0)
    identity = torch.eye(LENGTH, dtype=torch.float64).expand(HEADS, BATCH, -1, -1)
    tensors[2] = identity  # values that show the probabilities themselves
    zeros = [attend(b, tensors, relative, None, 0.4, site) == 0 for b in ("eager", "torch")]
    assert torch.equal(*zeros)
    assert 0.3 < zeros[0].double().mean() < 0.5


@pytest.mark.parametrize("length", [1, 2, 3, 7, 40])
def test_backends_agree_at_every_length(length):
    tensors, relative = inputs(torch.float64, length)
    for left, right in zip(
        *(value_and_gradients(b, tensors, relative, None) for b in ("eager", "torch")), strict=True
    ):
        torch.testing.assert_close(right, left, rtol=0, atol=1e-13)


@pytest.mark.parametrize("positions", [None, POSITIONS])
def test_gradcheck_of_the_hand_written_backward(positions):
    num_queries = None if positions is None else positions.shape[1]
    tensors, relative = inputs(torch.float64, num_queries=num_queries)
    relative = relative if positions is None else relative.at(positions)
    site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 0)
    assert torch.autograd.gradcheck(
        lambda *t: attend("torch", t, relative, MASK, 0.3, site), tensors, fast_mode=True
    )


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_exact_result(backend, dtype):
    tensors, relative = inputs(dtype)
    exact = value_and_gradients(
        "eager", [t.double().detach().requires_grad_() for t in tensors], relative
    )
    rounded = value_and_gradients(backend, tensors, relative)
    # A few roundings of 2^-9 (bf16) or 2^-12 (fp16) of the largest magnitude each.
    tolerance = 8 * torch.finfo(dtype).eps
    for left, right in zip(exact, rounded, strict=True):
        assert right.dtype == dtype
        error = (right.double() - left).abs().max() / left.abs().max()
        assert error < tolerance


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_table", [True, False])
def test_a_sequence_of_padding_alone_gives_zero_and_no_nan(backend, dtype, has_table):
    tensors, relative = inputs(dtype)
    if not has_table:
        tensors, relative = tensors[:3], None
    mask = MASK.clone()
    mask[1] = False
    context, *gradients = value_and_gradients(backend, tensors, relative, mask)
    assert not context[:, 1].any()
    assert context[:, 0].any()
    assert all(g.isfinite().all() for g in gradients)
    assert all(not g[:, 1].any() for g in gradients[:3])


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_masked_keys_neither_matter_nor_learn(backend):
    tensors, relative = inputs(torch.float32)
    before = value_and_gradients(backend, tensors, relative)
    changed = [t.detach().clone() for t in tensors]
    changed[1][:, 1, 8:] = 100.0
    changed[2][:, 1, 8:] = 100.0
    after = value_and_gradients(backend, [t.requires_grad_() for t in changed], relative)
    assert torch.equal(before[0], after[0])
    assert not before[2][:, 1, 8:].any()
    assert not before[3][:, 1, 8:].any()


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_large_fp16_products_do_not_overflow(backend):
    tensors, relative = inputs(torch.float16)
    large = [(t * 60).detach() for t in tensors]
    assert (large[0].double() @ large[1].double().mT).abs().max() > 25_000
    assert attend(backend, large, relative).isfinite().all()


@pytest.mark.parametrize("length", [32, 70])
def test_row_zero_of_the_table_gets_no_gradient_under_the_clamp(length):
    tensors, relative = inputs(torch.float32, length, max_position=32)
    for backend in ("eager", "torch"):
        gradients = value_and_gradients(backend, tensors, relative, None)[1:]
        for table in gradients[3:]:
            assert not table[:, 0].any()
            assert table[:, 1:].abs().sum(-1).all()


def test_the_torch_backend_compiles():
    tensors, relative = inputs(torch.float32)

    def compiled_part(query, key, value, rel_key, rel_query):
        return attend("torch", (query, key, value, rel_key, rel_query), relative)

    compiled = torch.compile(compiled_part, backend="aot_eager", fullgraph=True)
    weights = torch.randn(HEADS, BATCH, LENGTH, SIZE)
    for run in (compiled, compiled_part):
        context = run(*tensors)
        gradients = torch.autograd.grad((context * weights).sum(), tensors)
        if run is compiled:
            expected = [context, *gradients]
    for left, right in zip(expected, [context, *gradients], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_the_scale_has_one_part_for_each_of_three_terms():
    tensors, relative = inputs(torch.float64)
    query, key, value, rel_key, rel_query = tensors
    silent = [torch.zeros_like(rel_key), torch.zeros_like(rel_query)]
    ours = attend("eager", [query, key, value, *silent], relative, mask=None)
    expected = torch.softmax(query @ key.mT / math.sqrt(3 * SIZE), -1) @ value
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
