"""Relative buckets against published values, transformers and a plain re-derivation."""

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from pipeline.modeling.relative_positions import relative_bucket, relative_positions
from tests.reference.rtd_plain import bucket

CPU = torch.device("cpu")
# The released code at position_buckets 256 and max_position_embeddings 512.
GOLDEN = {129: 129, 140: 137, 200: 169, 256: 192, 300: 207, 400: 233, 500: 254, 511: 255}
SIZES = [(256, 512), (256, 1024), (128, 513), (64, 128), (32, 129), (32, 64), (8, 32), (512, 4096)]


def test_golden_values_of_the_release():
    distance = torch.tensor(list(GOLDEN))
    assert relative_bucket(distance, 256, 512).tolist() == list(GOLDEN.values())
    assert relative_bucket(-distance, 256, 512).tolist() == [-b for b in GOLDEN.values()]
    near = torch.arange(-128, 129)
    assert torch.equal(relative_bucket(near, 256, 512), near)


@pytest.mark.parametrize(("position_buckets", "max_position"), SIZES)
def test_equals_transformers_at_every_distance(position_buckets, max_position):
    distance = torch.arange(1 - max_position, max_position)
    theirs = make_log_bucket_position(distance, position_buckets, max_position).long()
    assert torch.equal(relative_bucket(distance, position_buckets, max_position), theirs)


@pytest.mark.parametrize(("position_buckets", "max_position"), [(256, 512), (8, 32), (64, 32)])
def test_equals_the_plain_derivation_beyond_the_longest_sequence(position_buckets, max_position):
    distance = torch.arange(-3 * max_position, 3 * max_position)
    plain = [bucket(d, position_buckets, max_position) for d in distance.tolist()]
    assert relative_bucket(distance, position_buckets, max_position).tolist() == plain


def test_index_holds_the_row_of_query_minus_key():
    index_LL = relative_positions(512, 256, 512, CPU).index()[0]
    assert index_LL[300, 0] == 256 + 207
    assert index_LL[0, 300] == 256 - 207
    assert (index_LL.min(), index_LL.max()) == (1, 511)  # row 0 is never read


def test_long_sequences_read_the_outermost_trained_rows():
    index_LL = relative_positions(600, 256, 512, CPU).index()[0]
    assert index_LL[599, 0] == 511
    assert index_LL[0, 599] == 1


def test_selected_queries_read_the_same_rows():
    whole = relative_positions(20, 8, 32, CPU)
    positions = torch.tensor([[0, 7], [19, 3]])
    assert torch.equal(whole.at(positions).index(), whole.index()[0][positions])


def test_geometry_is_built_once_and_usable_in_training_after_inference():
    with torch.inference_mode():
        first = relative_positions(23, 8, 32, CPU)
    assert relative_positions(23, 8, 32, CPU) is first
    table = torch.randn(1, 16, 4, requires_grad=True)
    table.index_select(1, first.query_rows_E).sum().backward()
    assert table.grad is not None
