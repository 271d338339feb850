"""Sums of `deberta plan` where the answer can be worked out by hand."""

import pytest

from pipeline.config_loading import load_run_config
from pipeline.flops import training_flops_per_token
from pipeline.phases import train_schedule
from pipeline.plan import speed, zero_memory
from pipeline.plan.devices import Cluster
from pipeline.plan.memory import computing_bytes, peak_memory, with_overhead
from pipeline.plan.parameters import EngineParameters, Parameter, engine_parameters
from pipeline.plan.sharding import Sharding
from pipeline.plan.speed import LayerWork, micro_step_seconds, step_seconds, token_seconds
from pipeline.plan.storage import plan_storage
from pipeline.plan.zero_memory import state_bytes
from tests.planning import EIGHT, H100, LARGE, deepspeed_of, plan_of, with_model

BANDWIDTH = speed.MEMORY_SHARE * H100.memory_bytes_per_second
FP32 = {"bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}


def layer_seconds(kind):
    config = with_model(LARGE, activation_checkpointing=kind)
    return LayerWork(config, LARGE.discriminator, 512, H100, "bf16").seconds_per_token()


def test_what_is_computed_again_is_a_third():
    """A forward pass of both passes' three: of the layer, or of its attention."""
    plain, attention, whole = map(layer_seconds, ("none", "attention", "full"))
    assert whole == pytest.approx(plain * 4 / 3)
    work = LayerWork(LARGE, LARGE.discriminator, 512, H100, "bf16")
    inside = work._attention_seconds() + work._moved_bytes()["scores"] / BANDWIDTH
    assert attention == pytest.approx(plain + inside / 3)


def test_dense_products_are_three_forward_passes():
    network = LARGE.discriminator
    width, inner = network.hidden_size, network.intermediate_size
    weights = 4 * width**2 + 2 * width * inner
    assert LayerWork(LARGE, network, 512, H100, "bf16")._dense_flops() == 3 * 2 * weights


def test_a_step_of_a_micro_batch_has_the_gradients_of_its_tables():
    """In bf16, large has two tables of 128,100 x 1,024, which six passes write and read."""
    seconds = micro_step_seconds(LARGE, H100, "bf16", micro_batch=64, length=512)
    tokens = 64 * 512 * token_seconds(LARGE, H100, "bf16", 512)
    tables = 2 * 128_100 * 1024 * 2
    assert seconds == pytest.approx(tokens + 6 * tables / BANDWIDTH)
    one = micro_step_seconds(LARGE, H100, "bf16", micro_batch=1, length=8)
    assert one > 20 * 8 * token_seconds(LARGE, H100, "bf16", 8), "it is bound by launches"


def test_the_decoder_computes_its_rows_twice_where_it_is_enhanced():
    objective = LARGE.objective.model_copy(update={"enhanced_mask_decoder": False})
    once = LARGE.model_copy(update={"objective": objective})
    shares = [speed._decoder_share(config, 512, 0.15) for config in (LARGE, once)]
    rows = 4 * 1024**2 + 4 * 1024 * (4096 + 512) + 2 * 512 * 1024
    keys = 4 * 1024**2 + 2 * 512 * 1024
    assert shares[0] == pytest.approx((keys + 0.3 * rows) / (keys + rows))
    assert shares[0] - shares[1] == pytest.approx(0.15 * rows / (keys + rows))


def step_of(ranks, **changes):
    """An optimizer step without computing and sending, and the elements of large."""
    engines = engine_parameters(LARGE)
    sharding = Sharding(deepspeed_of(LARGE, **changes), ranks)
    step = step_seconds(
        sharding,
        engines,
        Cluster.of(H100, ranks, 8, 400.0),
        micro_seconds=0.0,
        accumulation_steps=1,
        sent={},
    )
    return step, sum(engine.elements for engine in engines.values())


def test_an_update_moves_what_adam_norms_and_sums_move():
    """Adam: 28 bytes and the weight; a norm 12; a sum reads a gradient and a sum, writes a sum."""
    step, elements = step_of(8, zero_optimization={"stage": 1})
    expected = (28 + 2) * elements / 8 + 12 * elements + (2 + 2 * 4) * elements
    assert step.updating == pytest.approx(expected / BANDWIDTH, rel=1e-3)
    step, _ = step_of(8, zero_optimization={"stage": 2})
    expected = (28 + 2 + 12 + 2 + 2 * 4) * elements / 8
    assert step.updating == pytest.approx(expected / BANDWIDTH, rel=1e-3)


def test_an_update_beside_the_gpu_waits_for_links_and_the_host():
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    step, elements = step_of(8, zero_optimization=zero)
    expected = (4 + 2) * elements / 8 / speed.PCIE_BYTES_PER_SECOND
    expected += (28 + 2) * elements / 8 / speed.HOST_BYTES_PER_SECOND
    expected += (2 + 2 * 4) * elements / 8 / BANDWIDTH
    assert step.updating == pytest.approx(expected, rel=1e-3)


def test_communication_that_outlasts_computing_is_exposed():
    engines, ring = engine_parameters(LARGE), EIGHT.ring_bytes_per_second
    sharding = Sharding(deepspeed_of(LARGE), 8)

    def exposed(computing, hidden, alone):
        step = step_seconds(
            sharding,
            engines,
            EIGHT,
            micro_seconds=computing / 4,
            accumulation_steps=4,
            sent={True: hidden * ring, False: alone * ring},
        )
        assert step.communicating == pytest.approx(hidden + alone)
        assert step.total == pytest.approx(step.computing + step.updating + step.exposed)
        return step.exposed

    assert exposed(10.0, 4.0, 1.0) == pytest.approx(0.5 * 4.0 + 1.0)
    assert exposed(1.0, 4.0, 0.0) == pytest.approx(4.0 - 1.0)


@pytest.mark.parametrize(
    ("gpus", "a_node", "gbit", "expected"),
    [(8, 8, 400.0, 360e9), (4, 8, 1.0, 360e9), (16, 8, 100.0, 100e9), (64, 8, 8000.0, 360e9)],
)
def test_a_ring_is_as_fast_as_its_slowest_link(gpus, a_node, gbit, expected):
    cluster = Cluster.of(H100, gpus, a_node, gbit)
    assert cluster.num_nodes == -(-gpus // a_node)
    assert cluster.ring_bytes_per_second == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "interval", "keep", "every"),
    [(1000, 100, 3, 200), (1000, 100, 3, 0), (950, 100, 3, 300), (90, 100, 3, 100)],
)
@pytest.mark.parametrize("ranks", [1, 8])
def test_commits_that_are_kept_are_those_of_retention(steps, interval, keep, every, ranks):
    """Every interval, and the last step; of them the newest, multiples of a milestone, one more."""
    words = [f"schedule.max_steps={steps}", f"checkpoint.interval_steps={interval}"]
    words += [f"checkpoint.keep_last={keep}", f"checkpoint.milestone_interval_steps={every}"]
    config = load_run_config("deberta_v3_large", [*words, "schedule.warmup_steps=0"])
    commits = [*range(interval, steps, interval), steps]
    old, newest = commits[:-keep], commits[-keep:]
    milestones = [step for step in old if every and step % every == 0]
    schedule = train_schedule(config, deepspeed_of(config).batch_plan(8))
    storage = plan_storage(config, engine_parameters(config), schedule, ranks)
    assert storage.milestones == len(milestones)
    assert storage.kept_commits == len(newest) + len(milestones) + 1
    assert storage.disk_bytes == storage.commit_bytes * storage.kept_commits


