"""Checksums of replicated tensors; `tests/distributed/test_reload_in_place.py` compares ranks."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import faults, replicas
from pipeline.replicas import ReplicaFinding, differing_ranks
from tests.engines import rig

WEIGHTS = 2 * torch.arange(8) + 1


def checksum(tensor):
    """With blocks of eight elements."""
    return int(replicas._checksum(tensor, WEIGHTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (3, 7)])
def test_every_single_flipped_bit_changes_the_sum(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    original = checksum(tensor)
    content = tensor.view(-1).view(torch.uint8)
    for position in range(content.numel()):
        for bit in range(8):
            content[position] ^= 1 << bit
            assert checksum(tensor) != original, (position, bit)
            content[position] ^= 1 << bit
    assert checksum(tensor) == original


def test_every_bit_counts_at_the_real_block_size(monkeypatch):
    """Positions around the ends of blocks of a million elements, and anywhere."""
    weights = 2 * torch.arange(replicas._BLOCK_ELEMENTS) + 1
    tensor = torch.randn(2 * len(weights) + 5).bfloat16()
    original = replicas._checksum(tensor, weights)
    generator, ends = random.Random(1), (0, len(weights) - 1, len(weights), len(tensor) - 1)
    for position in (*ends, *(generator.randrange(len(tensor)) for _ in range(12))):
        bit = generator.randrange(16)
        tensor.view(torch.int16)[position] ^= 1 << bit if bit < 15 else -(1 << 15)
        assert replicas._checksum(tensor, weights) != original, (position, bit)
        tensor.view(torch.int16)[position] ^= 1 << bit if bit < 15 else -(1 << 15)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30))
def test_the_sum_is_the_polynomial_that_it_should_be(numbers):
    """Against Python's integers, which have no largest one."""
    total = 0
    for start in range(0, len(numbers), 8):
        block = sum(n * (2 * i + 1) for i, n in enumerate(numbers[start : start + 8]))
        total = total * replicas._BLOCK_FACTOR + block
    ours = checksum(torch.tensor(numbers, dtype=torch.int32).view(torch.float32))
    assert (ours - total) % 2**64 == 0


def test_what_compares_equal_but_is_not_the_same_differs():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert checksum(nans[:1]) != checksum(nans[1:])
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]
)
def test_every_replicated_tensor_of_an_engine_is_summed(world, stage, precision):
    one = rig(world, stage=stage, precision=precision)
    one.run(0)  # at stage 3 it gathers what stays gathered: here, all that is small
    engine = one.engines.by_name["generator"]
    names, _ = replicas._checksums(engine, None)
    weights = [name for name, _ in engine.module.named_parameters()]
    if stage == 3:  # E_G is let go when the discriminator has read from it
        weights.remove("deberta.embeddings.word_embeddings.weight")
    averages = [f"{kind} of {name}" for kind in ("exp_avg", "exp_avg_sq") for name in weights]
    assert sorted(names) == sorted([*weights, *averages * (stage == 0), replicas._SCALARS])
    _, before = replicas._checksums(engine, None)
    tensors = dict(replicas._replicated(engine))
    for index, name in enumerate(names[:-1]):
        tensors[name].view(-1).view(torch.uint8)[-1] ^= 64
        _, now = replicas._checksums(engine, None)
        assert (now != before).nonzero().tolist() == [[index]], name
        tensors[name].view(-1).view(torch.uint8)[-1] ^= 64


def test_adam_s_step_and_the_first_tensor_are_part_of_it(world):
    engine = rig(world, stage=1).engines.by_name["generator"]
    names, before = replicas._checksums(engine, None)
    faults.configure("replica:0:7:flip", rank=0)
    try:
        assert torch.equal(replicas._checksums(engine, 6)[1], before)
        _, flipped = replicas._checksums(engine, 7)
    finally:
        faults.configure("", rank=0)
    assert (flipped != before).nonzero().tolist() == [[0]]
    for state in engine.optimizer.state.values():
        state["step"] += 1
    _, stepped = replicas._checksums(engine, None)
    assert (stepped != flipped).nonzero().tolist() == [[len(names) - 1]]


def test_one_rank_has_nobody_to_differ_from(world):
    import torch.distributed as dist

    engines = rig(world, stage=0).engines
    assert differing_ranks(engines, 0, None) == []
    assert differing_ranks(engines, 0, dist.group.WORLD) == []


@pytest.mark.parametrize(
    ("rows", "minority"),
    [
        ("ab", ()),
        ("aab", (2,)),
        ("abc", ()),
        ("aabb", ()),
        ("aaab", (3,)),
        ("baca", ()),
        ("abaca", (1, 3)),
        ("bbbbbabb", (5,)),
    ],
)
def test_only_a_majority_says_who_is_wrong(rows, minority):
    assert replicas._minority([(ord(row),) for row in rows]) == minority


def test_findings_name_ranks_and_tensors():
    one = ReplicaFinding("generator", ("w", "b"), (2,), 4)
    assert one.explain() == (
        "rank 2 of 4 differs from the majority in what all should hold alike: w, b (generator): "
        "a flipped bit, or a faulty device. A rank that is named again belongs on another node"
    )
    many = ReplicaFinding("generator", tuple("abcdefg"), (0, 3), 8)
    assert many.explain().startswith("ranks 0, 3 of 8 differ from the majority in")
    assert "a, b, c, d, e and 2 more (generator)" in many.explain()
    pair = ReplicaFinding("generator", ("w",), (), 2)
    assert pair.explain().startswith(
        "the 2 ranks disagree, and no majority says which is wrong, in what"
    )
