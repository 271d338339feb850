"""FLOPs of the minimal algorithm: the published figure, a sum by hand, and what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelSection, NetworkSection, RunConfig
from pipeline.config_loading import load_run_config
from pipeline.flops import peak_flops, training_flops_per_token
from pipeline.modeling.networks import Discriminator, Generator
from pipeline.rtd import DrawKey


def test_large_at_512():
    """performance.md 1: 3.246 GFLOP a token, 707 MFLOP of them the discriminator's forward."""
    large = load_run_config("deberta_v3_large", [])
    assert training_flops_per_token(large) == pytest.approx(3.246e9, rel=2e-4)
    almost_no_generator = large.model_copy(
        update={
            "generator": large.generator.model_copy(
                update={"num_hidden_layers": 2, "intermediate_size": 1}
            ),
            "model": ModelSection(vocab_size=1),
            "objective": large.objective.model_copy(update={"mask_prob": 1e-9}),
        }
    )
    h = 1024
    layer_and_keys = 8 * h * h + 4 * h * 1 + 4 * 512 * h + 4 * 512 * h + 4 * h * h + 2 * 512 * h
    discriminator = training_flops_per_token(almost_no_generator) / 3 - layer_and_keys
    assert discriminator == pytest.approx(707e6, rel=1e-3)


def test_one_discriminator_layer_by_hand():
    """Two products of n x m by m x k matrices are 2nmk operations each; all for one token."""
    two, three = (run(layers) for layers in (2, 3))
    h, inner, length, rows = 32, 56, 20, 2 * 6
    projections, attention = 4 * 2 * h * h, 2 * 2 * length * h
    relative = 2 * 2 * rows * h  # content to position and position to content
    feed_forward = 2 * 2 * h * inner
    expected = 3 * (projections + attention + relative + feed_forward)
    assert training_flops_per_token(three) - training_flops_per_token(two) == expected


def network(layers):
    return NetworkSection(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=56,
        max_position_embeddings=20,
        position_buckets=6,
    )


def run(discriminator_layers, generator_layers=3):
    return RunConfig.model_validate(
        {
            "data": {"sequence_length": 20},
            "model": {"vocab_size": 104},
            "generator": network(generator_layers),
            "discriminator": network(discriminator_layers),
            "optimizer": {"generator_learning_rate": 1, "discriminator_learning_rate": 1},
            "schedule": {"max_steps": 1, "warmup_steps": 0},
        }
    )


def test_against_what_torch_counts():
    """Forward matrix products of both networks at a full batch.

    The relative table is projected once a layer and not once a sequence, which the formula calls
    free; its share of the count at this batch of 64 bounds what we may be below.
    """
    config = run(4)
    batch, length, slots = 64, 20, 3
    model = ModelSection(vocab_size=104, attention_backend="eager")
    generator = Generator(config.generator, model)
    discriminator = Discriminator(config.discriminator, model)
    ids = torch.randint(4, 104, (batch, length), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[2, 7, 11]]).expand(batch, -1)
    words = torch.zeros(batch, 2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generator(
            ids,
            None,
            positions,
            positions > 0,
            ids.gather(1, positions),
            DrawKey((1, 2), words),
            None,
        )
        discriminator(ids, generator.token_embeddings(ids), None, torch.zeros(ids.shape), None)
    counted = counter.get_total_flops() / (batch * length)
    ours = training_flops_per_token(config) / 3
    assert slots / length == config.objective.mask_prob
    assert 0.97 < ours / counted < 1.0


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu", None),
    ],
)
def test_peak_rates(name, rate):
    assert peak_flops(name) == rate
