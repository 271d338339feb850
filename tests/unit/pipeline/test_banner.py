"""The block of facts before the first step."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.banner import banner_lines, count_parameters, memory_line
from pipeline.commit import Commit
from pipeline.config_loading import load_run_config
from pipeline.ds_config import check_deepspeed_config
from pipeline.resume import Accepted, Comparison
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


def assembled(one):
    """What `pipeline.assemble` would hand over."""
    environment = {"torch": "9.9", "slurm_job_id": ""}
    comparison = Comparison(
        accepted_before=[Accepted("run.seed", 1, 42, 8)],
        accepted=[
            Accepted("dataset_fingerprint", "a", "b", 40, ("train tokens was 3 and is now 4",))
        ],
        rates=["learning rates:", "  step 40: ended -> 0.001"],
    )
    return SimpleNamespace(
        engines=one.engines,
        comparison=comparison,
        resumed_from=Commit(Path("step-00000040"), 40),
        trainer=SimpleNamespace(identity={"environment": environment}),
        schedule=SimpleNamespace(
            explain=lambda: ["steps 0 to 9: 8 sequences", "the rest"], samples_by_length=dict
        ),
        data=SimpleNamespace(describe=lambda: "3 shards, fingerprint 0123456789ab", train={}),
        notes=["2 ranks instead of 1"],
    )


def test_the_whole_banner(world):
    one = rig(world, stage=2)
    ds = deepspeed_config(stage=2)
    config = load_run_config("demo", ["run.folder=runs/mine", "checkpoint.keep_last=2"])
    session = SimpleNamespace(config=config, ds=ds, plan=one.plan)
    lines = banner_lines(session, assembled(one))
    text = "\n".join(lines)
    counts = [count_parameters(one.module(name)) for name in ("generator", "discriminator")]
    for part in (
        "run: runs/mine, seed 42, continues step-00000040",
        "program: deberta-pretrain",
        "versions: torch 9.9",
        "data: 3 shards, fingerprint 0123456789ab",
        "phases: steps 0 to 9: 8 sequences; the rest",
        f"parameters: generator {counts[0]:,}, discriminator {counts[1]:,}",
        "8 sequences = 4 per rank x 2 accumulation x 1 ranks = 1,024 tokens a step",
        "precision: fp32; ZeRO stage 2",
        "memory: about",
        f"the newest 2 are kept, about {sum(counts) * 12 / 1e9:.3g} GB each",
        "accepted at step 8: run.seed was 1, then 42",
        "accepted at step 40: dataset_fingerprint was",
        "note: 2 ranks instead of 1",
        "  step 40: ended -> 0.001",
    ):
        assert part in text
    assert "host" not in text
    assert lines[lines.index("  train tokens was 3 and is now 4") - 1].startswith("accepted at")
    assert "schedule: extended" not in text


def test_extensions_are_told_in_every_banner(world):
    one = rig(world, stage=1)
    extensions = "[{from_step=300, previous_max_steps=300, peak_factor=0.5, warmup_steps=9}]"
    words = [f"schedule.extensions={extensions}", "schedule.max_steps=400"]
    session = SimpleNamespace(
        config=load_run_config("demo", words), ds=deepspeed_config(), plan=one.plan
    )
    lines = banner_lines(session, assembled(one))
    assert "schedule: extended at step 300, to 400 steps instead of 300" in lines
