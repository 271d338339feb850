"""The command `deberta plan`: what it prints, and how it refuses."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from data_prep.errors import UserError
from pipeline.commands_plan import plan_command
from pipeline.ds_config import check_deepspeed_config
from tests.worlds import ROOT


def deberta_plan(*words):
    app = typer.Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, words)


def test_the_command_prints_a_plan():
    result = deberta_plan(
        "deberta_v3_large", "--gpus", "64", "--gpu", "H100", "--price-per-gpu-hour", "2"
    )
    assert result.exit_code == 0, result.output
    for words in (
        "64 x NVIDIA H100 in 8 nodes",
        r"fp32 masters +42\.89 MiB  counted",
        r"FLOPs a token +3\.246 GFLOP  counted",
        r"tokens a second +[\d,]+  modelled",
        r"cost +[\d,]+  modelled",
        r"a checkpoint +8\.64 GB  counted",
        r"GPU-hours; [\d.]+ GiB of 79\.10 GiB a GPU",
        "this is the proposal",
        "words of deberta train: model.attention_backend=triton model.compile=layer model.act",
        r'DeepSpeed JSON: {"train_batch_size": 8192, "train_micro_batch_size_per_gpu": \d+,',
        "-> triton              layer    1     none",
        "   torch               none     1     none",
        "-> 1     none ",
        "No GPU has measured a step of this code yet",
    ):
        assert re.search(words, result.output), words


def test_the_command_plans_a_json(tmp_path):
    path = ROOT / "ds_configs" / "zero3_bf16.json"
    result = deberta_plan("deberta_v3_base", "--deepspeed_config", str(path), "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.output)
    assert value["plan"]["zero_stage"] == 3
    assert value["plan"]["micro_batch"] == 32
    assert value["proposal"]["fits"]
    names = {each["name"] for each in value["plan"]["figures"]}
    assert {"gathered weights", "generator: rows of E_G", "MFU", "dataset"} <= names
    assert all(
        each["source"] and each["kind"] in ("counted", "modelled", "measured")
        for each in value["plan"]["figures"]
    )


OFFLOAD = str(ROOT / "ds_configs" / "zero2_bf16_offload.json")


def test_offloaded_state_is_in_cpu_memory():
    result = deberta_plan("deberta_v3_base", "--deepspeed_config", OFFLOAD)
    assert result.exit_code == 0, result.output
    assert re.search(r"in CPU memory, a rank +[\d.]+ GiB  modelled", result.output)
    assert "fp32 masters" not in result.output


def test_what_does_not_fit_is_said_first_and_what_would_be_faster():
    path = ROOT / "ds_configs" / "zero3_bf16.json"
    words = ["deberta_v3_large", "--gpu", "a-10", "--deepspeed_config", str(path), "--price", "0"]
    lines = deberta_plan(*words).output.splitlines()
    assert "8 x NVIDIA A10 in 1 node, bf16: micro batch 32, ZeRO stage 3" in lines[0]
    assert "DOES NOT FIT: " in lines[2]
    after = lines[lines.index(next(line for line in lines if line.startswith("proposed: "))) :]
    assert re.match(r"  [2-9]\.\d+ times as fast as this plan", after[1])
    document = json.loads(after[3].removeprefix("  DeepSpeed JSON: "))
    assert check_deepspeed_config(document, "printed").zero_stage == 1
    assert any(re.match(r"  cost +0\.00  modelled", line) for line in lines)


def test_a_short_run_is_told_in_hours():
    assert re.search(r"MFU\), 0\.0\d hours, 0\.\d+ GPU-hours; ", deberta_plan("demo").output)


def test_a_dataset_is_measured(dataset_folder):
    result = deberta_plan("demo", f"data.path={dataset_folder}", "--gpus", "1")
    assert result.exit_code == 0, result.output
    assert re.search(rf"dataset .*epochs of {re.escape(str(dataset_folder))}", result.output)


def test_nothing_fits_on_a_small_gpu(capsys):
    config = ["generator.num_hidden_layers=400"]
    plan_command("deberta_v2_xxlarge", config, gpus=1, gpu="a100-40")
    assert "nothing fits: take GPUs with more memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["deberta_v3_large", "--gpu", "h10"],
            "--gpu h10: no such GPU type, did you mean 'h100'? (known: h100, h100-nvl, h100-pcie,"
            " h200, b200, a100, a100-40, l40s, a6000, a10, l4, rtx4090, rtx3090, v100, t4)",
        ),
        (
            ["deberta_v3_large", "--gpus", "12"],
            "--gpus 12 are no full nodes of --gpus-per-node 8; the nearest that are: 8, 16",
        ),
        (
            ["deberta_v3_large", "--gpus", "24"],
            "[reference] of the run: train_batch_size 8192 cannot be split over 24 GPUs; take"
            " --gpus 16 or 32, or reference.train_batch_size=8208",
        ),
        (
            ["deberta_v3_large", "--gpus", "7", "--deepspeed_config", "zero2_bf16.json"],
            "No micro batch fits 7 ranks; use 4 ranks, or train_batch_size 8288",
        ),
        (
            ["deberta_v3_large", "--gpus", "3", "--gpus-per-node", "3"],
            "cannot be split over 3 GPUs; take --gpus 2 or 4, or reference.train_batch_size=8193",
        ),
        (["demo", "--price-per-gpu-hour", "inf"], "--price-per-gpu-hour inf: give a number"),
        (["demo", "--network-gbit", "inf"], "--network-gbit inf: give Gbit/s of one GPU's card"),
        (
            ["deberta_v3_large", "--gpus", "1024", "--deepspeed_config", "zero1_bf16.json"],
            "Values of train_micro_batch_size_per_gpu that fit 1024 ranks: 1, 2, 4, 8",
        ),
        (["deberta_v3_huge"], "no such preset or file, did you mean 'deberta_v3_large'"),
        (["deberta_v3_large", "model.backend=x"], "unknown key 'model.backend'"),
        (["demo", "data.path=/nowhere"], "/nowhere"),
    ],
)
def test_nonsense_is_refused_in_one_message(words, message):
    words = [str(ROOT / "ds_configs" / each) if each.endswith(".json") else each for each in words]
    result = deberta_plan(*words)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_a_preset_without_a_batch_is_refused(tmp_path):
    text = (ROOT / "pipeline" / "presets" / "demo.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text[: text.index("[reference]")])
    with pytest.raises(UserError, match=r"no reference\.train_batch_size; give --deepspeed_config"):
        plan_command(str(path))


def test_a_plan_needs_no_torch():
    code = (
        "import sys\n"
        "from pipeline.commands_plan import plan_command\n"
        "plan_command('deberta_v3_large', gpus=64)\n"
        "print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith("[]")
