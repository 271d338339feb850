"""`deberta plan`: its sizes against the networks, its speeds against their anchors, its words."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from data_prep.errors import UserError
from pipeline import masking, masking_words
from pipeline.commands_plan import plan_command
from pipeline.config import DataSection, ObjectiveSection
from pipeline.config_loading import load_run_config, preset_names
from pipeline.ds_config import check_deepspeed_config
from pipeline.modeling import vocabulary_head
from pipeline.modeling.kernels import traffic as kernel_traffic
from pipeline.modeling.pair import NetworkPair, shared_rows
from pipeline.optimizer import NO_DECAY_NAMES, parameter_groups
from pipeline.plan import activations, measurements, parameters
from pipeline.plan.devices import GPUS, Cluster, gpu_type
from pipeline.plan.planning import (
    default_deepspeed,
    evaluate,
    fastest,
    other_backends,
    propose,
)
from pipeline.plan.report import figures
from pipeline.plan.speed import LayerWork, token_seconds
from tests.benchmarks.traffic import our_traffic
from tests.numerics.test_plan_activations import run as small_run
from tests.worlds import ROOT

H100 = gpu_type("h100")
EIGHT = Cluster.of(H100, 8, 8, 400.0)
LARGE = load_run_config("deberta_v3_large")


def plan_of(config, cluster=EIGHT, **changes):
    return evaluate(config, deepspeed_of(config, **changes), cluster)


def deepspeed_of(config, **changes):
    document = {**default_deepspeed(config).raw, "train_micro_batch_size_per_gpu": 16, **changes}
    return check_deepspeed_config(document, "test.json")


def with_model(config, **changes):
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


@pytest.mark.parametrize("preset", preset_names())
def test_parameters_are_those_of_the_networks(preset):
    config = load_run_config(preset)
    with torch.device("meta"):
        pair = NetworkPair(config)
    planned = parameters.network_parameters(config)
    for name, found in planned.items():
        network = getattr(pair, name)
        assert [(each.name, each.shape) for each in found] == [
            (key, tuple(value.shape)) for key, value in network.named_parameters()
        ]
        for group in parameter_groups(network.named_parameters(), 0.01):
            decays = group["name"] == "decay"
            assert [each.elements for each in found if each.decays == decays] == [
                value.numel() for value in group["params"]
            ]
    trained = pair.trained_modules()
    engines = parameters.engine_parameters(config)
    assert engines.keys() == trained.keys()
    for name, module in trained.items():
        assert engines[name].elements == sum(value.numel() for value in module.parameters())


def test_what_is_written_twice_agrees():
    """The planner does not import torch, and so has some constants of its own."""
    assert parameters._NO_DECAY_NAMES == NO_DECAY_NAMES
    assert activations.CHUNK_IDS == vocabulary_head.CHUNK_IDS
    assert activations._WORD_PIECES == masking_words.MAX_WORD_PIECES
    for length in (8, 128, 512, 700):
        for law in ("uniform", "windowed"):
            for whole in (False, True):
                objective = ObjectiveSection(masking_law=law, whole_word_masking=whole)
                planned = activations.masked_slots(length, objective)
                assert planned == masking.num_masked_slots(length, objective)


def test_flops_a_token_are_what_torch_counts():
    """The minimal algorithm's operations, which `eager` runs and no more, against a count."""
    config = small_run("eager", dropout=0.0, hidden_size=128, position_buckets=4)
    config = config.model_copy(update={"data": DataSection(sequence_length=64)})
    deepspeed = deepspeed_of(LARGE, train_batch_size=64, train_micro_batch_size_per_gpu=8)
    plan = evaluate(config, deepspeed, EIGHT)
    pair, sequences, length = NetworkPair(config), 16, 64
    slots = activations.masked_slots(length, config.objective)
    ids = torch.randint(4, 100, (sequences, length))
    positions = torch.arange(slots).expand(sequences, slots)
    valid = torch.ones(sequences, slots, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        pair.generator(ids, None, positions, valid, ids[:, :slots], None, None)
        base = shared_rows(pair.generator, pair.discriminator, ids)
        pair.discriminator(ids, base, None, torch.zeros(sequences, length), None)
    forward = counter.get_total_flops() / (sequences * length)
    # mask_prob is a share of tokens; a sequence has a whole number of slots.
    assert plan.flops_per_token == pytest.approx(3 * forward, rel=0.01)
    figure = next(each for each in figures(plan, None) if each.name == "FLOPs a token")
    assert figure.kind == "counted"
    assert figure.value == plan.flops_per_token


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_bytes_of_a_layer_are_those_of_its_operations(backend, dropout):
    """Against a count of what torch's operations read and write at large's shape."""
    counted = our_traffic(backend, compiles=False, dropout=dropout).kib_per_token
    config = with_model(LARGE, attention_backend=backend, compile="none")
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    network = LARGE.discriminator.model_copy(update=changes)
    planned = LayerWork(config, network, 512, H100, "bf16").moved_bytes() / 1024
    assert planned == pytest.approx(counted, rel=0.03)


def test_bytes_of_fused_attention_are_those_that_the_kernels_document():
    shape = kernel_traffic.AttentionShape(16, 64, 512, 512, 16)
    steps = kernel_traffic.forward_traffic(shape) + kernel_traffic.backward_traffic(shape)
    network = LARGE.discriminator
    config = with_model(LARGE, attention_backend="triton", compile="layer")
    planned = LayerWork(config, network, 512, H100, "bf16")._moved_bytes()["scores"]
    assert planned == pytest.approx(sum(step.bytes for step in steps), rel=0.02)


def test_a_fused_compiled_layer_is_fastest():
    """Where draws are left out; with them, the vocabulary's noise is a third of the time."""
    rates = {
        (backend, kind): 1
        / token_seconds(
            with_model(LARGE, attention_backend=backend, compile=kind), H100, "bf16", 512
        )
        for backend, kind in itertools.product(("triton", "torch", "eager"), ("none", "layer"))
    }
    assert max(rates, key=rates.__getitem__) == ("triton", "layer")
    assert rates["triton", "layer"] < 114_000  # what the roofline gives without draws


def test_speed_falls_with_dropout_that_is_not_compiled():
    slow, fast = (
        token_seconds(with_model(LARGE, compile=kind), H100, "bf16", 512)
        for kind in ("none", "layer")
    )
    assert slow > 2 * fast


@pytest.mark.parametrize("kind", ["attention", "full"])
def test_recomputing_costs_time_and_saves_memory(kind):
    plain, saving = plan_of(LARGE), plan_of(with_model(LARGE, activation_checkpointing=kind))
    assert saving.step.computing > plain.step.computing
    assert saving.peak.total < plain.peak.total


def test_a_proposal_fits_and_is_the_fastest():
    cluster = Cluster.of(gpu_type("a100-40"), 8, 8, 400.0)
    tried = propose(LARGE, default_deepspeed(LARGE), cluster)
    best = fastest(tried)
    assert best is not None
    assert {(each.stage, each.checkpointing) for each in tried} == {
        (stage, kind) for stage in (1, 2, 3) for kind in ("none", "attention", "full")
    }
    for each in tried:
        if each.best is not None:
            assert each.best.peak.total <= cluster.gpu.memory_bytes
            assert each.best.run_seconds >= best.run_seconds / 1.05
            assert each.stage >= best.sharding.stage or each.best.run_seconds > best.run_seconds
        if each.too_large is not None:
            assert each.too_large.peak.total > cluster.gpu.memory_bytes
    assert any(each.too_large is not None for each in tried)


def test_nothing_fits_on_a_small_gpu(capsys):
    config = ["generator.num_hidden_layers=400"]
    plan_command("deberta_v2_xxlarge", config, gpus=1, gpu="a100-40")
    assert "nothing fits: take GPUs with more memory" in capsys.readouterr().out


def test_fp32_may_also_be_replicated():
    fp32 = deepspeed_of(LARGE, bf16={"enabled": False}, data_types={"grad_accum_dtype": "fp32"})
    stages = {each.stage for each in propose(LARGE, fp32, EIGHT)}
    assert stages == {0, 1, 2, 3}


def test_what_is_not_modelled_is_refused():
    for key, value in {"zero_quantized_weights": True, "zero_hpz_partition_size": 8}.items():
        with pytest.raises(UserError, match=rf"test.json: zero_optimization.{key} cannot be plan"):
            plan_of(LARGE, zero_optimization={"stage": 3, key: value})


def test_more_gpus_take_less_time_and_more_communication():
    few, many = (plan_of(LARGE, Cluster.of(H100, n, 8, 400.0)) for n in (8, 64))
    assert many.run_seconds < few.run_seconds / 6
    assert many.gpu_hours > few.gpu_hours
    slow = Cluster.of(H100, 64, 8, 10.0)
    assert plan_of(LARGE, slow).step.exposed > 10 * many.step.exposed


def test_phases_count():
    """A run that begins with short sequences is shorter; its memory is that of the long ones."""
    words = ["schedule.phases=[{until_step=450_000, sequence_length=128}]"]
    short = load_run_config("deberta_v3_large", words)
    whole, phased = plan_of(LARGE), plan_of(short)
    assert phased.run_seconds < 0.5 * whole.run_seconds
    assert phased.peak.total == whole.peak.total
    expected = 8192 * (450_000 * 128 + 50_000 * 512)
    assert phased.storage.train_tokens == expected


def test_a_proposal_divides_the_batches_of_phases():
    config = load_run_config(
        "deberta_v3_large", ["schedule.phases=[{until_step=1000, train_batch_size=48}]"]
    )
    best = fastest(propose(config, default_deepspeed(config), EIGHT))
    assert best is not None
    assert best.batch.train_micro_batch_size_per_gpu in (1, 2)
    words = ["schedule.phases=[{until_step=1000, train_batch_size=36}]"]
    odd = load_run_config("deberta_v3_large", words)
    with pytest.raises(UserError, match=r"phases\[0\]\.train_batch_size 36 is not a multiple of 1"):
        propose(odd, default_deepspeed(odd), EIGHT)


def test_a_measured_speed_replaces_the_model():
    row = measurements.MeasuredStep(
        device="NVIDIA H100 80GB HBM3",
        hidden_size=1024,
        num_hidden_layers=24,
        task="rtd",
        sequence_length=512,
        sequences=16,
        attention_backend=LARGE.model.attention_backend,
        compile=getattr(LARGE.model, "compile", "none"),
        dropout=0.1,
        tokens_per_second=123_456.0,
        source="step-test.json",
        date="2030-01-01",
    )
    assert measurements.find_measurement([row], LARGE, gpu_type("a100"), 16, 512) is None
    assert measurements.find_measurement([row], LARGE, H100, 16, 128) is None
    plan = evaluate(LARGE, deepspeed_of(LARGE), EIGHT, [row])
    assert plan.step.computing == pytest.approx(8192 / 8 * 512 / 123_456)
    kinds = {each.name: each for each in figures(plan, None)}
    assert kinds["step"].kind == "measured"
    assert "step-test.json" in kinds["forward and backward passes"].source
    assert {each.kind for each in figures(plan_of(LARGE), None)} == {"counted", "modelled"}


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
    shape = {"sequences": 16, "length": 512, "dropout": 0.1}
    document = {"benchmark": "gpu-step", "size": "large", "shape": shape, "cells": cells}
    path = tmp_path / "gpu-step-large-nvidia-h200.json"
    path.write_text(json.dumps({**document, "device": "NVIDIA H200"}))
    (tmp_path / "gpu-step-tiny-epyc.json").write_text(json.dumps({**document, "device": "EPYC"}))
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


@pytest.mark.parametrize("row", measurements.measured_steps(), ids=lambda row: row.source)
def test_measured_points_agree_with_the_model(row):
    """Every point that a GPU has measured: speed to a third, activations to a quarter."""
    size = {384: "xsmall", 768: "base", 1024: "large"}[row.hidden_size]
    words = {"attention_backend": row.attention_backend, "compile": row.compile}
    config = with_model(load_run_config(f"deberta_v3_{size}"), **words)
    gpu = next(each for each in GPUS if row.device.startswith(each.name))
    rate = 1 / token_seconds(config, gpu, "bf16", row.sequence_length)
    assert row.tokens_per_second == pytest.approx(rate, rel=1 / 3)
    kept = activations.activation_bytes(config, row.sequences, row.sequence_length, 2)
    if row.beyond_state_bytes is not None:
        assert row.beyond_state_bytes == pytest.approx(max(kept.values()), rel=1 / 4)


def test_the_packages_measurements_are_those_of_the_results():
    """`python -m pipeline.plan.measurements tests/benchmarks/results` has been run."""
    assert measurements.measured_steps() == measurements.collect(
        ROOT / "tests" / "benchmarks" / "results"
    )


def test_other_backends_are_those_of_the_configuration():
    plans = other_backends(plan_of(LARGE))
    assert {"eager", "torch"} <= {plan.config.model.attention_backend for plan in plans}


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
        "proposed: micro batch",
        "attention backend  compile",
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
    assert re.search(r"in CPU memory, a rank +[\d.]+ GiB  counted", result.output)
    assert "fp32 masters" not in result.output


def test_a_dataset_is_measured(dataset_folder):
    result = deberta_plan("demo", f"data.path={dataset_folder}", "--gpus", "1")
    assert result.exit_code == 0, result.output
    assert re.search(rf"dataset .*epochs of {re.escape(str(dataset_folder))}", result.output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["deberta_v3_large", "--gpu", "h10"],
            "--gpu h10: no such GPU type, did you mean 'h100'? (known: h100, h100-nvl, h100-pcie,"
            " h200, b200, a100, a100-40, l40s)",
        ),
        (
            ["deberta_v3_large", "--gpus", "12"],
            "--gpus 12 are no full nodes of --gpus-per-node 8; the nearest that are: 8, 16",
        ),
        (
            ["deberta_v3_large", "--gpus", "24"],
            "No micro batch fits 24 ranks; use 16 ranks, or train_batch_size 8208",
        ),
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
