"""Findings about a DeepSpeed JSON: each rule by itself, and all together."""

import pytest

from pipeline.config_files import JsonObject
from pipeline.ds_checks import enabled_precisions, findings

GOOD = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}
FP32 = {"bf16": {"enabled": False}, "data_types": None}


def document(**changes):
    """GOOD with changed top-level keys; None takes a key out."""
    return {key: value for key, value in (GOOD | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FP32,
        FP32 | {"zero_optimization": {"stage": 0}},
        {"data_types": {"grad_accum_dtype": "bf16"}},
        {"bf16": None, "fp16": {"enabled": True, "loss_scale": 0}},
        {
            "bf16": None,
            "data_types": None,
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
            "zero_optimization": {"stage": 0},
        },
        {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
        {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 5e7}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"gradient_clipping": 0.0},
    ],
)
def test_accepted(changes):
    assert findings(document(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        (
            {"bf_16": {"enabled": True}},
            "unknown key 'bf_16', did you mean 'bf16'?"
            "  (DeepSpeed would ignore it and train in fp32)",
        ),
        (
            {"gradient_cliping": 1.0},
            "unknown key 'gradient_cliping', did you mean 'gradient_clipping'?"
            "  (DeepSpeed would ignore it and train without it)",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "unknown key 'zero_optimization.overlap_com', did you mean 'overlap_comm'?",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "offload_optimizer": {"device": "cpu", "pin_mem": 1},
                }
            },
            "unknown key 'zero_optimization.offload_optimizer.pin_mem', did you mean 'pin_memory'?",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto"; write a value: nothing fills it in'
            " here",
        ),
        (
            {"comms_logger": {"enabled": False, "prof_ops": ["auto"]}},
            'comms_logger.prof_ops[0] is "auto"; write a value: nothing fills it in here',
        ),
        (
            {"optimizer": {"type": "AdamW"}},
            "optimizer belongs in the run configuration, section [optimizer]; remove it",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps is derived: train_batch_size /"
            " (train_micro_batch_size_per_gpu x world size); remove it",
        ),
        (
            {"gradient_clipping": None},
            'gradient_clipping is missing; write "gradient_clipping": 1.0 (the paper\'s), or 0.0'
            " for none",
        ),
        (
            {"train_batch_size": None},
            "train_batch_size is missing: sequences in one optimizer step over all GPUs, e.g. 8192",
        ),
        (
            {"train_micro_batch_size_per_gpu": None},
            "train_micro_batch_size_per_gpu is missing: sequences in one forward pass of one GPU,"
            " e.g. 32",
        ),
        (
            {"zero_optimization": {}},
            "zero_optimization.stage is missing; write 0, 1, 2 or 3",
        ),
        (
            {"bf16": None, "data_types": None},
            'no precision is chosen; write "bf16": {"enabled": true}, or for fp32'
            ' "bf16": {"enabled": false}',
        ),
        (
            {"fp16": {"enabled": True}},
            "two precisions are enabled, bf16 and fp16; keep one",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            "bf16 at ZeRO stage 0: DeepSpeed 0.19.8 counts Adam's steps wrong there; write"
            " zero_optimization.stage 1, which on one GPU costs nothing",
        ),
        (
            {"data_types": None},
            "bf16 without data_types.grad_accum_dtype would add up gradients in bf16; write"
            ' "data_types": {"grad_accum_dtype": "fp32"}',
        ),
        (
            {"bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "bf16"}},
            "data_types.grad_accum_dtype is bf16, but the weights are not; write fp32",
        ),
        (
            {"bf16": None, "data_types": None, "torch_autocast": {"enabled": True}},
            'torch_autocast.dtype is missing; write "dtype": "bfloat16"',
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}},
            "zero_optimization.stage3_max_live_parameters needs stage 3, not 2; remove it",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param needs stage 3, not 1; remove it",
        ),
        (
            FP32 | {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device is \"nvme\"; it must be 'none' or 'cpu'",
        ),
        (
            {"train_batch_size": 100},
            "train_batch_size 100 is not a multiple of train_micro_batch_size_per_gpu 8;"
            " the nearest that are: 96, 104",
        ),
        (
            {"train_batch_size": "64"},
            'train_batch_size is "64"; it must be a whole number',
        ),
        ({"train_batch_size": True}, "train_batch_size is true; it must be a whole number"),
        (
            {"gradient_clipping": -1},
            "gradient_clipping is -1; it must be at least 0.0",
        ),
        (
            {"gradient_clipping": float("nan")},
            "gradient_clipping is NaN; it must be a finite number",
        ),
        (
            {"bf16": {"enabled": 1}, "data_types": None},
            "bf16.enabled is 1; it must be true or false",
        ),
        ({"bf16": True, "data_types": None}, "bf16 is true; it must be a block of keys"),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage is 4; it must be at most 3",
        ),
        (
            {"elasticity": {"enabled": True}},
            "elasticity was removed from DeepSpeed; remove it and give each world size a JSON of"
            " its own, or one batch that all of them divide",
        ),
        (
            {"curriculum_learning": {"enabled": True}},
            "curriculum_learning was removed from DeepSpeed; remove it",
        ),
    ],
)
def test_one_mistake_gives_exactly_one_finding(changes, finding):
    assert findings(document(**changes)) == [finding]


def test_duplicate_keys_are_found_at_any_depth():
    twice = JsonObject([("stage", 1), ("stage", 2)])
    assert findings(document(zero_optimization=twice)) == [
        "zero_optimization.stage is written twice; keep one"
    ]


def test_all_findings_at_once():
    lines = findings(
        {
            "train_batch_size": 100,
            "train_micro_batch_size_per_gpu": 32,
            "bf_16": {"enabled": True},
            "fp16": {"enabled": True, "loss_scale": "auto"},
            "optimizer": {},
            "zero_optimization": {"stage": 0, "reduce_scatter": 1},
        }
    )
    beginnings = [
        'fp16.loss_scale is "auto"',
        "gradient_clipping is missing",
        "zero_optimization.reduce_scatter is 1",
        "unknown key 'bf_16'",
        "optimizer belongs in",
        "fp16 at ZeRO stage 0",
        "fp16 without data_types",
        "train_batch_size 100 is not a multiple",
    ]
    assert len(lines) == len(beginnings)
    assert all(any(line.startswith(start) for line in lines) for start in beginnings)


def test_enabled_precisions_trusts_only_true():
    assert enabled_precisions({"bf16": {"enabled": "true"}, "fp16": {"enabled": 1}}) == []
    assert enabled_precisions({"torch_autocast": {"enabled": True}}) == ["autocast"]
