"""Throughput between rows: against a clock that the test turns."""

import time

import pytest
import torch

from pipeline import throughput
from pipeline.config_loading import load_run_config
from pipeline.flops import training_flops_per_token
from pipeline.runtime import World
from pipeline.throughput import ForwardTimer, Throughput


class Clock:
    """A monotonic clock that stands still until somebody turns it."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


@pytest.fixture
def config():
    return load_run_config("demo", [])


def measure(config, clock, device, **world):
    return Throughput(config, World(0, 0, world.get("world_size", 1), torch.device(device)))


def take_steps(meter, clock, count, waits=0.5, computes=1.5):
    for _ in range(count):
        with meter.waiting_for_data():
            clock.seconds += waits
        clock.seconds += computes
        meter.count_step(32, 128)


def test_tokens_and_waiting(config, clock):
    meter = measure(config, clock, "cpu")
    take_steps(meter, clock, 3)
    figures = meter.take()
    assert figures["perf/tokens_per_second"] == 3 * 32 * 128 / 6
    assert figures["perf/data_wait_fraction"] == 0.25
    assert figures["perf/step_seconds"] == 2.0
    assert 0.01 < figures["perf/memory_gib"] < 100
    assert "perf/mfu" not in figures, "nobody knows this CPU's peak"


def test_evaluations_and_commits_do_not_count(config, clock):
    meter = measure(config, clock, "cpu")
    take_steps(meter, clock, 2)
    with meter.paused():
        clock.seconds += 1000
    take_steps(meter, clock, 1)
    assert meter.take()["perf/step_seconds"] == 2.0


def test_every_row_starts_over(config, clock):
    meter = measure(config, clock, "cpu")
    take_steps(meter, clock, 3)
    meter.take()
    take_steps(meter, clock, 1, waits=0.0, computes=4.0)
    figures = meter.take()
    assert figures["perf/step_seconds"] == 4.0
    assert figures["perf/data_wait_fraction"] == 0.0


def test_a_row_without_steps(config, clock):
    assert measure(config, clock, "cpu").take()["perf/tokens_per_second"] == 0.0


def test_steps_of_another_length_count_their_own_work(config, clock, monkeypatch):
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(throughput.torch.cuda, "max_memory_allocated", lambda device: 0)
    meter = measure(config, clock, "cuda")
    meter.count_step(32, 128)
    meter.count_step(8, 64)
    clock.seconds += 2.0
    figures = meter.take()
    assert figures["perf/tokens_per_second"] == (32 * 128 + 8 * 64) / 2
    long, short = (training_flops_per_token(config, length) for length in (128, 64))
    flops = 32 * 128 * long + 8 * 64 * short
    assert figures["perf/mfu"] == pytest.approx(flops / 2 / 989e12)


def test_mfu_of_all_devices(config, clock, monkeypatch):
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(throughput.torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    meter = measure(config, clock, "cuda", world_size=4)
    take_steps(meter, clock, 5)
    figures = meter.take()
    rate = 5 * 32 * 128 / 10
    assert figures["perf/mfu"] == pytest.approx(
        rate * training_flops_per_token(config) / (4 * 989e12)
    )
    assert figures["perf/memory_gib"] == 3.0


def test_the_seconds_of_a_step(config, clock):
    meter = measure(config, clock, "cpu")
    clock.seconds += 2.0
    assert meter.count_step(32, 128) == 2.0
    with meter.paused():
        clock.seconds += 60.0
    clock.seconds += 1.5
    meter.take()
    assert meter.count_step(32, 128) == 1.5, "a row and a commit begin no step"


def test_forward_passes_are_timed_alone():
    timer = ForwardTimer(torch.device("cpu"))
    with timer.running():
        time.sleep(0.05)
    with timer.running():
        time.sleep(0.05)
    assert timer.take_seconds() >= 0.1
    assert timer.take_seconds() == 0.0
