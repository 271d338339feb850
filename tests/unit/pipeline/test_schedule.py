"""The learning rate factor, against transformers' and the original's formulas and by hand."""

import math

import pytest
import torch

from pipeline.config import ScheduleSection
from pipeline.schedule import learning_rate_factor

CASES = [(0, 1), (0, 7), (1, 2), (3, 10), (10, 10), (50, 500)]


def section(warmup_steps, max_steps, **changes):
    return ScheduleSection(warmup_steps=warmup_steps, max_steps=max_steps, **changes)


def lambda_of(make, *arguments, **options):
    """The factor of one of transformers' schedules."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return make(optimizer, *arguments, **options).lr_lambdas[0]


@pytest.mark.parametrize(("warmup", "total"), CASES)
def test_equals_transformers(warmup, total):
    from transformers import get_linear_schedule_with_warmup

    theirs = lambda_of(get_linear_schedule_with_warmup, warmup, total)
    steps = range(total + 3)
    ours = [learning_rate_factor(step, section(warmup, total)) for step in steps]
    assert ours == [theirs(step) for step in steps]


@pytest.mark.parametrize(("warmup", "total"), [(3, 10), (50, 500)])
def test_equals_the_originals_shifted_schedule(warmup, total):
    """DeBERTa/optims/lr_schedulers.py, `warmup_linear_shift`, in its own terms."""
    share = warmup / total
    for step in range(total):
        x = step / total
        expected = x / share if x < share else 1.0 - (x - share) / (1 - share)
        assert learning_rate_factor(step, section(warmup, total)) == pytest.approx(
            expected, abs=1e-12
        )


def test_the_landmarks():
    schedule = section(10, 100)
    assert learning_rate_factor(0, schedule) == 0.0
    assert learning_rate_factor(5, schedule) == 0.5
    assert learning_rate_factor(10, schedule) == 1.0
    assert learning_rate_factor(99, schedule) == pytest.approx(1 / 90)
    assert learning_rate_factor(100, schedule) == 0.0


def test_without_warmup_the_first_step_has_the_full_rate():
    assert learning_rate_factor(0, section(0, 100)) == 1.0


def test_a_warmup_over_the_whole_run_never_decays():
    schedule = section(4, 4)
    assert [learning_rate_factor(step, schedule) for step in range(5)] == [0, 0.25, 0.5, 0.75, 0]


@pytest.mark.parametrize(("warmup", "total"), [(3, 10), (50, 500), (0, 7)])
def test_equals_the_originals_default_schedule(warmup, total):
    """DeBERTa/optims/lr_schedulers.py, `warmup_linear`, in its own terms."""
    share = warmup / total
    schedule = section(warmup, total, decay="linear_released")
    for step in range(total):
        x = step / total
        expected = x / share if x < share else 1.0 - x
        assert learning_rate_factor(step, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), CASES)
def test_cosine_equals_transformers(warmup, total):
    from transformers import get_cosine_schedule_with_warmup

    theirs = lambda_of(get_cosine_schedule_with_warmup, warmup, total)
    for step in range(total):
        ours = learning_rate_factor(step, section(warmup, total, decay="cosine"))
        assert ours == pytest.approx(theirs(step), abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.25])
@pytest.mark.parametrize(("warmup", "total", "decay_steps"), [(3, 10, 2), (0, 7, 7), (50, 500, 1)])
def test_wsd_equals_transformers(warmup, total, decay_steps, final):
    from transformers import get_wsd_schedule

    stable = total - warmup - decay_steps
    theirs = lambda_of(
        get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=decay_steps,
        num_stable_steps=stable,
        min_lr_ratio=final,
        decay_type="linear",
    )
    schedule = section(
        warmup, total, decay="wsd", decay_steps=decay_steps, final_learning_rate_factor=final
    )
    for step in range(warmup, total + 2):  # their warm-up begins at min_lr_ratio
        assert learning_rate_factor(step, schedule) == pytest.approx(theirs(step), abs=1e-12)


LAST = 499_999
AT_PAPER_SCALE = {
    # The paper's 10k of 500k: decay and its keys -> factors at steps 9,999, 10,000 and 499,999.
    "linear": ({}, 1.0, 1 / 490_000),
    "linear_released": ({}, 0.98, 1 / 500_000),
    "cosine": ({}, 1.0, math.sin(math.pi / 980_000) ** 2),
    "cosine to a tenth": (
        {"final_learning_rate_factor": 0.1},
        1.0,
        0.1 + 0.9 * math.sin(math.pi / 980_000) ** 2,
    ),
    "wsd": ({"decay_steps": 50_000}, 1.0, 1 / 50_000),
    "wsd to a tenth": (
        {"decay_steps": 50_000, "final_learning_rate_factor": 0.1},
        1.0,
        0.1 + 0.9 / 50_000,
    ),
}


@pytest.mark.parametrize("name", AT_PAPER_SCALE)
def test_the_paper_s_boundaries(name):
    changes, after_warmup, at_last = AT_PAPER_SCALE[name]
    schedule = section(10_000, 500_000, decay=name.split()[0], **changes)
    assert learning_rate_factor(0, schedule) == 0.0
    assert learning_rate_factor(9_999, schedule) == 0.9999
    assert learning_rate_factor(10_000, schedule) == after_warmup
    assert learning_rate_factor(LAST, schedule) == pytest.approx(at_last, rel=1e-12, abs=0)
    end = changes.get("final_learning_rate_factor", 0.0)
    assert learning_rate_factor(500_000, schedule) == end
    assert learning_rate_factor(LAST, schedule) > end


def test_wsd_stays_at_the_peak_until_its_descent():
    schedule = section(10, 100, decay="wsd", decay_steps=20, final_learning_rate_factor=0.5)
    factors = [learning_rate_factor(step, schedule) for step in range(101)]
    assert factors[10:81] == [1.0] * 71
    assert factors[81] == pytest.approx(0.975)
    assert factors[90] == pytest.approx(0.75)
    assert factors[100] == 0.5


def test_half_a_cosine_is_half_way_in_its_middle():
    schedule = section(20, 120, decay="cosine", final_learning_rate_factor=0.2)
    assert learning_rate_factor(70, schedule) == pytest.approx(0.6)
    assert learning_rate_factor(20, schedule) == 1.0