def test_phases_add_up_step_by_step():
    """A phase of half the batch has half the micro steps, and its own number of steps."""
    words = ["schedule.phases=[{until_step=100_000, train_batch_size=4096}]"]
    phased = plan_of(load_run_config("deberta_v3_large", words))
    whole, half = plan_of(LARGE), plan_of(LARGE, train_batch_size=4096)
    assert half.step.computing == pytest.approx(whole.step.computing / 2)
    expected = 100_000 * half.step.total + 400_000 * whole.step.total
    assert phased.run_seconds == pytest.approx(expected)


def test_speeds_of_a_plan_are_its_seconds():
    plan = plan_of(LARGE, Cluster.of(H100, 64, 8, 400.0))
    assert plan.tokens_per_second == pytest.approx(8192 * 512 / plan.step.total)
    assert plan.gpu_hours == pytest.approx(500_000 * plan.step.total * 64 / 3600)
    flops = training_flops_per_token(LARGE) * plan.tokens_per_gpu_second
    assert plan.mfu == pytest.approx(flops / 989.4e12, rel=1e-3)


def peak_of(config, ranks=8, **changes):
    deepspeed = deepspeed_of(config, **changes)
    return peak_memory(
        config,
        Sharding(deepspeed, ranks),
        engine_parameters(config),
        micro_batch=16,
        accumulation_steps=2,
        length=512,
    )


def test_a_gpu_loses_memory_to_its_context_and_its_allocator():
    peak = peak_of(LARGE)
    for ranks, context in ((1, 750 << 20), (8, (750 + 512) << 20)):
        whole = with_overhead(peak, ranks)
        assert whole.total == peak.total + context + round(0.04 * peak.total)
        assert whole.phases[peak.phase] == whole.total


