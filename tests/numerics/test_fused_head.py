"""The fused vocabulary head, interpreted on a CPU, against logits held whole and torch's form."""

import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from pipeline.config import ObjectiveSection
from pipeline.config_loading import load_run_config
from pipeline.modeling import heads, vocabulary_sums
from pipeline.modeling.kernels import serving, tile_table
from pipeline.modeling.kernels.vocabulary_traffic import head_backward_traffic, head_forward_traffic
from pipeline.modeling.networks import Generator
from pipeline.plan.activations import masked_slots
from pipeline.plan.workspaces import logits_workspace
from pipeline.rtd import DrawKey, gumbel_noise
from tests.interpreting import forget_kernels, needs_triton, watch_launches
from tests.reference.fused_head import KEY, HeadBatch, kernel_noise
from tests.reference.small_networks import model_section, network_section

pytestmark = pytest.mark.usefixtures("interpreter")


def assert_near(found, expected, tolerance):
    """Compare with the largest number of what is expected."""
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        limit = tolerance * right.abs().max().item()
        torch.testing.assert_close(left.double(), right.double(), rtol=0, atol=limit)


@needs_triton
@pytest.mark.parametrize("draws", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("ids", "chunk_ids"), [(997, 400), (4099, 1024), (4099, 16_384)])
def test_equals_logits_held_whole(rows, ids, chunk_ids, draws, caplog):
    batch = HeadBatch.make(rows, ids, draws=draws)
    out, gradients = batch.found("fused", chunk_ids)
    loss, drawn, correct, exact = batch.expected()
    assert out.loss_sum.item() == pytest.approx(loss.item(), rel=1e-6)
    assert out.correct_sum == correct
    assert out.drawn_BK is None if drawn is None else torch.equal(out.drawn_BK, drawn)
    assert_near(gradients, exact, 1e-6)
    assert not caplog.records, "nothing else took its place"


@needs_triton
@pytest.mark.parametrize("tile", [(2, 512), (8, 32), (128, 64), (16, 16)])
def test_tiles_of_all_sizes(tile, tiles):
    tiles(*tile)
    batch = HeadBatch.make(10, 301, sequences=2, temperature=2.0)
    out, gradients = batch.found("fused", 100)
    loss, drawn, correct, exact = batch.expected()
    assert out.loss_sum.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(out.drawn_BK, drawn)
    assert out.correct_sum == correct
    assert_near(gradients, exact, 1e-6)


@needs_triton
@pytest.mark.parametrize("tile", [(32, 128), (128, 128)])
def test_rows_of_several_parts(tile, tiles):
    """The bias's gradient is summed by 128 rows and then over these."""
    tiles(*tile)
    batch = HeadBatch.make(300, 130)
    assert_near(batch.found("fused")[1], batch.expected()[3], 1e-6)


