"""`deberta plan`: one choice of settings, its sizes against the networks."""

import pytest
import torch

from data_prep.errors import UserError
from pipeline import masking, masking_words
from pipeline.config import ObjectiveSection
from pipeline.config_loading import load_run_config, preset_names
from pipeline.modeling import vocabulary_head
from pipeline.modeling.kernels import serving
from pipeline.modeling.pair import NetworkPair
from pipeline.optimizer import NO_DECAY_NAMES, parameter_groups
from pipeline.plan import activations, parameters
from pipeline.plan.devices import GPUS, Cluster, gpu_type
from pipeline.plan.gathering import gathered_times
from pipeline.plan.parameters import engine_parameters
from pipeline.plan.search import propose
from pipeline.plan.sharding import Sharding
from tests.planning import EIGHT, H100, LARGE, deepspeed_of, plan_of, with_model


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
    assert activations.FUSED_HEAD_SIZES == serving.HEAD_SIZES
    assert activations._WORD_PIECES == masking_words.MAX_WORD_PIECES
    for length in (8, 128, 512, 700):
        for law in ("uniform", "windowed"):
            for whole in (False, True):
                objective = ObjectiveSection(masking_law=law, whole_word_masking=whole)
                planned = activations.masked_slots(length, objective)
                assert planned == masking.num_masked_slots(length, objective)


@pytest.mark.parametrize("kind", ["attention", "full"])
def test_recomputing_costs_time_and_saves_memory(kind):
    plain, saving = plan_of(LARGE), plan_of(with_model(LARGE, activation_checkpointing=kind))
    assert saving.step.computing > plain.step.computing
    assert saving.peak.total < plain.peak.total


def test_what_is_not_modelled_is_refused():
    for key, value in {"zero_quantized_weights": True, "zero_hpz_partition_size": 8}.items():
        with pytest.raises(UserError, match=rf"test.json: zero_optimization.{key} cannot be plan"):
            plan_of(LARGE, zero_optimization={"stage": 3, key: value})
    with pytest.raises(UserError, match=r"zero_optimization.stage3_max_reuse_distance=0 cannot be"):
        plan_of(LARGE, zero_optimization={"stage": 3, "stage3_max_reuse_distance": 0})


def test_two_networks_in_one_engine_are_planned_where_their_weights_stay():
    joint = load_run_config("electra_base")
    elements = engine_parameters(joint)["joint"].elements
    enough = {"stage3_prefetch_bucket_size": elements, "stage3_max_live_parameters": elements}
    plan_of(joint, train_batch_size=256, zero_optimization={"stage": 3, **enough})
    for key in enough:
        less = {"stage": 3, **enough, key: elements - 1}
        told = (
            rf"test.json: stage 3 .*{key}={elements - 1}, below their {elements} par.*larger {key}"
        )
        with pytest.raises(UserError, match=told):
            plan_of(joint, train_batch_size=256, zero_optimization=less)
    alternatives = propose(joint, deepspeed_of(joint, train_batch_size=256), EIGHT)
    assert {each.stage for each in alternatives} == {1, 2}


def test_weights_that_stay_are_gathered_once_and_others_again():
    """Large as it is, by the keys' defaults and by smaller ones."""

    def times(name, **keys):
        zero = {"stage": 3, "stage3_param_persistence_threshold": 100_000, **keys}
        sharding = Sharding(deepspeed_of(LARGE, zero_optimization=zero), 8)
        engine = engine_parameters(LARGE)[name]
        found = gathered_times(LARGE, sharding, engine, name)
        return dict(zip([each.name for each in engine.ordered], found, strict=True))

    for name in ("generator", "discriminator"):
        assert set(times(name).values()) == {0, 1}
        none = times(name, stage3_max_reuse_distance=1000, stage3_prefetch_bucket_size=1000)
        assert none["deberta.encoder.layer.3.output.dense.weight"] == 2
        assert none["deberta.encoder.layer.3.output.LayerNorm.weight"] == 0
    word_table = "deberta.embeddings.word_embeddings.weight"
    assert times("generator", stage3_max_reuse_distance=100_000_000)[word_table] == 2


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


def test_old_gpus_refuse_what_they_cannot_compute():
    old = Cluster.of(gpu_type("v100"), 8, 8, 100.0)
    with pytest.raises(
        UserError, match=r"--gpu v100 has no bf16, which test.json asks for; plan w"
    ):
        plan_of(LARGE, old)
    half = {"bf16": {"enabled": False}, "fp16": {"enabled": True}}
    assert plan_of(LARGE, old, **half).mfu > 0
    fused = with_model(LARGE, attention_backend="triton")
    with pytest.raises(UserError, match=r"--gpu v100 cannot run model.attention_backend=triton"):
        plan_of(fused, old, **half)


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("cpu", None),
    ],
)
def test_a_device_is_of_one_type(device, key):
    assert [gpu.key for gpu in GPUS if gpu.is_type_of(device)] == ([key] if key else [])


def test_every_type_has_a_rate_of_its_own():
    """None takes the rate of a type whose name it contains."""
    expected = {"a100": 312, "a100-40": 312, "l40s": 362, "a10": 125, "l4": 121, "rtx4090": 165}
    assert {key: gpu_type(key).half_flops / 1e12 for key in expected} == expected
    assert all(gpu.fp32_flops < gpu.half_flops for gpu in GPUS)
