"""The kernels of the `triton` backend, interpreted: what the matrix of lengths does not show.

Tiles of many shapes, both forms of the products, fp16, fp64 and gradcheck, equal bits, dropout
masks, padding, strides, and the promises of a torch operator.
"""

import pytest
import torch

from pipeline.modeling.kernels import disentangled, serving
from pipeline.modeling.relative_positions import relative_positions
from tests.attention_batches import (
    BUCKETS,
    HEAD_SIZES,
    LAYOUTS,
    MAX_POSITION,
    AttentionBatch,
    assert_no_fallback,
    errors,
)
from tests.interpreting import needs_triton, watch_launches

pytestmark = [needs_triton, pytest.mark.usefixtures("interpreter")]

FP32_ROUNDING = 1e-5


@pytest.mark.parametrize(
    ("layout", "length", "tile", "columns", "heads"),
    [
        ("full", 40, (16, 32), "rows", 2),
        ("full", 41, (32, 16), "distances", 1),
        ("padded", 40, (32, 16), "distances", 1),
        ("padded", 41, (16, 32), "rows", 1),
        ("packed", 40, (16, 32), "distances", 1),
        ("packed", 41, (32, 16), "rows", 1),
    ],
)
def test_many_tiles_and_both_forms_of_the_products(
    layout, length, tile, columns, heads, tiles, monkeypatch, caplog
):
    tiles(*tile)
    monkeypatch.setattr(disentangled, "fewest_columns", lambda table_rows, max_length: columns)
    batch = AttentionBatch(layout, length, 32, torch.float64, heads)
    expected = batch.value_and_gradients("eager", 0.2)
    assert max(errors(batch.value_and_gradients("triton", 0.2), expected)) < 1e-13
    assert_no_fallback(caplog)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_table(layout, tiles, caplog):
    tiles(32)
    batch = AttentionBatch(layout, 40, 32, torch.float64)
    expected = batch.value_and_gradients("eager", 0.2, num_tensors=3)
    found = batch.value_and_gradients("triton", 0.2, num_tensors=3)
    assert max(errors(found, expected)) < 1e-13
    assert_no_fallback(caplog)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, tiles, caplog):
    tiles(16)
    batch = AttentionBatch(layout, 5, 32, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: batch.attend("triton", 0.3, *tensors), batch.tensors, fast_mode=True
    )
    assert_no_fallback(caplog)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_half_precision_stays_near_the_exact_result(head_size, layout, tiles, caplog):
    tiles(64, 128)
    half = AttentionBatch(layout, 100, head_size, torch.float16)
    exact = AttentionBatch(layout, 100, head_size, torch.float64)
    exact.tensors = [t.detach().double().requires_grad_() for t in half.tensors]
    found = half.value_and_gradients("triton", 0.1)
    assert all(each.dtype == torch.float16 for each in found)
    expected = exact.value_and_gradients("eager", 0.1)
    eager = errors(half.value_and_gradients("eager", 0.1), expected)
    # Scores are summed in fp32 where eager rounds each term: no less exact than it.
    for ours, theirs in zip(errors(found, expected), eager, strict=True):
        assert ours < max(theirs, 2 * torch.finfo(torch.float16).eps)
    assert_no_fallback(caplog)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_twice_and_in_any_groups_of_heads(layout, tiles, monkeypatch):
    tiles(64)
    batch = AttentionBatch(layout, 40, 32, heads=2)
    once, again = (batch.value_and_gradients("triton", 0.1) for _ in range(2))
    monkeypatch.setattr(serving.host(), "SCRATCH_BYTES", 1)
    head_by_head = batch.value_and_gradients("triton", 0.1)
    for left, right, alone in zip(once, again, head_by_head, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(left, alone)


def test_no_output_depends_on_memory_that_nobody_wrote(tiles):
    tiles(32)
    for layout in ("full", "packed"):
        batch = AttentionBatch(layout, 41, 32)
        expected = batch.value_and_gradients("triton", 0.1)
        torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
        try:
            found = batch.value_and_gradients("triton", 0.1)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_a_sequence_of_padding_alone_gives_zero(tiles):
    tiles(32)
    batch = AttentionBatch("padded", 40, 32, heads=2)
    batch.mask[1] = False
    context, *gradients = batch.value_and_gradients("triton", 0.1)
    assert not context[:, 1].any()
    assert context[:, 0].any()
    assert all(each.isfinite().all() for each in gradients)
    assert all(not each[1].any() for each in gradients[:3])


@pytest.mark.parametrize("length", [40, 41])
def test_the_keep_mask_is_the_one_of_its_site(length, tiles):
    tiles(16, 32)
    batch = AttentionBatch("full", length, 32, heads=2)
    identity = torch.eye(length, 32)[None, :, None].expand(1, -1, 2, -1)
    tensors = [*batch.tensors[:2], identity, *batch.tensors[3:]]  # shows 32 of the probabilities
    dropped = batch.attend("triton", 0.4, *tensors) == 0
    expected = ~batch.site.keep_mask((2, 1, length, length), 0.4)
    assert torch.equal(dropped, expected[..., :32])


@pytest.mark.parametrize("pass_number", [0, 1])
def test_another_mask_in_either_pass_is_noticed(pass_number, tiles, monkeypatch):
    tiles(32)
    batch = AttentionBatch("full", 40, 32)
    expected = batch.value_and_gradients("eager", 0.1)
    host, calls = serving.host(), []
    drop = host._Pass.drop

    def another_layer(self, heads):
        calls.append(heads)
        right = drop(self, heads)
        return right._replace(layer=right.layer + (len(calls) == pass_number + 1))

    monkeypatch.setattr(host._Pass, "drop", another_layer)
    found = errors(batch.value_and_gradients("triton", 0.1), expected)
    assert len(calls) == 2
    if pass_number == 0:
        assert found[0] > 0.01
    else:
        assert found[0] < FP32_ROUNDING
        assert min(found[1:]) > 0.01


def test_the_operator_compiles_in_one_piece_and_keeps_its_promises(tiles, caplog):
    tiles(32)
    batch = AttentionBatch("padded", 24, 32)
    torch._dynamo.reset()
    compiled = torch.compile(batch.attend, backend="aot_eager", fullgraph=True)
    for attend in (batch.attend, compiled):
        context = attend("triton", 0.1, *batch.tensors)
        found = [context, *torch.autograd.grad((context * batch.weights).sum(), batch.tensors)]
        if attend is not compiled:
            expected = found
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert_no_fallback(caplog)
    query = batch.tensors[0].detach().permute(2, 0, 1, 3).flatten(1, 2)
    table = batch.tensors[3].detach().transpose(0, 1)
    rows_2E = torch.stack((batch.relative.query_rows_E, batch.relative.key_rows_E))
    tables = (table.requires_grad_(), table, rows_2E.to(torch.int16))
    arguments = (query.requires_grad_(), query, query, *tables, None, None, batch.site.words_2)
    torch.library.opcheck(
        torch.ops.deberta.disentangled_attention, (*arguments, 24, False, 0.1, 0.1, 4, 1)
    )


def test_on_meta_tensors_shapes_and_strides_are_those_of_the_kernels():
    batch = AttentionBatch("padded", 24, 32, heads=2)
    batch.tensors = [t.detach().to("meta").requires_grad_() for t in batch.tensors]
    batch.mask, batch.weights = batch.mask.to("meta"), batch.weights.to("meta")
    batch.relative = relative_positions(24, BUCKETS, MAX_POSITION, torch.device("meta"))
    context, *gradients = batch.value_and_gradients("triton", 0.0)
    assert context.shape == (2, 2, 24, 32)
    assert context.permute(1, 2, 0, 3).is_contiguous()  # the output projection reads it in place
    assert [each.shape for each in gradients] == [each.shape for each in batch.tensors]


def test_gradients_of_any_strides_are_read_right(tiles):
    tiles(32)
    batch = AttentionBatch("full", 24, 32, heads=2)
    context = batch.attend("triton", 0.1, *batch.tensors)
    wide = torch.randn(2, 1, 24, 64)
    strided = {
        "expanded": torch.ones(()).expand(context.shape),  # the gradient of a plain sum
        "of every row": torch.randn(32).expand(context.shape),
        "transposed": torch.randn(2, 1, 32, 24).mT,
        "sliced": wide[..., 32:],
    }
    for name, gradient in strided.items():
        found, expected = (
            torch.autograd.grad(context, batch.tensors, each, retain_graph=True)
            for each in (gradient, gradient.contiguous())
        )
        assert gradient.stride() != gradient.contiguous().stride(), name
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), name


