"""Spikes of losses: what is one, what is none, and what a resumed run decides."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import SafetySection
from pipeline.spikes import MIN_STEPS, NEW_LEVEL_STEPS, Spike, SpikeDetector

PHASE = (512, 256)


def detector(**keys):
    return SpikeDetector(SafetySection(**keys))


def noisy(count, level=5.0, noise=0.05, seed=1):
    generator = random.Random(seed)
    return [generator.gauss(level, noise) for _ in range(count)]


def observe_all(spikes, values, name="mlm"):
    return [spikes.observe({name: value}, PHASE) for value in values]


def test_the_score_is_the_robust_one():
    """Against the definition, by hand: median 5, MAD 1.5."""
    spikes = detector(spike_window_steps=16, spike_threshold=3.0)
    window = [5.0, 2.0, 3.5, 6.5, 8.0, 5.0, 3.5, 6.5] * 2
    assert observe_all(spikes, window) == [None] * 16
    threshold = 5 + 3.0 * 1.4826 * 1.5
    assert spikes.observe({"mlm": threshold - 1e-6}, PHASE) is None
    found = SpikeDetector(SafetySection(spike_window_steps=16, spike_threshold=3.0))
    observe_all(found, window)
    spike = found.observe({"mlm": 20.0}, PHASE)
    assert spike == Spike("mlm", 20.0, 5.0, pytest.approx(15 / (1.4826 * 1.5)), 1)
    assert spike.explain() == (
        "mlm 20 is a spike: 6.7 robust deviations above the median 5 of the steps before"
    )


def test_only_what_lies_above_is_a_spike():
    spikes = detector()
    observe_all(spikes, noisy(60))
    assert spikes.observe({"mlm": 0.1}, PHASE) is None
    assert spikes.observe({"mlm": 9.0}, PHASE) is not None


@pytest.mark.parametrize("seed", range(20))
def test_no_alarm_for_noise_on_a_falling_loss(seed):
    generator = random.Random(seed)
    losses = [
        {"mlm": 10 * (step + 1) ** -0.15 * generator.gauss(1, 0.01), "rtd": generator.gauss(1, 0.2)}
        for step in range(2000)
    ]
    spikes = detector()
    assert not any(spikes.observe(each, PHASE) for each in losses)


def test_nothing_is_judged_before_there_is_something_to_compare_with():
    spikes = detector()
    values = noisy(MIN_STEPS - 1)
    assert observe_all(spikes, [*values[:20], 50.0, *values[20:]]) == [None] * MIN_STEPS
    assert spikes.observe({"mlm": 50.0}, PHASE) is not None
    short = detector(spike_window_steps=16)
    observe_all(short, noisy(16))
    assert short.observe({"mlm": 50.0}, PHASE) is not None


def test_a_threshold_of_0_never_sees_one():
    spikes = detector(spike_threshold=0.0)
    assert not any(observe_all(spikes, [*noisy(200), 1e9]))
    assert spikes.state() == {"phase": [], "windows": {}, "above": {}}


def test_the_losses_are_judged_each_by_itself_and_the_worst_is_told():
    spikes = detector()
    for mlm, rtd in zip(noisy(100), noisy(100, 0.3, 0.003, seed=2), strict=True):
        assert spikes.observe({"mlm": mlm, "rtd": rtd}, PHASE) is None
    assert spikes.observe({"mlm": 5.0, "rtd": 0.4}, PHASE).loss == "rtd"
    assert spikes.observe({"mlm": 9.0, "rtd": 0.3}, PHASE).loss == "mlm"
    assert spikes.observe({"mlm": 9.0, "rtd": 40.0}, PHASE).loss == "rtd"


def test_a_spike_does_not_enter_the_window():
    spikes = detector(spike_window_steps=32)
    observe_all(spikes, noisy(40))
    for _ in range(10):  # spikes, each followed by a normal step, for ever spikes
        assert spikes.observe({"mlm": 9.0}, PHASE).in_a_row == 1
        assert spikes.observe({"mlm": 5.0}, PHASE) is None
    assert 9.0 not in spikes.state()["windows"]["mlm"]


def test_a_new_level_becomes_the_window():
    spikes = detector()
    observe_all(spikes, noisy(200))
    shifted = observe_all(spikes, noisy(300, level=7.0, seed=3))
    assert [spike.in_a_row for spike in shifted[:NEW_LEVEL_STEPS]] == [
        *range(1, NEW_LEVEL_STEPS + 1)
    ]
    assert not any(shifted[NEW_LEVEL_STEPS:])
    assert min(spikes.state()["windows"]["mlm"]) > 6
    assert spikes.observe({"mlm": 9.0}, PHASE) is not None


@pytest.mark.parametrize("other", [(128, 256), (512, 128)])
def test_another_phase_begins_a_new_window(other):
    spikes = detector()
    observe_all(spikes, noisy(200))
    assert spikes.observe({"mlm": 9.0}, other) is None
    assert spikes.state() == {"phase": [*other], "windows": {"mlm": [9.0]}, "above": {"mlm": []}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_passed_over(value):
    spikes = detector()
    observe_all(spikes, noisy(100))
    before = json.dumps(spikes.state())
    assert spikes.observe({"mlm": value}, PHASE) is None
    assert json.dumps(spikes.state()) == before


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_a_constant_loss_divides_by_nothing(level):
    spikes = detector()
    assert not any(observe_all(spikes, [level] * 100))
    assert spikes.observe({"mlm": level * 1.001}, PHASE) is None
    assert (spikes.observe({"mlm": level * 1.1}, PHASE) is not None) == (level > 0)


def test_the_window_forgets():
    spikes = detector(spike_window_steps=32)
    values = noisy(100)
    observe_all(spikes, values)
    assert spikes.state()["windows"]["mlm"] == values[-32:]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 150), st.integers(0, 2**30))
def test_a_resumed_run_decides_the_same(cut, seed):
    generator = random.Random(seed)
    losses = [{"mlm": generator.gauss(5, 0.1) + 3 * (generator.random() < 0.2)} for _ in range(150)]
    undisturbed, resumed = detector(), detector()
    decisions = [undisturbed.observe(each, PHASE) for each in losses]
    for each in losses[:cut]:
        resumed.observe(each, PHASE)
    state = json.loads(json.dumps(resumed.state()))
    resumed.observe({"mlm": 1e9}, (1, 1))  # what was stored does not follow it
    again = detector()
    again.load_state(state)
    assert [again.observe(each, PHASE) for each in losses[cut:]] == decisions[cut:]
    assert again.state() == undisturbed.state()


def test_a_commit_without_a_state_begins_anew():
    spikes = detector()
    observe_all(spikes, noisy(10))
    spikes.load_state({})
    assert spikes.state() == {"phase": [], "windows": {}, "above": {}}
