"""The block of facts before the first step."""

import pytest

from pipeline.banner import banner_lines, count_parameters, memory_line
from pipeline.config_loading import load_run_config
from pipeline.ds_config import check_deepspeed_config
from tests.engines import deepspeed_config, rig
from tests.reference import small_networks


def large_config(stage, precision):
    document = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
    }
    return check_deepspeed_config(document, "x.json")


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_a_parameter"),
    [
        (0, "fp32", 4 + 4 + 8),
        (1, "fp32", 4 + 4 + 8 / 8),
        (1, "bf16", 2 + 4 + 12 / 8),
        (2, "bf16", 2 + 4 / 8 + 12 / 8),
        (3, "bf16", (2 + 4 + 12) / 8),
    ],
)
def test_memory(stage, precision, bytes_a_parameter):
    """Weights, fp32 gradients, masters and two averages; each ZeRO stage divides one more."""
    line = memory_line(2**30, large_config(stage, precision), 8)
    assert f"about {bytes_a_parameter:.2f} GiB a rank" in line


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_are_counted_whole(world, stage):
    expected = sum(p.numel() for p in small_networks.generator(layers=2).parameters())
    one = rig(world, stage=stage)
    assert count_parameters(one.module("generator")) == expected
    one.module("generator").get_parameter("lm_predictions.lm_head.bias").requires_grad_(False)
    assert count_parameters(one.module("generator")) == expected - small_networks.VOCABULARY


def test_the_whole_banner(world):
    one = rig(world, stage=2)
    ds = deepspeed_config(stage=2)
    config = load_run_config("demo", ["run.folder=runs/mine", "checkpoint.keep_last=2"])
    facts = {"data": "3 shards, fingerprint 0123456789ab"}
    lines = banner_lines(config, ds, one.plan, one.engines, facts, "continues step-00000040")
    text = "\n".join(lines)
    counts = [count_parameters(one.module(name)) for name in ("generator", "discriminator")]
    for part in (
        "run: runs/mine, seed 42, continues step-00000040",
        "program: deberta-pretrain",
        "data: 3 shards, fingerprint 0123456789ab",
        f"parameters: generator {counts[0]:,}, discriminator {counts[1]:,}",
        "8 sequences = 4 per rank x 2 accumulation x 1 ranks = 1,024 tokens a step",
        "precision: fp32; ZeRO stage 2",
        "memory: about",
        f"the newest 2 are kept, about {sum(counts) * 12 / 1e9:.3g} GB each",
    ):
        assert part in text
