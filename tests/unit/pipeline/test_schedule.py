"""The learning rate factor, against transformers' and the original's formula."""

import pytest
import torch

from pipeline.config import ScheduleSection
from pipeline.schedule import learning_rate_factor

CASES = [(0, 1), (0, 7), (1, 2), (3, 10), (10, 10), (50, 500)]


def section(warmup_steps, max_steps):
    return ScheduleSection(warmup_steps=warmup_steps, max_steps=max_steps)


@pytest.mark.parametrize(("warmup", "total"), CASES)
def test_equals_transformers(warmup, total):
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
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
