"""The `triton` backend, interpreted on a CPU, and every other backend against `eager`.

Lengths around the edges of a tile, every head size, full, padded, packed, with and without dropout:
values and all five gradients. The interpreter is slow: few sequences and large tiles there.
"""

import importlib.util
import sys

import pytest
import torch

from pipeline.counter_rng import DropoutKey
from pipeline.modeling.attention import (
    KeySide,
    disentangled_attention,
    packed_disentangled_attention,
)
from pipeline.modeling.kernels import disentangled, serving, tile_table
from pipeline.modeling.relative_positions import relative_positions
from tests.interpreting import forget_kernels, interpreted_kernels

CPU = torch.device("cpu")
LENGTHS = (1, 17, 64, 127, 128, 129, 511, 512, 513, 700)
HEAD_SIZES = (32, 64, 128)
LAYOUTS = ("full", "padded", "packed")
BUCKETS, MAX_POSITION = 32, 512
FP32_ROUNDING = 1e-5
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("torch", "triton") if HAS_TRITON else ("torch",)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Kernels are interpreted in this file, and in no other that does not ask for it."""
    with interpreted_kernels():
        yield


@pytest.fixture
def tiles(monkeypatch):
    """Set the interpreter's tiles."""

    def choose(rows, columns=None):
        tile = tile_table.Tile(rows, columns or rows, 1, 1)
        monkeypatch.setattr(tile_table, "INTERPRETED", tile)

    return choose


class Batch:
    """Queries, keys, values and both projections of the table, and how they are laid out."""

    def __init__(self, layout, length, head_size, dtype=torch.float32, heads=1, seed=0):
        self.starts = self.mask = None
        sequences, tokens = 1, length
        if layout == "packed":
            self.starts = torch.tensor([0, 3, 3 + length], dtype=torch.int32)
            tokens = 3 + length
        if layout == "padded":
            sequences = 1 if length > 500 else 2
            lengths = torch.tensor([length - length // 3, length // 2 + 1])[:sequences]
            self.mask = torch.arange(length) < lengths[:, None]
        generator = torch.Generator().manual_seed(seed)
        # As projections leave them: a token's heads side by side.
        rows = (sequences, tokens, heads, head_size)
        table = (2 * BUCKETS, heads, head_size)
        drawn = [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in (rows, rows, rows, table, table, rows)
        ]
        self.tensors = [each.requires_grad_() for each in drawn[:5]]
        self.weights = drawn[5].permute(2, 0, 1, 3)
        self.longest = max(3, length) if layout == "packed" else length
        self.relative = relative_positions(self.longest, BUCKETS, MAX_POSITION, CPU)
        self.site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 1)

    def attend(self, backend, dropout_p, *tensors):
        query, key, value = (t.permute(2, 0, 1, 3) for t in tensors[:3])
        keys = KeySide(key, value, *(t.transpose(0, 1) for t in tensors[3:]))
        relative = self.relative if len(tensors) > 3 else None
        if self.starts is not None:
            return packed_disentangled_attention(
                backend, query, keys, relative, self.starts, dropout_p, self.site, self.longest
            )
        return disentangled_attention(
            backend, query, keys, relative, self.mask, dropout_p, self.site
        )

    def value_and_gradients(self, backend, dropout_p, num_tensors=5):
        tensors = self.tensors[:num_tensors]
        context = self.attend(backend, dropout_p, *tensors)
        return [context, *torch.autograd.grad((context * self.weights).sum(), tensors)]


def errors(ours, theirs):
    """Largest error of each tensor, relative to its largest element, or 0.5: one key has 0."""
    return [
        ((left - right).abs().max() / right.abs().max().clamp(min=0.5)).item()
        for left, right in zip(ours, theirs, strict=True)
    ]


def assert_no_fallback(caplog):
    assert "replaced by torch" not in caplog.text


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_backends_equal_eager(length, head_size, layout, dropout_p, tiles, caplog):
    tiles(128 if length <= 128 else 512 if length in (511, 512) else 256)
    batch = Batch(layout, length, head_size)
    expected = batch.value_and_gradients("eager", dropout_p)
    for backend in BACKENDS:
        found = batch.value_and_gradients(backend, dropout_p)
        assert max(errors(found, expected)) < FP32_ROUNDING, backend
    assert_no_fallback(caplog)


@needs_triton
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
    batch = Batch(layout, length, 32, torch.float64, heads)
    expected = batch.value_and_gradients("eager", 0.2)
    assert max(errors(batch.value_and_gradients("triton", 0.2), expected)) < 1e-13
    assert_no_fallback(caplog)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_table(layout, tiles, caplog):
    tiles(32)
    batch = Batch(layout, 40, 32, torch.float64)
    expected = batch.value_and_gradients("eager", 0.2, num_tensors=3)
    found = batch.value_and_gradients("triton", 0.2, num_tensors=3)
    assert max(errors(found, expected)) < 1e-13
    assert_no_fallback(caplog)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, tiles, caplog):
    tiles(16)
    batch = Batch(layout, 5, 32, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: batch.attend("triton", 0.3, *tensors), batch.tensors, fast_mode=True
    )
    assert_no_fallback(caplog)