def test_inputs_of_any_strides_are_read_right(tiles):
    tiles(32)
    batch = AttentionBatch("full", 24, 32, heads=2)
    expected = batch.value_and_gradients("triton", 0.1)
    for change in (
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),  # heads first in memory
        lambda t: t.mT.contiguous().mT,  # channels apart
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],  # rows apart
    ):
        batch.tensors = [change(t.detach()).requires_grad_() for t in batch.tensors]
        found = batch.value_and_gradients("triton", 0.1)
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_a_second_backward_pass_repeats_the_first_and_a_second_derivative_is_refused(tiles):
    tiles(32)
    batch = AttentionBatch("full", 24, 32)
    refusals = {"triton": "no autograd formula", "torch": "once_differentiable"}
    for backend, refusal in refusals.items():
        context = batch.attend(backend, 0.1, *batch.tensors)
        loss = (context.square() * batch.weights).sum()
        once, again = (
            torch.autograd.grad(loss, batch.tensors, retain_graph=True) for _ in range(2)
        )
        assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
        (twice, *_) = torch.autograd.grad(loss, batch.tensors, create_graph=True)
        with pytest.raises(RuntimeError, match=refusal):
            twice.sum().backward()


def test_kernels_run_on_the_device_of_their_tensors_without_autocast(tiles, monkeypatch):
    tiles(32)
    batch = AttentionBatch("full", 8, 32)
    launches = watch_launches(monkeypatch, serving.host())
    with torch.autocast("cpu", torch.bfloat16):
        batch.value_and_gradients("triton", 0.1)
    assert len(launches) == 9
    assert all(each == ([torch.Size([1, 8, 32])], False) for each in launches)
