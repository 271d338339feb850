"""The guard of continued pre-training: which figures it compares, and what it says."""

import pytest

from pipeline.guard import loss_above_chance, losses_above_start

START = {"eval/mlm_loss": 2.0, "eval/rtd_loss": 0.3, "eval/rtd_auc": 0.9, "eval/mlm_accuracy": 0.5}


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({}, []),
        ({"eval/mlm_loss": 2.0}, []),
        ({"eval/mlm_loss": 2.0999}, []),
        ({"eval/mlm_loss": 2.1001}, ["eval/mlm_loss"]),
        ({"eval/rtd_loss": 0.32}, ["eval/rtd_loss"]),
        ({"eval/mlm_loss": 3.0, "eval/rtd_loss": 0.4}, ["eval/mlm_loss", "eval/rtd_loss"]),
        ({"eval/mlm_loss": 0.1, "eval/rtd_loss": 0.1}, []),
    ],
)
def test_losses_that_rose_by_more_than_the_margin(now, found):
    lines = losses_above_start(START, {**START, **now}, 0.05)
    assert [line.split()[0] for line in lines] == found


def test_the_line_has_both_figures_the_margin_and_the_cure():
    (line,) = losses_above_start(START, {"eval/rtd_loss": 2.04}, 0.05)
    assert "eval/rtd_loss is 2.0400, above the starting point's 0.3000 by more than 5%" in line
    assert "initialize.guard_margin" in line
    assert "learning_rate" in line


def test_a_figure_that_only_one_side_has_is_not_compared():
    assert losses_above_start({}, START, 0.0) == []
    assert losses_above_start(START, {"eval/rtd_auc": 0.1}, 0.0) == []


def test_a_loss_that_is_not_a_number_is_told():
    (line,) = losses_above_start(START, {"eval/mlm_loss": float("nan")}, 0.05)
    assert "eval/mlm_loss is nan" in line


@pytest.mark.parametrize(("loss", "is_told"), [(0.4308, False), (0.4316, True)])
def test_a_start_below_chance_is_told(loss, is_told):
    # Entropy of 15.5 %: 0.155 * ln(1 / 0.155) + 0.845 * ln(1 / 0.845) = 0.43129.
    lines = loss_above_chance({"eval/rtd_loss": loss, "eval/replaced_fraction": 0.155})
    assert bool(lines) == is_told
    if is_told:
        assert "above the 0.4313 of a discriminator that only knows that 15.5%" in lines[0]
        assert "check the notes on Delta" in lines[0]


@pytest.mark.parametrize("start", [{}, {"eval/mlm_loss": 9.0}, {"eval/replaced_fraction": 0.0}])
def test_a_start_without_a_discriminator_has_no_chance_to_compare(start):
    assert loss_above_chance(start) == []
