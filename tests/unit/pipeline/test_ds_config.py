"""The DeepSpeed JSON as a value: batch arithmetic, overlay, and the files that are shipped."""

import json
from pathlib import Path

import pytest

from data_prep.errors import EXIT_USAGE, UserError
from pipeline.config_loading import load_run_config
from pipeline.ds_config import (
    BatchPlan,
    check_deepspeed_config,
    check_device,
    combine_checks,
    load_deepspeed_config,
)

FOLDER = Path(__file__).parents[3] / "ds_configs"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
EXPECTED = {  # file -> precision, ZeRO stage, offload, train_batch_size
    "cpu_debug.json": ("fp32", 1, False, 32),
    "gpu1_bf16.json": ("bf16", 1, False, 8192),
    "zero1_bf16.json": ("bf16", 1, False, 8192),
    "zero2_bf16.json": ("bf16", 2, False, 8192),
    "zero2_bf16_offload.json": ("bf16", 2, True, 8192),
    "zero2_fp16.json": ("fp16", 2, False, 8192),
    "zero3_bf16.json": ("bf16", 3, False, 8192),
}


def a_config(**changes):
    return check_deepspeed_config(
        {
            "train_batch_size": 96,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 1},
        }
        | changes,
        "a.json",
    )


def message_of(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def test_the_shipped_files_are_the_expected_ones():
    assert sorted(EXPECTED) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_says_what_deepspeed_understands(name, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig as TheirConfig

    ours = load_deepspeed_config(FOLDER / name)
    plan = ours.batch_plan(1)
    theirs = TheirConfig(ours.engine_dict(plan))
    precision = "bf16" * theirs.bfloat16_config.enabled or "fp16" * theirs.float16_config.enabled
    offload = theirs.zero_config.offload_optimizer
    understood = (
        precision or "fp32",
        theirs.zero_optimization_stage,
        offload is not None and offload.device == "cpu",
        theirs.train_batch_size,
    )
    assert understood == EXPECTED[name]
    assert understood == (
        ours.precision,
        ours.zero_stage,
        ours.offload_optimizer,
        ours.train_batch_size,
    )
    assert theirs.gradient_clipping == ours.gradient_clipping == 1.0
    assert theirs.train_micro_batch_size_per_gpu == ours.micro_batch
    assert theirs.gradient_accumulation_steps == plan.gradient_accumulation_steps
    assert theirs.grad_accum_dtype == (None if ours.precision == "fp32" else "fp32")
    assert theirs.zero_allow_untested_optimizer


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "cpu_debug.json"])
def test_the_shipped_batches_split_over_the_usual_worlds(name):
    config = load_deepspeed_config(FOLDER / name)
    for world_size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        plan = config.batch_plan(world_size)
        product = plan.train_micro_batch_size_per_gpu * plan.gradient_accumulation_steps
        assert product * world_size == 8192


def test_the_readme_names_every_file():
    text = (FOLDER / "README.md").read_text()
    assert [name for name in SHIPPED if f"`{name}`" not in text] == []


def test_autocast():
    config = a_config(bf16={"enabled": False}, torch_autocast={"enabled": True, "dtype": "bf16"})
    assert config.precision == "autocast"


def test_batch_plan():
    assert a_config().batch_plan(3) == BatchPlan(3, 8, 4, 96)


def test_batch_plan_error_names_the_micro_batches_that_fit():
    assert message_of(a_config(train_micro_batch_size_per_gpu=24).batch_plan, 8) == (
        "a.json: train_batch_size 96 is not a multiple of 24 per rank x 8 ranks = 192.\n"
        "Values of train_micro_batch_size_per_gpu that fit 8 ranks: 1, 2, 3, 4, 6, 12."
    )


def test_batch_plan_error_names_the_worlds_that_fit_where_no_micro_batch_does():
    assert message_of(a_config().batch_plan, 7) == (
        "a.json: train_batch_size 96 is not a multiple of 8 per rank x 7 ranks = 56.\n"
        "No micro batch fits 7 ranks; use 6 ranks, or train_batch_size 112."
    )
    assert a_config(train_batch_size=112).batch_plan(7).gradient_accumulation_steps == 2


def test_engine_dict_is_the_file_plus_the_overlay_and_nothing_shared():
    config = a_config()
    plan = config.batch_plan(2)
    given = config.engine_dict(plan)
    assert given == config.raw | {
        "gradient_accumulation_steps": 6,
        "zero_allow_untested_optimizer": True,
    }
    given["zero_optimization"]["stage"] = 3
    assert config.raw["zero_optimization"] == {"stage": 1}


def test_explain():
    config = load_deepspeed_config(FOLDER / "zero2_bf16_offload.json")
    lines = config.explain(config.batch_plan(64), sequence_length=512)
    assert lines[0] == (
        "batch: 8,192 sequences = 8 per rank x 16 accumulation x 64 ranks = 4,194,304 tokens a step"
    )
    assert lines[1] == (
        "precision: bf16, gradients added in fp32; ZeRO stage 2, optimizer state in CPU memory"
    )
    assert lines[2] == "clipping: global norm 1, of each optimizer by itself"
    assert lines[3].endswith(
        "plus gradient_accumulation_steps=16, zero_allow_untested_optimizer=true"
    )
    unclipped = a_config(gradient_clipping=0.0)
    assert unclipped.explain(unclipped.batch_plan(1), 512)[2] == "clipping: none"


def test_every_finding_is_in_the_message(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        '{"train_batch_size": 8, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 8,\n'
        ' "gradient_clipping": 1.0, "bf_16": {"enabled": true}, "bf16": {"enabled": false},\n'
        ' "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}'
    )
    assert message_of(load_deepspeed_config, path) == (
        f"{path} has 3 problems:\n"
        "  - train_batch_size is written twice; keep one\n"
        '  - zero_optimization.reduce_bucket_size is "auto"; write a value: nothing fills it in'
        " here\n"
        "  - unknown key 'bf_16', did you mean 'bf16'?"
        "  (DeepSpeed would ignore it and train in fp32)"
    )


def test_raw_is_plain_json_as_written(tmp_path):
    text = json.dumps(a_config().raw)
    (tmp_path / "a.json").write_text(text)
    raw = load_deepspeed_config(tmp_path / "a.json").raw
    assert json.dumps(raw) == text
    assert type(raw["zero_optimization"]) is dict


def test_a_run_configuration_is_recognised(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"generator": {}}')
    assert message_of(load_deepspeed_config, path) == (
        f"{path} is a run configuration; pass it as --config"
    )


def test_check_device():
    fp16 = load_deepspeed_config(FOLDER / "zero2_fp16.json")
    check_device(fp16, "cuda")
    assert "fp16 needs a GPU" in message_of(check_device, fp16, "cpu")
    quantized = a_config(zero_optimization={"stage": 3, "zero_quantized_weights": True})
    assert "zero_quantized_* needs a GPU" in message_of(check_device, quantized, "cpu")
    check_device(load_deepspeed_config(FOLDER / "zero1_bf16.json"), "cpu")


def test_combine_checks_warns_where_the_reference_differs():
    large = load_run_config("deberta_v3_large")
    assert combine_checks(large, load_deepspeed_config(FOLDER / "zero1_bf16.json")) == []
    warnings = combine_checks(large, a_config(gradient_clipping=0.5))
    assert warnings == [
        "a.json: train_batch_size is 96, the preset's source used 8192;"
        " its learning rates and schedule were chosen for that",
        "a.json: gradient_clipping is 0.5, the preset's source used 1.0;"
        " its learning rates and schedule were chosen for that",
    ]