@needs_triton
def test_half_precision_stays_near_the_exact_result(tiles, caplog):
    tiles(64)
    half = Batch("padded", 100, 64, torch.float16)
    exact = Batch("padded", 100, 64, torch.float64)
    exact.tensors = [t.detach().double().requires_grad_() for t in half.tensors]
    found = half.value_and_gradients("triton", 0.1)
    assert all(each.dtype == torch.float16 for each in found)
    expected = exact.value_and_gradients("eager", 0.1)
    eager = errors(half.value_and_gradients("eager", 0.1), expected)
    # Scores are summed in fp32 where eager rounds each term: no less exact than it.
    for ours, theirs in zip(errors(found, expected), eager, strict=True):
        assert ours < max(theirs, 2 * torch.finfo(torch.float16).eps)
    assert_no_fallback(caplog)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_twice_and_in_any_groups_of_heads(layout, tiles, monkeypatch):
    tiles(64)
    batch = Batch(layout, 40, 32, heads=2)
    once, again = (batch.value_and_gradients("triton", 0.1) for _ in range(2))
    monkeypatch.setattr(serving.host(), "SCRATCH_BYTES", 1)
    head_by_head = batch.value_and_gradients("triton", 0.1)
    for left, right, alone in zip(once, again, head_by_head, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(left, alone)


@needs_triton
def test_no_output_depends_on_memory_that_nobody_wrote(tiles):
    tiles(32)
    for layout in ("full", "packed"):
        batch = Batch(layout, 41, 32)
        expected = batch.value_and_gradients("triton", 0.1)
        torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
        try:
            found = batch.value_and_gradients("triton", 0.1)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@needs_triton
def test_a_sequence_of_padding_alone_gives_zero(tiles):
    tiles(32)
    batch = Batch("padded", 40, 32, heads=2)
    batch.mask[1] = False
    context, *gradients = batch.value_and_gradients("triton", 0.1)
    assert not context[:, 1].any()
    assert context[:, 0].any()
    assert all(each.isfinite().all() for each in gradients)
    assert all(not each[1].any() for each in gradients[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_of_one_length_have_the_bits_of_a_batch(backend, tiles):
    tiles(32)
    padded = Batch("padded", 24, 32, torch.float64)
    padded.mask[:] = True
    packed = Batch("packed", 24, 32, torch.float64)
    packed.starts = torch.tensor([0, 24, 48], dtype=torch.int32)
    packed.longest, packed.relative = 24, padded.relative
    in_a_row = [t.flatten(0, 1)[None] for t in padded.tensors[:3]]
    together = padded.attend(backend, 0.3, *padded.tensors)
    end_to_end = packed.attend(backend, 0.3, *in_a_row, *padded.tensors[3:])
    torch.testing.assert_close(end_to_end, together.flatten(1, 2)[:, None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_packed_sequences_do_not_see_each_other(backend, tiles):
    tiles(32)
    batch = Batch("packed", 30, 32)
    before = batch.attend(backend, 0.1, *batch.tensors)
    changed = [t.detach().clone() for t in batch.tensors]
    for rows in changed[:3]:
        rows[:, :3] += 1.0
    after = batch.attend(backend, 0.1, *changed)
    assert not torch.equal(before[:, :, :3], after[:, :, :3])
    assert torch.equal(before[:, :, 3:], after[:, :, 3:])


@needs_triton
@pytest.mark.parametrize("length", [40, 41])
def test_the_keep_mask_is_the_one_of_its_site(length, tiles):
    tiles(16, 32)
    batch = Batch("full", length, 32, heads=2)
    identity = torch.eye(length, 32)[None, :, None].expand(1, -1, 2, -1)
    tensors = [*batch.tensors[:2], identity, *batch.tensors[3:]]  # shows 32 of the probabilities
    dropped = batch.attend("triton", 0.4, *tensors) == 0
    expected = ~batch.site.keep_mask((2, 1, length, length), 0.4)
    assert torch.equal(dropped, expected[..., :32])


@needs_triton
@pytest.mark.parametrize("pass_number", [0, 1])
def test_another_mask_in_either_pass_is_noticed(pass_number, tiles, monkeypatch):
    tiles(32)
    batch = Batch("full", 40, 32)
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


@needs_triton
def test_the_operator_compiles_in_one_piece_and_keeps_its_promises(tiles, caplog):
    tiles(32)
    batch = Batch("padded", 24, 32)
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
    batch = Batch("padded", 24, 32, heads=2)
    batch.tensors = [t.detach().to("meta").requires_grad_() for t in batch.tensors]
    batch.mask, batch.weights = batch.mask.to("meta"), batch.weights.to("meta")
    batch.relative = relative_positions(24, BUCKETS, MAX_POSITION, torch.device("meta"))
    context, *gradients = batch.value_and_gradients("triton", 0.0)
    assert context.shape == (2, 2, 24, 32)
    assert context.permute(1, 2, 0, 3).is_contiguous()  # the output projection reads it in place
    assert [each.shape for each in gradients] == [each.shape for each in batch.tensors]


def fall_back(caplog, backend="triton", *, batch):
    """Attend twice where the backend does not serve; the one line that was logged."""
    serving.say_once.cache_clear()
    caplog.clear()
    caplog.set_level("INFO")
    found = batch.value_and_gradients(backend, 0.1)
    batch.value_and_gradients(backend, 0.1)
    expected = batch.value_and_gradients("torch", 0.1)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    (record,) = caplog.records  # once
    return record.getMessage()


def test_another_head_size_falls_back(caplog):
    message = fall_back(caplog, batch=Batch("full", 9, 48))
    assert message.endswith("heads have 48 channels, and the kernels serve 32, 64, 128")


@needs_triton
def test_a_dtype_that_the_interpreter_cannot_multiply_falls_back(caplog):
    message = fall_back(caplog, batch=Batch("packed", 9, 32, torch.bfloat16))
    assert "the dtype is bfloat16, and Triton's interpreter computes float16" in message


@needs_triton
def test_a_processor_without_the_interpreter_falls_back(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    forget_kernels()
    message = fall_back(caplog, batch=Batch("full", 9, 32))
    assert "Triton compiles for NVIDIA GPUs, and the tensors are on cpu" in message
    forget_kernels()


def test_a_machine_without_triton_falls_back(caplog, monkeypatch):
    forget_kernels()
    monkeypatch.setitem(sys.modules, "triton", None)
    message = fall_back(caplog, batch=Batch("full", 9, 32))
    assert "Triton cannot be imported" in message
    monkeypatch.undo()
    forget_kernels()


@needs_triton
def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(serving.host(), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = serving.refusal(torch.device("cuda"), torch.float16, 64)
    assert reason == "the GPU has compute capability 7.5, and the kernels need 8.0"


def test_selected_query_rows_are_computed_by_torch(caplog):
    batch = Batch("full", 12, 32)
    batch.relative = batch.relative.at(torch.tensor([[3, 7, 7]]))
    batch.tensors[0] = batch.tensors[0].detach()[:, :3].requires_grad_()
    batch.weights = batch.weights[:, :, :3]
    message = fall_back(caplog, batch=batch)
    assert message.endswith("triton: the decoder's selected rows are computed by torch")


def test_disentangled_flash_needs_its_package_and_a_gpu(caplog, monkeypatch):
    batch = Batch("full", 9, 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = fall_back(caplog, "disentangled_flash", batch=batch)
    assert "the package disentangled-flash is not installed" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    message = fall_back(caplog, "disentangled_flash", batch=batch)
    assert "disentangled-flash runs on CUDA devices, and the tensors are on cpu" in message