def test_a_batch_lies_on_the_gpu_with_its_masks():
    """Ids and masked ids; a slot's position, target and truth; corrupted ids and labels."""
    slots = round(0.15 * 512)
    expected = 32 * (2 * 8 * 512 + slots * (2 * 8 + 1) + 512 * (8 + 1))
    assert peak_of(LARGE).parts["batches"] == expected


def test_a_joint_pass_keeps_both_networks_and_one_workspace():
    joint = load_run_config("electra_base")
    objective = joint.objective.model_copy(update={"update": "decoupled"})
    apart = joint.model_copy(update={"objective": objective})
    (both,) = computing_bytes(joint, 2, 16, 512).values()
    parts = [*computing_bytes(apart, 2, 16, 512).values()]
    for name, count in both.items():
        found = [each[name] for each in parts if name in each]
        is_work = name in ("workspace of a layer", "logits of a chunk")
        assert count == (max(found) if is_work else sum(found)), name


def test_gradients_are_gone_when_adam_has_a_copy():
    """Stage 1 in fp16: whole gradients until they are reduced, and then a flat part."""
    fp16 = {"bf16": {"enabled": False}, "fp16": {"enabled": True}}
    peak = peak_of(LARGE, zero_optimization={"stage": 1}, **fp16)
    for name, engine in engine_parameters(LARGE).items():
        state = state_bytes(Sharding(deepspeed_of(LARGE, **fp16), 8), engine, 2)
        assert state.frees_sums
        assert state.gradients > 0
        saved = peak.phases[f"{name}, reduction"] - peak.phases[f"{name}, update"]
        assert saved >= state.gradients + state.reduction - state.update


def engine_of(*sizes):
    ordered = tuple(Parameter(f"p{n}.weight", (size,)) for n, size in enumerate(sizes))
    return EngineParameters(ordered, (ordered,))


def test_a_tensor_alone_is_not_copied_to_be_reduced():
    """DeepSpeed flattens a bucket of several; one that is larger than a bucket goes as it is."""
    most = zero_memory.FLATTENED_ELEMENTS
    assert zero_memory._flattened([10]) == 0
    assert zero_memory._flattened([10, 20]) == 30
    assert zero_memory._flattened([most + 1, 10]) == 0
    assert zero_memory._flattened([10, most, 5, 6]) == most + 10


@pytest.mark.parametrize(("keys", "buffers"), [({}, 1), ({"overlap_comm": True}, 2)])
def test_buckets_are_two_where_communication_overlaps(keys, buffers):
    zero = {"stage": 2, "reduce_bucket_size": 1000, "contiguous_gradients": True, **keys}
    sharding = Sharding(deepspeed_of(LARGE, zero_optimization=zero), 8)
    assert state_bytes(sharding, engine_of(4096, 4096), 1).buckets == buffers * 1000 * 2


def test_offloaded_state_is_on_the_host_with_what_travels():
    """Masters and averages, fp32 gradients on their way there, narrow weights on their way back."""
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    sharding = Sharding(deepspeed_of(LARGE, zero_optimization=zero), 8)
    state = state_bytes(sharding, engine_of(8192, 8192), 1)
    assert state.host == (4 + 8 + 4 + 2) * 16384 // 8
    assert (state.masters, state.moments) == (0, 0)


def test_small_parameters_stay_until_the_model_s_limit():
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100}
    engine = engine_of(60, 5000, 60, 60)

    def kept(**keys):
        sharding = Sharding(deepspeed_of(LARGE, zero_optimization={**zero, **keys}), 8)
        return [each.name for each in sharding.persistent(engine)]

    assert kept() == ["p0.weight", "p2.weight", "p3.weight"]
    assert kept(stage3_model_persistence_threshold=130) == ["p0.weight", "p2.weight"]
    assert kept(stage3_model_persistence_threshold=10) == []


def test_whole_weights_stay_as_far_as_they_are_reused():
    """Half of the longer of two distances, without the parameters that are always there."""
    engine = engine_of(40_000, 60_000, 10)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100}

    def gathered(reuse, prefetch, ranks=8):
        keys = {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": prefetch}
        sharding = Sharding(deepspeed_of(LARGE, zero_optimization={**zero, **keys}), ranks)
        return state_bytes(sharding, engine, 1).gathered

    assert gathered(10_000, 1_000) == 2 * 5_000
    assert gathered(1_000, 10_000) == 2 * 5_000
    assert gathered(10**9, 1_000) == 2 * 100_000
    assert gathered(10**9, 1_000, ranks=1) == 0
