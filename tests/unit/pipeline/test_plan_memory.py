"""What one rank keeps, writes and needs at its peak, against real engines in a world of one."""

import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config_loading import load_run_config, preset_names
from pipeline.ds_config import check_deepspeed_config
from pipeline.engine_state import snapshot, write_snapshot
from pipeline.phases import train_schedule
from pipeline.plan.memory import peak_memory, with_overhead
from pipeline.plan.parameters import engine_parameters
from pipeline.plan.sharding import FP32_BYTES, STATE_KINDS, Sharding
from pipeline.plan.storage import TEXT_BYTES, plan_storage
from pipeline.plan.zero_memory import state_bytes
from tests import engines
from tests.numerics.test_plan_activations import LENGTH, run
from tests.planned_engines import (
    BF16,
    FP32,
    POINTS,
    Kept,
    assert_kept,
    storages,
    train_point,
    zero,
)

ONE_RANK = (
    "large, stage 0",
    "large, stage 1",
    "large, stage 2",
    "large, stage 3",
    "v2, stage 1",
    "electra, stage 1",
)
MICRO_BATCH = 8


@pytest.fixture
def launched(world, monkeypatch):
    """The world of this process, as `tests.engines.rig` hands it to DeepSpeed."""
    for name, value in engines.LAUNCHER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    return world


@pytest.mark.parametrize("name", ONE_RANK)
def test_bytes_kept_by_one_rank(launched, name):
    assert_kept(name, 1, [train_point(name, launched)])


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
@pytest.mark.parametrize("preset", preset_names())
def test_all_ranks_together_write_every_number_once(preset, ranks):
    """12 bytes a parameter at every stage, in real presets: none twice and none left out."""
    config = load_run_config(preset)
    for stage in range(4):
        document = {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "parameter_alignment": stage == 2},
            **FP32,
        }
        sharding = Sharding(check_deepspeed_config(document, "test.json"), ranks)
        for engine in engine_parameters(config).values():
            written = [sharding.state_bytes(engine, rank) for rank in range(ranks)]
            assert sum(written) == STATE_KINDS * FP32_BYTES * engine.elements
            kept = state_bytes(sharding, engine, 1)
            assert kept.masters + kept.moments + (kept.weights if stage == 0 else 0) >= written[0]
            if stage:
                assert kept.moments == pytest.approx(8 * engine.elements / ranks, rel=0.01)


def resident_bytes(engine) -> int:
    """Tensors that an engine keeps between two steps, each storage once."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    kept = Kept(engine)
    kept.after_step()
    more = storages(
        getattr(zero, "fp32_groups_gradients_flat", []),
        [getattr(zero, "grad_partitions_flat_buffer", None)],
        [getattr(each, "buffer", None) for each in getattr(zero, "ipg_buckets", {}).values()],
        [each.grad for each in parameters],
    )
    return sum(more.values()) + sum(kept.parts[part] for part in ("weights", "masters", "moments"))


def allocated_peak(run_step) -> int:
    """Largest number of bytes that were allocated at a time beyond those that there were before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run_step()
    assert profiler.profiler is not None
    kineto = profiler.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        now += change
        highest = max(highest, now)
    return highest


class Training:
    """Engines of a run, and steps on full sequences."""

    def __init__(self, config, deepspeed, world):
        from pipeline.engine import start_engines
        from pipeline.modeling.pair import NetworkPair
        from pipeline.objective_keys import ObjectiveKeys
        from pipeline.step import build_step

        plan = deepspeed.batch_plan(1)
        pair = NetworkPair(config)
        pair.init_weights(1)
        modules = pair.trained_modules()
        made = start_engines(
            modules, optimizer=config.optimizer, ds=deepspeed, plan=plan, world=world
        )
        self.engines = made.by_name
        self._keys = ObjectiveKeys(config.objective, 3, LENGTH, engines.VOCABULARY, "train")
        self._step = build_step(made, pair, config.objective, seed=3, plan=plan, world=world)

    def take(self, number):
        samples = [3 * (number * MICRO_BATCH + each) for each in range(MICRO_BATCH)]
        batches = [engines.sequence_batch(samples) for _ in range(2)]
        self._step(number, batches, self._keys, lambda _name: None)


PEAKS = {
    # Backend, checkpointing, dropout, precision, ZeRO, tolerance. What the operations of `eager`
    # hold besides results is estimated; a plan should err on the safe side.
    "bf16": ("torch", "none", 0.1, BF16, {"stage": 1}, 0.05),
    "fp32": ("torch", "none", 0.0, FP32, {"stage": 0}, 0.05),
    "attention": ("torch", "attention", 0.1, BF16, {"stage": 1}, 0.05),
    "full": ("torch", "full", 0.1, BF16, {"stage": 1}, 0.05),
    "eager": ("eager", "none", 0.1, BF16, {"stage": 1}, 0.08),
    "stage 3": ("torch", "none", 0.1, BF16, zero(3), 0.05),
    "logits": ("torch", "none", 0.0, FP32, {"stage": 0}, 0.1),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_of_a_step(launched, monkeypatch, name):
    """Weights, state and everything that a whole step allocates on a CPU."""
    backend, checkpointing, dropout, precision, zero, tolerance = PEAKS[name]
    config = run(backend, checkpointing, dropout)
    if name == "logits":
        model = config.model.model_copy(update={"vocab_size": 9001})
        config = config.model_copy(update={"model": model})
    monkeypatch.setattr(engines, "LENGTH", LENGTH)
    document = {
        "train_batch_size": 2 * MICRO_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        **precision,
    }
    deepspeed = check_deepspeed_config(document, "test.json")
    started = Training(config, deepspeed, launched)
    started.take(0)
    resident = sum(resident_bytes(engine) for engine in started.engines.values())
    measured = resident + allocated_peak(lambda: started.take(1))
    planned = peak_memory(
        config,
        Sharding(deepspeed, 1),
        engine_parameters(config),
        micro_batch=MICRO_BATCH,
        accumulation_steps=2,
        length=LENGTH,
    )
    assert planned.total == pytest.approx(measured, rel=tolerance)
    assert planned.phase == ("generator" if name == "logits" else "discriminator")
    assert with_overhead(planned, 8).total > with_overhead(planned, 1).total > planned.total


def test_bytes_of_a_checkpoint(launched, monkeypatch, tmp_path):
    """A file of every network, as a commit has it."""
    config = run()
    monkeypatch.setattr(engines, "LENGTH", LENGTH)
    document = {
        "train_batch_size": 2 * MICRO_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        **FP32,
    }
    deepspeed = check_deepspeed_config(document, "test.json")
    started = Training(config, deepspeed, launched)
    for name, engine in started.engines.items():
        write_snapshot(snapshot(engine, 0), tmp_path / name)
    written = sum((tmp_path / name).stat().st_size for name in started.engines)
    schedule = train_schedule(config, deepspeed.batch_plan(1))
    planned = plan_storage(config, engine_parameters(config), schedule, 1)
    assert planned.commit_bytes - TEXT_BYTES == pytest.approx(written, rel=0.01)
    # The newest three of ten steps' one commit, and one that is being written.
    assert planned.disk_bytes == 2 * planned.commit_bytes


def test_points_are_enough():
    """Points of (preset, JSON, ranks) whose state is compared with real engines."""
    assert len(POINTS) + len(ONE_RANK) >= 20
