"""What GPUs have measured, in `deberta plan`: collected, used, and held against the model."""

import json
import re

import pytest

from data_prep.errors import UserError
from pipeline.commands_plan import plan_command
from pipeline.config_loading import load_run_config
from pipeline.flops import training_flops_per_token
from pipeline.plan import measurements
from pipeline.plan.devices import gpu_type
from pipeline.plan.measurements import deviations, find_measurement
from pipeline.plan.planning import evaluate
from pipeline.plan.report import figures
from tests.benchmarks import gpu_results
from tests.benchmarks.gpu_results import ResultFile
from tests.planning import EIGHT, H100, LARGE, deepspeed_of, plan_of
from tests.worlds import ROOT


def row_of(**changes):
    config = load_run_config("deberta_v3_large")
    values = {
        "device": "NVIDIA H100 80GB HBM3",
        "preset": "deberta_v3_large",
        "flops_per_token": training_flops_per_token(config),
        "sequence_length": 512,
        "sequences": 16,
        "attention_backend": "torch",
        "dropout": 0.1,
        "tokens_per_second": 123_456.0,
        "source": "step-test.json",
        "date": "2030-01-01",
    }
    return measurements.MeasuredStep(**{**values, **changes})


def test_a_measured_speed_replaces_the_model():
    rows = [row_of()]
    plan = evaluate(LARGE, deepspeed_of(LARGE), EIGHT, measured=rows)
    assert plan.step.computing == pytest.approx(8192 / 8 * 512 / 123_456)
    kinds = {each.name: each for each in figures(plan, None)}
    assert kinds["step"].kind == "measured"
    assert "step-test.json" in kinds["forward and backward passes"].source
    assert {each.kind for each in figures(plan_of(LARGE), None)} == {"counted", "modelled"}


def test_other_micro_batches_keep_the_shape_of_the_model():
    """A small one is no faster than its kernels are launched, whatever a large one reached."""

    def seconds(micro_batch, measured):
        deepspeed = deepspeed_of(LARGE, train_micro_batch_size_per_gpu=micro_batch)
        return evaluate(LARGE, deepspeed, EIGHT, measured=measured)

    for micro_batch in (1, 4, 16):
        plain, scaled = seconds(micro_batch, []), seconds(micro_batch, [row_of()])
        factor = scaled.step.computing / plain.step.computing
        assert factor == pytest.approx(1 / deviations([row_of()])[0].speed_ratio)
    figure = next(each for each in figures(seconds(4, [row_of()]), None) if each.name == "step")
    assert figure.kind == "modelled"
    words = [each.source for each in figures(seconds(4, [row_of()]), None)]
    assert any("16 sequences were measured (step-test.json, NVIDIA H100" in each for each in words)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "a100"),
        ({}, "h100-pcie"),
        ({"sequence_length": 128}, "h100"),
        ({"attention_backend": "triton"}, "h100"),
        ({"compile": "layer"}, "h100"),
        ({"dropout": 0.0}, "h100"),
        ({"flops_per_token": 3e9}, "h100"),
        ({"device": "NVIDIA H100 PCIe"}, "h100"),
    ],
)
def test_a_measurement_counts_for_what_was_measured(changes, key):
    assert find_measurement([row_of()], LARGE, H100, 16, 512) is not None
    assert find_measurement([row_of(**changes)], LARGE, gpu_type(key), 16, 512) is None


def test_a_measurement_in_bf16_counts_in_bf16():
    fp32 = deepspeed_of(LARGE, bf16={"enabled": False})
    assert evaluate(LARGE, fp32, EIGHT, measured=[row_of()]).measurement is None
    electra = load_run_config("electra_large")
    assert find_measurement([row_of()], electra, H100, 16, 512) is None


