"""`--dry-run`: every preset with every DeepSpeed JSON, phases, recipes, data; touches nothing."""

import functools
import json

import pytest

from data_prep.errors import EXIT_USAGE
from data_prep.shards import Dataset
from pipeline.banner import parameter_counts
from pipeline.config_loading import load_run_config, preset_names
from pipeline.train import run
from tests.worlds import ROOT

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
CPU_DEBUG = str(ROOT / "ds_configs" / "cpu_debug.json")
DRY = ["--config", "demo", "--deepspeed_config", CPU_DEBUG, "--dry-run"]

COUNTED = functools.cache(parameter_counts)
RANKS = (1, 8, 64, 512)
# Every preset with every JSON; each of both with every number of ranks.
DRY_RUNS = [
    pytest.param(preset, path, RANKS[(row + column) % len(RANKS)], id=f"{preset}-{path.stem}")
    for row, preset in enumerate(preset_names())
    for column, path in enumerate(DS_CONFIGS)
]


@pytest.mark.parametrize(("preset", "path", "ranks"), DRY_RUNS)
def test_dry_run(preset, path, ranks, capsys, monkeypatch):
    """Each is a plan, or refused with the sizes that would be one."""
    monkeypatch.setattr("pipeline.dry_run.parameter_counts", COUNTED)
    document = json.loads(path.read_text())
    total, micro = document["train_batch_size"], document["train_micro_batch_size_per_gpu"]
    words = ["--config", preset, "--deepspeed_config", str(path), "--world-size", str(ranks)]
    code = run([*words, "--dry-run"])
    output, errors = capsys.readouterr()
    if total % (micro * ranks):
        assert code == EXIT_USAGE
        assert errors.startswith(f"error: {path}: train_batch_size {total} is not a multiple of")
        cures = f"train_micro_batch_size_per_gpu that fit {ranks} ranks: 1", "No micro batch fits"
        assert cures[total < ranks] in errors
        assert output == ""
        return
    assert (code, errors) == (0, "")
    config, lines = load_run_config(preset), output.splitlines()
    accumulation = total // (micro * ranks)
    assert f"= {micro} per rank x {accumulation} accumulation x {ranks} ranks =" in output
    assert f"= {total * config.data.sequence_length:,} tokens a step" in output
    parameters = ", ".join(f"{name} {count:,}" for name, count in COUNTED(config).items())
    assert f"parameters: {parameters}" in lines
    phases = [line for line in lines if line.startswith("steps ")]
    assert len(phases) == (len(config.schedule.phases) + 1 if config.schedule.phases else 0)
    (summary,) = [line for line in lines if line.startswith("run: ")]
    assert summary.startswith(f"run: {config.schedule.max_steps:,} steps, ")
    assert "GiB a rank" in output


def test_dry_run_of_the_paper_s_large_model(capsys):
    """Facts 1.2, less the dead 512 x 1024 table of the discriminator; 3.246 GFLOP a token."""
    zero1 = ROOT / "ds_configs" / "zero1_bf16.json"
    words = ["--config", "deberta_v3_large", "--deepspeed_config", str(zero1), "--dry-run"]
    assert run([*words, "--world-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    discriminator = 435_589_121 - 512 * 1024
    assert f"parameters: generator {284_561_508:,}, discriminator {discriminator:,}" in lines
    tokens = 500_000 * 8192 * 512
    flops = 3.2455e9 * tokens
    assert (
        f"run: 500,000 steps, {tokens:.4g} tokens, {flops:.4g} FLOPs"
        f" = {flops / 1e15 / 86_400:.4g} PetaFLOP-days"
    ) in lines
    assert not any(line.startswith("warning") for line in lines)


def test_dry_run_shows_the_phases(capsys):
    phases = "[{until_step=100, sequence_length=32}, {until_step=200, train_batch_size=16}]"
    assert run([*DRY, f"schedule.phases={phases}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("steps ")] == [
        "steps 0 to 99: 32 sequences of 32 = 1,024 tokens a step",
        "steps 100 to 199: 16 sequences of 128 = 2,048 tokens a step",
        "steps 200 to 299: 32 sequences of 128 = 4,096 tokens a step",
    ]
    tokens = 100 * (1_024 + 2_048 + 4_096)
    (summary,) = [line for line in lines if line.startswith("run: ")]
    assert summary.startswith(f"run: 300 steps, {tokens:.4g} tokens, ")


def test_dry_run_refuses_a_phase_that_the_ranks_cannot_split(capsys):
    phases = "schedule.phases=[{until_step=100, train_batch_size=24}]"
    assert run([*DRY, phases]) == EXIT_USAGE
    errors = capsys.readouterr().err
    assert "schedule.phases[0].train_batch_size 24 is not a multiple of 16 per rank x 1" in errors
    assert "the nearest that are: 16, 32" in errors


def test_dry_run_takes_a_recipe(capsys):
    words = ["--config", "deberta_v3_base", *DRY[2:]]
    assert run([*words, "recipe=released_code"]) == 0
    output = capsys.readouterr().out
    assert "run: 1,000,000 steps, " in output
    assert "train_batch_size is 32, the preset's source used 256" in output


def test_dry_run_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([*DRY, "run.folder=runs/mine"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_dry_run_looks_at_the_data(dataset_folder, tiny_run, capsys):
    words = ["--config", str(tiny_run()), *DRY[2:], f"data.path={dataset_folder}"]
    assert run(words) == 0
    data = Dataset.open(dataset_folder)
    tokens = data.split_tokens("train")
    epochs = 12 * 32 / -(-tokens // 30)
    assert f"data: {tokens:,} training tokens, {epochs:.3g} epochs" in capsys.readouterr().out
    # Half of the steps with half of the tokens: passes of both lengths add up.
    assert run([*words, "schedule.phases=[{until_step=6, sequence_length=16}]"]) == 0
    epochs = 6 * 32 / -(-tokens // 14) + 6 * 32 / -(-tokens // 30)
    assert f"data: {tokens:,} training tokens, {epochs:.3g} epochs" in capsys.readouterr().out
