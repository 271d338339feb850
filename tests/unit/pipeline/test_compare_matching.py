"""Budgets and schedules: what a run costs, how many steps a budget buys, and at what shape."""

import pytest

from pipeline.compare.matching import (
    SCALED_KEYS,
    cost_until,
    count_evaluations,
    scaled_words,
    steps_for,
)
from pipeline.config_loading import load_run_config
from pipeline.ds_config import BatchPlan
from pipeline.flops import training_flops, training_flops_per_token

PLAN = BatchPlan(1, 4, 2, 8)
PHASES = (
    "schedule.phases=[{until_step=10, sequence_length=32, train_batch_size=4},"
    " {until_step=100, sequence_length=64}]"
)
WSD = ("schedule.decay=wsd", "schedule.decay_steps=60", "schedule.final_learning_rate_factor=0.1")


def demo(*words):
    return load_run_config("demo", words)


def test_cost_of_phases_by_hand():
    config = demo(PHASES)
    at = {length: training_flops_per_token(config, length) for length in (32, 64, 128)}
    short, middle, one = 4 * 32, 8 * 64, 8 * 128
    by_hand = {
        0: (0, 0.0),
        7: (7 * short, 7 * short * at[32]),
        10: (10 * short, 10 * short * at[32]),
        11: (10 * short + middle, 10 * short * at[32] + middle * at[64]),
        300: (
            10 * short + 90 * middle + 200 * one,
            10 * short * at[32] + 90 * middle * at[64] + 200 * one * at[128],
        ),
    }
    for step, (tokens, flops) in by_hand.items():
        cost = cost_until(config, step, PLAN)
        assert (cost.steps, cost.tokens) == (step, tokens)
        assert cost.flops == pytest.approx(flops)
    assert cost_until(config, 300, PLAN).flops == pytest.approx(training_flops(config, 8))


@pytest.mark.parametrize("match", ["flops", "steps", "tokens"])
@pytest.mark.parametrize(("words", "slack_steps"), [((), 0.5), ((PHASES,), 1.5)])
def test_a_budget_is_met(match, words, slack_steps):
    """To half a step; with phases, whose ends are rounded too, to one more."""
    config = demo(*words)
    per_step = cost_until(demo(), 1, PLAN).of(match)
    for ratio in (0.2517, 1.0, 1.7031):
        budget = ratio * cost_until(config, 300, PLAN).of(match)
        steps = steps_for(config, match, budget, PLAN)
        assert steps == round(300 * ratio)
        spent = cost_until(demo(*scaled_words(config, steps, 3)), steps, PLAN).of(match)
        assert abs(spent - budget) <= slack_steps * per_step


def test_systems_meet_one_budget_of_flops():
    """The smaller network takes more steps, and the sum of both networks decides."""
    budget = cost_until(demo(), 300, PLAN).flops
    small = load_run_config("demo_mlm")
    steps = steps_for(small, "flops", budget, PLAN)
    per_step = 8 * 128 * training_flops_per_token(small)
    assert abs(steps * per_step - budget) <= per_step / 2
    assert 300 < steps < 1000
    assert steps_for(small, "tokens", 300 * 8 * 128, PLAN) == 300
    assert steps_for(small, "flops", 0.4 * per_step, PLAN) == 0


def test_schedules_keep_their_shape():
    config = demo(PHASES, *WSD)
    words = scaled_words(config, 450, 3)
    assert sorted(word.partition("=")[0] for word in words) == sorted(SCALED_KEYS)
    schedule = load_run_config("demo", [*WSD[::2], *words]).schedule
    assert (schedule.max_steps, schedule.warmup_steps, schedule.decay_steps) == (450, 45, 90)
    assert [phase.until_step for phase in schedule.phases] == [15, 150]
    before = config.schedule.phases
    for old, new in zip(before, schedule.phases, strict=True):
        assert old.model_dump(exclude={"until_step"}) == new.model_dump(exclude={"until_step"})
    assert "schedule.warmup_steps=0" in scaled_words(demo("schedule.warmup_steps=0"), 7, 1)
    assert "schedule.warmup_steps=1" in scaled_words(demo(), 4, 1), "a warm-up does not vanish"


def test_short_schedules_are_valid():
    """Warm-up and descent that fill the run still fit when both are rounded."""
    full = demo("schedule.decay=wsd", "schedule.warmup_steps=100", "schedule.decay_steps=200")
    for steps in range(2, 40):
        words = [word for word in scaled_words(full, steps, 1) if "phases" not in word]
        schedule = demo("schedule.decay=wsd", *words).schedule
        assert schedule.warmup_steps + schedule.decay_steps <= steps


def test_evaluations_fall_on_equal_shares():
    for evaluations in range(1, 12):
        for steps in range(evaluations * evaluations, 300, 7):
            words = dict(word.split("=") for word in scaled_words(demo(), steps, evaluations))
            interval = int(words["evaluation.interval_steps"])
            at = [step for step in range(1, steps + 1) if step % interval == 0 or step == steps]
            assert len(at) == evaluations
            assert (
                max(
                    abs(step / steps - number / evaluations)
                    for number, step in enumerate(at, start=1)
                )
                <= evaluations / steps
            )
    assert count_evaluations(demo()) == 3
    assert count_evaluations(demo("evaluation.interval_steps=0")) == 1
    assert count_evaluations(demo("evaluation.interval_steps=290")) == 2
