"""What people see while training runs."""

import sys

import pytest

from pipeline import progress
from pipeline.progress import ProgressDisplay, describe


def test_figures_in_one_line():
    figures = {
        "step": 3,
        "train/mlm_loss": 6.12034,
        "train/rtd_loss": 0.33412,
        "train/rtd_accuracy_replaced": 0.4121,
        "train/mlm_accuracy": 0.9,
        "perf/tokens_per_second": 5120.4,
    }
    assert describe(figures) == "mlm 6.1203  rtd 0.3341  replaced 0.4121  tok/s 5,120"
    assert describe({}) == ""


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = ProgressDisplay(first_step=40, max_steps=2000)
    display.advance(50)
    now[0] += 20  # ten steps in twenty seconds leave 1,950 steps or 3,900 seconds
    display.show(50, {"train/mlm_loss": 6.5})
    display.say("step 50 held-out: mlm 7")
    display.close()
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "step 50/2,000  mlm 6.5000  left 1:05:00",
        "step 50 held-out: mlm 7",
    ]
    assert output.out == ""


@pytest.mark.parametrize("step", [40, 2000])
def test_time_left_at_the_ends(capsys, step):
    display = ProgressDisplay(first_step=40, max_steps=2000)
    display.show(step, {})
    assert "left 0:00:00" in capsys.readouterr().err


def test_a_live_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay(first_step=4, max_steps=10)
    try:
        display.advance(7)
        display.show(7, {"train/mlm_loss": 6.5})
        display.say("[held-out] is text and not markup")
        task = display._live.tasks[0]
        assert (task.completed, task.total, task.description) == (7, 10, "mlm 6.5000")
    finally:
        display.close()
    assert "[held-out] is text and not markup" in capsys.readouterr().err
