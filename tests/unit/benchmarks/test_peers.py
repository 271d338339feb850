"""The benchmarks' peers can still be built and take a step: a benchmark runs seldom, and rots."""

import torch

from pipeline.config_loading import load_run_config
from tests.benchmarks import bench_attention, bench_step

TINY = [
    "data.sequence_length=32",
    "model.vocab_size=400",
    *(
        f"{network}.{key}"
        for network in ("generator", "discriminator")
        for key in (
            "hidden_size=32",
            "num_attention_heads=2",
            "intermediate_size=64",
            "num_hidden_layers=2",
        )
    ),
]


def test_both_sides_of_the_step_train():
    config = load_run_config("deberta_v3_large", TINY)
    batch = bench_step.make_batch(config, torch.device("cpu"))
    for side in (bench_step.Ours(config), bench_step.Theirs(config)):
        side.train_on(batch, drops=False)
        assert any(p.grad is not None and p.grad.any() for p in side.parameters())


def test_both_sides_of_the_attention_have_one_shape():
    section, config = bench_attention.networks({"hidden": 64, "heads": 2})
    assert config.hidden_size == section.hidden_size == 64
    assert config.relative_attention
    assert config.position_buckets == section.position_buckets
