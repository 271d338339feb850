"""Relative buckets against published values, transformers, the authors' code and a plain one."""

import importlib

import pytest
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2

from pipeline.modeling.relative_positions import relative_bucket, relative_positions
from tests.reference import released_encoder
from tests.reference.plain_encoder import bucket, table_row

CPU = torch.device("cpu")
RULES = ["clamp", "transformers"]
# The released code at position_buckets 256 and max_position_embeddings 512.
GOLDEN = {129: 129, 140: 137, 200: 169, 256: 192, 300: 207, 400: 233, 500: 254, 511: 255}
# Farther, by hand: ceil(ln(n / 128) / ln(511 / 128) * 127) + 128.
GOLDEN_BEYOND = {512: 256, 599: 270, 600: 270, 1023: 319}
SIZES = [(256, 512), (256, 1024), (128, 513), (64, 128), (32, 129), (32, 64), (8, 32), (512, 4096)]


def test_golden_values_of_the_release():
    distance = torch.tensor(list(GOLDEN))
    for rule in RULES:
        assert relative_bucket(distance, 256, 512, rule).tolist() == list(GOLDEN.values())
        expected = [-b for b in GOLDEN.values()]
        assert relative_bucket(-distance, 256, 512, rule).tolist() == expected
        near = torch.arange(-128, 129)
        assert torch.equal(relative_bucket(near, 256, 512, rule), near)


def test_golden_values_beyond_the_last_distance():
    distance = torch.tensor(list(GOLDEN_BEYOND))
    unclamped = relative_bucket(distance, 256, 512, "transformers")
    assert unclamped.tolist() == list(GOLDEN_BEYOND.values())
    assert torch.equal(relative_bucket(-distance, 256, 512, "transformers"), -unclamped)
    assert relative_bucket(distance, 256, 512, "clamp").tolist() == [255] * 4
    assert relative_bucket(-distance, 256, 512, "clamp").tolist() == [-255] * 4


@pytest.mark.parametrize(("position_buckets", "max_position"), SIZES)
def test_equals_transformers_at_every_distance(position_buckets, max_position):
    sizes = position_buckets, max_position
    near = torch.arange(1 - max_position, max_position)
    far = torch.arange(-3 * max_position, 3 * max_position)
    for distance, rule in ((near, "clamp"), (far, "transformers")):
        theirs = modeling_deberta_v2.make_log_bucket_position(distance, *sizes).long()
        assert torch.equal(relative_bucket(distance, *sizes, rule), theirs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("position_buckets", "max_position"), [(256, 512), (8, 32), (64, 128)])
def test_equals_the_plain_derivation_beyond_the_last_distance(position_buckets, max_position, rule):
    distance = torch.arange(-3 * max_position, 3 * max_position)
    plain = [bucket(d, position_buckets, max_position, rule) for d in distance.tolist()]
    assert relative_bucket(distance, position_buckets, max_position, rule).tolist() == plain


def test_without_room_for_the_logarithm_every_distance_is_its_own_bucket():
    distance = torch.arange(-96, 96)
    assert torch.equal(relative_bucket(distance, 64, 32), distance.clamp(-31, 31))


@pytest.mark.parametrize("length", [600, 1024])
@pytest.mark.parametrize("max_position", [512, 1024])
def test_index_equals_transformers_and_the_authors(length, max_position):
    """Both libraries as they are have the rule of transformers; given clamped distances, ours."""
    states = torch.zeros(1, length, 1)
    theirs = modeling_deberta_v2.build_relative_position(states, states, 256, max_position)[0]
    with released_encoder.loaded():
        module = importlib.import_module("DeBERTa.deberta.da_utils")
        authors = module.build_relative_position(length, length, 256, max_position)[0]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        clamped = distance.clamp(1 - max_position, max_position - 1).numpy()
        clamped = torch.from_numpy(module.make_log_bucket_position(clamped, 256, max_position))
    ours = {
        rule: relative_positions(length, 256, max_position, CPU, rule).index()[0] for rule in RULES
    }
    for bucketed in (theirs, authors):
        assert torch.equal(ours["transformers"], (bucketed + 256).clamp(0, 511))
    assert torch.equal(ours["clamp"], clamped + 256)
    if max_position == length:
        assert torch.equal(ours["clamp"], ours["transformers"])


def test_index_holds_the_row_of_query_minus_key():
    for rule in RULES:
        index_LL = relative_positions(512, 256, 512, CPU, rule).index()[0]
        assert index_LL[300, 0] == 256 + 207
        assert index_LL[0, 300] == 256 - 207
        assert (index_LL.min(), index_LL.max()) == (1, 511)  # row 0 is never read


@pytest.mark.parametrize(("length", "pairs_ahead"), [(600, 3_916), (1024, 131_328)])
def test_long_sequences_read_row_zero_by_the_rule_of_transformers_alone(length, pairs_ahead):
    """The pairs are those of keys 512 or more ahead: 1 + 2 + .. + (length - 512)."""
    assert pairs_ahead == (length - 512) * (length - 511) // 2
    clamped, unclamped = (
        relative_positions(length, 256, 512, CPU, rule).index()[0] for rule in RULES
    )
    assert (clamped[0, length - 1], clamped[length - 1, 0]) == (1, 511)
    assert (unclamped[0, length - 1], unclamped[length - 1, 0]) == (0, 511)
    assert (clamped == 0).sum() == 0
    assert (unclamped == 0).sum() == pairs_ahead
    assert torch.equal(clamped[unclamped != 0], unclamped[unclamped != 0])


@pytest.mark.parametrize("rule", RULES)
def test_index_equals_the_plain_row_of_every_pair(rule):
    index_LL = relative_positions(40, 8, 16, CPU, rule).index()[0]
    plain = [[table_row(i - j, 8, 16, rule) for j in range(40)] for i in range(40)]
    assert index_LL.tolist() == plain


def test_selected_queries_read_the_same_rows():
    whole = relative_positions(20, 8, 32, CPU)
    positions = torch.tensor([[0, 7], [19, 3]])
    assert torch.equal(whole.at(positions).index(), whole.index()[0][positions])


def test_geometry_is_built_once_and_usable_in_training_after_inference():
    with torch.inference_mode():
        first = relative_positions(23, 8, 32, CPU)
    assert relative_positions(23, 8, 32, CPU) is first
    assert relative_positions(23, 8, 32, CPU, "transformers") is not first
    table = torch.randn(1, 16, 4, requires_grad=True)
    table.index_select(1, first.query_rows_E).sum().backward()
    assert table.grad is not None
