"""The settings that `deberta plan` proposes."""

from dataclasses import replace

import pytest

from data_prep.errors import UserError
from pipeline.config_loading import load_run_config
from pipeline.plan.devices import Cluster, gpu_type
from pipeline.plan.planning import evaluate
from pipeline.plan.search import (
    WORTH_SHARDING,
    Alternative,
    default_deepspeed,
    fastest,
    named_keys,
    propose,
)
from tests.planning import EIGHT, LARGE, deepspeed_of, plan_of

WAYS = {(backend, kind) for backend in ("torch", "triton") for kind in ("none", "layer")}


TORCH = ("torch", "none")


def proposed(config, cluster=EIGHT):
    return fastest(propose(config, default_deepspeed(config, cluster), cluster), config)


def test_a_proposal_fits_and_is_the_fastest():
    cluster = Cluster.of(gpu_type("a100-40"), 8, 8, 400.0)
    tried = propose(LARGE, default_deepspeed(LARGE, cluster), cluster)
    best = fastest(tried, LARGE)
    assert best is not None
    assert {
        (each.way, each.stage, each.config.model.activation_checkpointing) for each in tried
    } == {
        (way, stage, kind)
        for way in WAYS
        for stage in (1, 2, 3)
        for kind in ("none", "attention", "full")
    }
    for each in tried:
        if each.best is not None:
            assert each.best.peak.total <= cluster.gpu.memory_bytes
            assert each.best.run_seconds >= best.run_seconds / WORTH_SHARDING
            assert each.stage >= best.sharding.stage or each.best.run_seconds > best.run_seconds
        if each.too_large is not None:
            assert each.too_large.peak.total > cluster.gpu.memory_bytes
    assert any(each.too_large is not None for each in tried)
    assert (best.config.model.attention_backend, best.config.model.compile) == ("triton", "layer")


def test_a_micro_batch_is_as_lean_as_it_can_be():
    """The least memory among those that are a hundredth slower at most than the fastest."""
    jsons = {n: deepspeed_of(LARGE, train_micro_batch_size_per_gpu=n) for n in (1, 2, 4, 8, 16, 32)}
    plans = [evaluate(LARGE, each, EIGHT) for each in jsons.values()]
    best = next(each.best for each in propose(LARGE, jsons[1], EIGHT) if each.way == TORCH)
    assert best is not None
    fast = [p for p in plans if p.run_seconds <= 1.01 * min(q.run_seconds for q in plans)]
    assert best.peak.total == min(plan.peak.total for plan in fast)
    assert len(fast) > 1
    assert best.run_seconds > min(plan.run_seconds for plan in plans)


@pytest.mark.parametrize(("gain", "stage"), [(1.04, 1), (1.06, 2)])
def test_a_higher_stage_must_be_worth_it(gain, stage):
    low, high = (plan_of(LARGE, zero_optimization={"stage": each}) for each in (1, 2))
    high = replace(high, run_seconds=low.run_seconds / gain)
    best = fastest([Alternative(LARGE, 2, high, None), Alternative(LARGE, 1, low, None)])
    assert best is not None
    assert best.sharding.stage == stage


def test_what_the_configuration_names_is_kept():
    words = ["model.attention_backend=torch", "model.activation_checkpointing=full"]
    config = load_run_config("deberta_v3_large", words)
    best = proposed(config)
    assert best is not None
    model = best.config.model
    assert (model.attention_backend, model.compile) == ("torch", "layer")
    assert model.activation_checkpointing == "full"
    free = proposed(LARGE)
    assert free is not None
    assert free.run_seconds < best.run_seconds
    assert named_keys(config) == ["attention_backend", "activation_checkpointing"]
    assert named_keys(LARGE) == []


def test_a_backend_for_comparison_is_planned_where_it_is_named():
    config = load_run_config("deberta_v3_large", ["model.attention_backend=disentangled_flash"])
    tried = propose(config, default_deepspeed(config, EIGHT), EIGHT)
    theirs = {("disentangled_flash", kind) for kind in ("none", "layer")}
    assert {each.way for each in tried} == WAYS | theirs
    theirs = fastest([each for each in tried if each.way == ("disentangled_flash", "none")])
    ours = fastest([each for each in tried if each.way == ("triton", "none")])
    assert theirs is not None
    assert ours is not None
    assert theirs.run_seconds > 1.2 * ours.run_seconds


def test_kernels_are_proposed_where_they_run():
    old = Cluster.of(gpu_type("v100"), 8, 8, 100.0)
    tried = propose(LARGE, default_deepspeed(LARGE, old), old)
    assert {each.way[0] for each in tried} == {"torch"}
    best = fastest(tried, LARGE)
    assert best is not None
    assert best.sharding.config.precision == "fp16"
    heads = [f"{network}.num_attention_heads=64" for network in ("generator", "discriminator")]
    narrow = load_run_config("deberta_v3_large", heads)
    tried = propose(narrow, default_deepspeed(narrow, EIGHT), EIGHT)
    assert {each.way[0] for each in tried} == {"torch"}


@pytest.mark.parametrize("key", ["l4", "a10", "rtx4090", "t4"])
def test_large_fits_small_gpus(key):
    """Sharded over eight of them, and with less micro batch; nothing need be recomputed."""
    cluster = Cluster.of(gpu_type(key), 8, 8, 100.0)
    best = proposed(LARGE, cluster)
    assert best is not None
    assert best.fits
    assert best.batch.train_micro_batch_size_per_gpu < 64


def test_fp32_may_also_be_replicated():
    fp32 = deepspeed_of(LARGE, bf16={"enabled": False}, data_types={"grad_accum_dtype": "fp32"})
    stages = {each.stage for each in propose(LARGE, fp32, EIGHT)}
    assert stages == {0, 1, 2, 3}


def test_a_proposal_divides_the_batches_of_phases():
    config = load_run_config(
        "deberta_v3_large", ["schedule.phases=[{until_step=1000, train_batch_size=48}]"]
    )
    best = proposed(config)
    assert best is not None
    assert best.batch.train_micro_batch_size_per_gpu in (1, 2, 3, 6)
    words = ["schedule.phases=[{until_step=1000, train_batch_size=36}]"]
    odd = load_run_config("deberta_v3_large", words)
    with pytest.raises(UserError, match=r"phases\[0\]\.train_batch_size 36 is not a multiple of 1"):
        proposed(odd)