@needs_triton
def test_rows_past_the_end_add_nothing_to_the_gradient_of_a_large_bias():
    batch = HeadBatch.make(7, 61)
    batch.weights[2].data[[5, 40]] = 200.0  # alone, as such a row has it, its exponential is inf
    assert_near(batch.found("fused", 20)[1], batch.expected()[3], 1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_fp32_logits(dtype, caplog):
    batch = HeadBatch.make(30, 997, dtype, sequences=2)
    out, gradients = batch.found("fused", 400)
    loss, drawn, correct, exact = batch.expected()
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(out.drawn_BK, drawn)
    assert out.correct_sum == correct
    assert all(each.dtype == dtype for each in gradients)
    assert_near(gradients, exact, 2 * torch.finfo(dtype).eps)
    assert not caplog.records


@needs_triton
def test_noise_has_the_bits_of_the_definition():
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(512, (300,), generator=random)
    words = torch.randint(2**32, (300, 2), generator=random)
    found = kernel_noise(positions, words, KEY, 4_099)
    expected = gumbel_noise(words, positions[:, None], 0, 4_099, KEY)[:, 0]
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@needs_triton
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_thousands_of_draws_are_those_of_torch(temperature, tiles):
    tiles(128, 512)
    batch = HeadBatch.make(4096, 997, sequences=8, temperature=temperature)
    # Weak logits: every id has its chance.
    batch.weights[0] = batch.weights[0].detach() * 0.1
    fused, torchs = (batch.head(form, 400) for form in ("fused", "torch"))
    assert torch.equal(fused.drawn_BK, torchs.drawn_BK)
    assert len(torchs.drawn_BK.unique()) > 600
    assert fused.correct_sum == torchs.correct_sum


@needs_triton
@pytest.mark.parametrize("tile", [(64, 32), (16, 128)])
def test_ties_go_to_the_lowest_id(tile, tiles):
    """Beside such logits no noise is seen: scores tie in a tile, between tiles and chunks."""
    tiles(*tile)
    batch = HeadBatch.make(16, 301)
    hidden, table, bias = batch.weights
    for tied in ([7, 10, 13], [13, 45, 77], [90, 130, 255], [18, 19, 300]):
        high = torch.zeros_like(bias).index_fill(0, torch.tensor(tied), 1e30)
        weights = [hidden, torch.zeros_like(table), high]
        found = batch.head("fused", 100, weights=weights, targets=batch.targets * 0 + tied[0])
        assert (found.drawn_BK == tied[0]).all()
        assert found.correct_sum == batch.valid.sum()


@needs_triton
@pytest.mark.parametrize("allowed", [range(4, 290), range(105, 118), range(300, 301)])
def test_forbidden_ids_are_never_drawn_and_stay_in_the_loss(allowed):
    batch = HeadBatch.make(60, 301, sequences=3)
    free = batch.head("fused", 100)
    draw = replace(batch.draw, allowed_ids=allowed)
    fused, torchs = (batch.head(form, 100, draw=draw) for form in ("fused", "torch"))
    assert torch.equal(fused.drawn_BK, torchs.drawn_BK)
    assert all(each in allowed for each in fused.drawn_BK.flatten().tolist())
    assert torch.equal(fused.loss_sum, free.loss_sum)
    assert torch.equal(fused.correct_sum, free.correct_sum)


@needs_triton
def test_numbers_that_are_not_numbers_still_draw_an_id():
    batch = HeadBatch.make(7, 61)
    hidden, *rest = (each.detach() for each in batch.weights)
    spoilt = hidden.index_fill(1, torch.tensor([2]), torch.nan)
    draw = replace(batch.draw, allowed_ids=range(4, 50))
    found, whole = (
        batch.head("fused", 20, weights=[each, *rest], draw=draw) for each in (spoilt, hidden)
    )
    assert found.loss_sum.isnan()
    assert found.drawn_BK[0, 2] == 4
    others = torch.arange(7) != 2
    assert torch.equal(found.drawn_BK[:, others], whole.drawn_BK[:, others])


@needs_triton
def test_slots_that_do_not_count_give_no_loss_and_no_gradient():
    batch = HeadBatch.make(10, 61)
    out, (d_hidden, *_) = batch.found("fused", 20)
    others = torch.where(batch.valid, batch.targets, (batch.targets + 1) % 61)
    assert torch.equal(batch.head("fused", 20, targets=others).loss_sum, out.loss_sum)
    assert not d_hidden[~batch.valid].any()
    assert d_hidden[batch.valid].any(-1).all()


@needs_triton
def test_the_same_inputs_give_the_same_bits():
    batch = HeadBatch.make(64, 997)
    (one, ones), (two, twos) = (batch.found("fused", 400) for _ in range(2))
    pairs = zip((*one, *ones), (*two, *twos), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_documented_traffic_is_what_the_kernels_are_handed(dtype, monkeypatch):
    rows, ids, element = 2 * tile_table.GRADIENT_ROWS, 300, dtype.itemsize
    batch = HeadBatch.make(rows, ids, dtype)
    host, launched = serving.host("vocabulary"), []
    launch = host.launch

    def watch(kernel, grid, tile, *arguments, **constants):
        tensors = {
            each.data_ptr(): each for each in tree_leaves(arguments) if torch.is_tensor(each)
        }
        matrices = [each for each in tensors.values() if each.dim() == 2 and each.shape[1] > 2]
        handed = [sum(each.nbytes for each in arguments if each is matrix) for matrix in matrices]
        launched.append(sum(handed) / (rows * ids / 3))
        launch(kernel, grid, tile, *arguments, **constants)

    monkeypatch.setattr(host, "launch", watch)
    batch.found("fused", ids // 3)
    forward, backward = head_forward_traffic(), head_backward_traffic(element)
    kernels = [forward[1].bytes] * 3 + [backward[1].bytes] * 3
    assert launched == pytest.approx(kernels)
    # Then come products, which read and write what the kernels have and what they leave.
    assert sum(step.bytes for step in forward) == 8
    assert sum(step.bytes for step in backward) == pytest.approx(8 + 3 * element, rel=0.01)


@needs_triton
@pytest.mark.parametrize("architecture", tile_table.TABLES)
@pytest.mark.parametrize("kernel", ["sums", "gradient"])
def test_launches_on_a_gpu_round_as_torchs_operations_do(architecture, kernel):
    compiled = mock.MagicMock()
    tile = tile_table.head_tile(architecture, kernel)
    serving.host("vocabulary").launch(compiled, (1,), tile, 7, SIZE=5)
    compiled[1,].assert_called_once_with(
        7, SIZE=5, num_warps=4, num_stages=1, enable_fp_fusion=False
    )


@needs_triton
def test_the_forward_pass_launches_on_the_device_of_its_tensors(monkeypatch):
    batch = HeadBatch.make(7, 61)
    launches = watch_launches(monkeypatch, serving.host("vocabulary"))
    batch.head("fused", 20)
    assert [inside for inside, _ in launches] == [[batch.weights[0].shape]] * 4


@needs_triton
@pytest.mark.parametrize(("dtype", "in_place"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_planner_knows_what_a_chunk_holds(dtype, in_place):
    config = load_run_config("demo", ["model.attention_backend=triton", "model.vocab_size=400"])
    product, bias = torch.zeros(masked_slots(128, config.objective), 400), torch.zeros(400)
    zero = torch.zeros(len(product))
    sums = (zero, zero + 1, zero, torch.zeros_like(zero, dtype=torch.int64))
    gradient, _ = serving.host("vocabulary").chunk_gradient(product, bias, *sums, 0, dtype)
    assert (gradient.data_ptr() == product.data_ptr()) == in_place
    held = {each.data_ptr(): each.nbytes for each in (product, gradient)}
    assert logits_workspace(config, 1, 128, dtype.itemsize) == sum(held.values())


def section(backend, **model):
    return model_section(vocab_size=61).model_copy(update={"attention_backend": backend, **model})


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ({"backend": "triton"}, ("fused", "torch")),
        ({"backend": "triton", "compile": "layer"}, ("fused", "compiled")),
        ({"backend": "torch"}, ("torch", "torch")),
        ({"backend": "eager", "compile": "layer"}, ("compiled", "compiled")),
    ],
)
def test_the_backend_of_attention_chooses(model, form, monkeypatch):
    found = []

    def head(*_, form, otherwise):
        found.append((form, otherwise))

    monkeypatch.setattr(heads, "vocabulary_head", head)
    generator = Generator(network_section(1), section(**model), ObjectiveSection())
    lm_head = generator.lm_predictions.lm_head
    hidden = torch.zeros(1, 2, lm_head.dense.in_features)
    lm_head(hidden, generator.deberta.embeddings.word_embeddings, *(None,) * 4)
    assert found == [form]


def fall_back(caplog, batch):
    """Compute twice where the kernels do not serve; the one line that was logged."""
    serving.say_once.cache_clear()
    caplog.clear()
    found = [batch.found("fused", 20) for _ in range(2)]
    out, gradients = batch.found("torch", 20)
    for each, theirs in found:
        assert torch.equal(each.loss_sum, out.loss_sum)
        assert all(torch.equal(a, b) for a, b in zip(theirs, gradients, strict=True))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    return record.getMessage()


@needs_triton
def test_another_dtype_falls_back(caplog):
    message = fall_back(caplog, HeadBatch.make(7, 61, torch.float64))
    assert message == (
        "the fused vocabulary head is replaced by torch: the dtype is float64, and Triton's "
        "interpreter can compute float16, bfloat16, float32"
    )


@needs_triton
def test_a_processor_without_the_interpreter_falls_back(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    forget_kernels()
    message = fall_back(caplog, HeadBatch.make(7, 61))
    assert "Triton compiles for NVIDIA GPUs, and the tensors are on cpu" in message
    forget_kernels()


def test_a_machine_without_triton_falls_back(caplog, monkeypatch):
    forget_kernels()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in fall_back(caplog, HeadBatch.make(7, 61))
    monkeypatch.undo()
    forget_kernels()


def test_meta_tensors_are_looked_at_by_torch(caplog):
    batch = HeadBatch.make(7, 61)
    batch.weights = [each.detach().to("meta").requires_grad_() for each in batch.weights]
    batch.valid, batch.targets, batch.positions = (
        each.to("meta") for each in (batch.valid, batch.targets, batch.positions)
    )
    batch.draw = DrawKey(KEY, batch.draw.sample_words_B2.to("meta"))
    out, gradients = batch.found("fused", 20)
    assert out.drawn_BK.shape == (1, 7)
    assert [each.shape for each in gradients] == [each.shape for each in batch.weights]
    assert not caplog.records


@needs_triton
def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(serving.host("vocabulary"), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = serving.head_refusal(torch.device("cuda"), torch.bfloat16)
    assert reason == "the GPU has compute capability 7.5, and the kernels need 8.0"
    hidden = torch.zeros(1)
    assert vocabulary_sums.serving_form("torch", "compiled", hidden) == "torch"
