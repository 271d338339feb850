"""The benchmarks' peers can still be built and compute the same: what runs seldom rots."""

import pytest
import torch

from tests.benchmarks import gpu_steps
from tests.benchmarks.gpu_bench import Bench
from tests.benchmarks.step_variants import Ours, TransformersPair, agreement, make_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sides():
    config = gpu_steps.load_config("tiny")
    batch = make_batch(config, 2, CPU)
    return config, batch, gpu_steps.build(lambda: Ours(config), CPU, torch.float64)


@pytest.mark.parametrize("algorithm", ["naive", "masked", "original"])
def test_peers_have_our_losses_and_gradients(sides, algorithm):
    config, batch, ours = sides
    theirs = gpu_steps.build(lambda: TransformersPair(config, algorithm), CPU, torch.float64)
    found = agreement(ours, theirs, batch)
    assert set(found) == {"mlm_loss", "rtd_loss", "gradient"}
    # transformers scales in fp32; logits of the naive one are rounded once.
    assert max(found.values()) < 1e-6, found


def test_the_comparison_sees_a_difference(sides):
    config, batch, ours = sides
    theirs = gpu_steps.build(lambda: TransformersPair(config, "original"), CPU, torch.float64)
    theirs.generator.encoder.layer[-1].output.LayerNorm.eps = 1.0
    found = agreement(ours, theirs, batch)
    assert min(found["mlm_loss"], found["gradient"]) > 1e-6


def test_our_other_backend_agrees(sides):
    _, batch, ours = sides
    config = gpu_steps.our_config("tiny", "eager", compiles=False)
    theirs = gpu_steps.build(lambda: Ours(config), CPU, torch.float64)
    assert max(agreement(ours, theirs, batch).values()) < 1e-6


def test_the_step_with_an_optimizer_updates_the_generator_before_the_discriminator_reads_it(sides):
    steps = gpu_steps.StepCells("tiny", Bench(CPU), torch.float32)
    steps._anchor_config = gpu_steps.our_config("tiny", "torch", compiles=False)
    before = [p.detach().clone() for p in steps.anchor.pair.parameters()]
    figures = steps.with_adamw()
    assert figures["tokens_per_second"] > 0
    changed = [
        not torch.equal(a, b) for a, b in zip(before, steps.anchor.pair.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("algorithm", [None, "naive"])
def test_models_are_made_where_they_are_used(sides, algorithm):
    """Making 720 million weights on the host would take a good part of a GPU's budget."""
    config, meta = sides[0], torch.device("meta")
    make = (lambda: TransformersPair(config, algorithm)) if algorithm else lambda: Ours(config)
    model = gpu_steps.build(make, meta, torch.bfloat16)
    assert {p.device for p in model.parameters()} == {meta}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