def test_measurements_are_collected_from_results(tmp_path):
    """As `tests/benchmarks/gpu_results.py` writes them."""
    compared = {
        "status": "measured",
        "date": "2030-01-01",
        "against": "ours, triton, compiled layer",
    }
    compared |= {"tokens_per_second": 50_000.0, "ours_tokens_per_second": 110_000.0}
    compared |= {"ours_beyond_state_gib": 2.0}
    alone = {**compared, "tokens_per_second": 70_000.0}
    cells = {
        "transformers": compared,
        "released algorithm": {"status": "failed", "reason": "no memory"},
        "ours, torch": alone,
        "ours, with fused AdamW": compared,
    }
    shape = {"sequences": 16, "length": 512, "dropout": 0.1, "dtype": "bfloat16"}
    document = {"benchmark": "gpu-step", "size": "large", "shape": shape, "cells": cells}
    path = tmp_path / "gpu-step-large-nvidia-h200.json"
    path.write_text(json.dumps({**document, "device": "NVIDIA H200"}))
    (tmp_path / "gpu-step-large-epyc.json").write_text(json.dumps({**document, "device": "EPYC"}))
    tiny = {**document, "device": "NVIDIA H200", "size": "tiny"}
    (tmp_path / "gpu-step-tiny-nvidia-h200.json").write_text(json.dumps(tiny))
    (tmp_path / "loader.json").write_text("{}")
    fused, plain = measurements.collect(tmp_path)
    assert (fused.attention_backend, fused.compile, fused.tokens_per_second) == (
        *("triton", "layer"),
        110_000.0,
    )
    assert (plain.attention_backend, plain.compile, plain.tokens_per_second) == (
        *("torch", "none"),
        70_000.0,
    )
    assert (fused.device, fused.source) == ("NVIDIA H200", path.name)
    assert fused.beyond_state_bytes == 2 << 30
    found = measurements.find_measurement([fused, plain], LARGE, gpu_type("h200"), 64, 512)
    assert found is plain
    del compared["ours_tokens_per_second"]
    path.write_text(json.dumps({**document, "device": "NVIDIA H200"}))
    with pytest.raises(UserError, match=r"gpu-step-large-.*ours_tokens_per_second.*measure it"):
        measurements.collect(tmp_path)


def planted(folder, rate, monkeypatch):
    """A result as `make gpu PART=step` writes it, by the code that writes it."""
    monkeypatch.setattr(gpu_results, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    results = ResultFile(folder, "step", "large", "cuda", "run")
    results.document["shape"] = {"sequences": 16, "length": 512, "dropout": 0.1}
    results.document["shape"] |= {"dtype": "bfloat16"}
    figures = {"tokens_per_second": 0.4 * rate, "ours_tokens_per_second": rate, "ratio": 2.5}
    figures |= {"against": "ours, triton, compiled layer", "ours_beyond_state_gib": 7.0}
    results.put("transformers", "measured", **figures)
    return results.path


def test_a_planted_result_is_used_and_compared(tmp_path, monkeypatch, capsys):
    """From the file of a GPU benchmark to the lines of a plan."""
    file = planted(tmp_path, 54_321.0, monkeypatch)
    package = tmp_path / "measured.json"
    measurements.main([str(tmp_path), str(package)])
    monkeypatch.setattr(measurements, "FILE", package)
    capsys.readouterr()
    words = ["model.attention_backend=triton", "model.compile=layer"]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(deepspeed_of(LARGE).raw))
    plan_command("deberta_v3_large", words, gpus=8, deepspeed_config=path)
    printed = capsys.readouterr().out
    found = re.search(
        r"forward and backward passes +([\d.]+) s  measured  .*; (\S+\.json),", printed
    )
    assert found, printed
    assert float(found[1]) == pytest.approx(1024 * 512 / 54_321, abs=1e-3)
    assert found[2] == file.name
    (deviation,) = deviations(measurements.measured_steps())
    line = f"speed {deviation.speed_ratio:.2f}, memory {deviation.memory_ratio:.2f}"
    assert f"triton, compile layer, 16 x 512: {line}" in printed
    assert "No GPU has measured" not in printed


@pytest.mark.parametrize("factor", [1.0, 1.3, 1.6])
def test_a_model_that_is_off_is_noticed(factor):
    """What the next test asks of real points, of points that are planted."""
    deviation = deviations([row_of()])[0]
    row = row_of(
        tokens_per_second=factor * deviation.tokens_per_second,
        beyond_state_bytes=round(factor * deviation.beyond_state_bytes),
    )
    (found,) = deviations([row])
    assert (found.speed_ratio, found.memory_ratio) == pytest.approx((factor, factor))
    assert agrees(found) == (factor < 1.1)
    assert agrees(deviations([row.model_copy(update={"beyond_state_bytes": None})])[0]) == (
        factor < 1.5
    )


def agrees(found):
    """Whether the model tells speed to a half and memory to a quarter."""
    memory = 1.0 if found.memory_ratio is None else found.memory_ratio
    return 2 / 3 <= found.speed_ratio <= 3 / 2 and 3 / 4 <= memory <= 5 / 4


def test_measured_points_agree_with_the_model():
    """Every point that a GPU has measured and that stands in the package."""
    wrong = [each for each in deviations(measurements.measured_steps()) if not agrees(each)]
    assert not wrong


def test_the_packages_measurements_are_those_of_the_results():
    """`python -m pipeline.plan.measurements tests/benchmarks/results` has been run."""
    assert measurements.measured_steps() == measurements.collect(
        ROOT / "tests" / "benchmarks" / "results"
    )
