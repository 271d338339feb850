"""Schedules with another end: their learning rates, their contradictions, and their table."""

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.config import ExtensionSection, ScheduleSection
from pipeline.config_loading import load_run_config
from pipeline.rate_table import rate_lines, rate_table, show_rates
from pipeline.resume_rules import Verdict, changed_keys
from pipeline.schedule import before_extension, learning_rate_factor


def section(max_steps, *extensions, warmup_steps=10, **changes):
    """A schedule with extensions, each (from_step, previous_max_steps, peak, warm-up)."""
    rows = tuple(
        ExtensionSection(
            from_step=start, previous_max_steps=end, peak_factor=peak, warmup_steps=warmup
        )
        for start, end, peak, warmup in extensions
    )
    return ScheduleSection(
        max_steps=max_steps, warmup_steps=warmup_steps, extensions=rows, **changes
    )


def factors(schedule):
    return [learning_rate_factor(step, schedule) for step in range(schedule.max_steps + 5)]


def corners(*points):
    """The line through (step, factor) points, at every step."""
    steps, values = zip(*points, strict=True)
    return list(np.interp(np.arange(steps[-1] + 5), steps, values))


def test_a_decay_that_goes_on():
    """At step 55 of 10 + 90 the factor is a half; from there the line ends at 200."""
    extended = section(200, (55, 100, None, 0))
    assert factors(extended) == pytest.approx(corners((0, 0), (10, 1), (55, 0.5), (200, 0)))


def test_a_decay_that_begins_again():
    extended = section(200, (100, 100, 0.8, 20))
    assert factors(extended) == pytest.approx(
        corners((0, 0), (10, 1), (100, 0), (120, 0.8), (200, 0))
    )


def test_the_second_warm_up_begins_at_the_present_rate():
    extended = section(200, (55, 100, 1.0, 20))
    assert learning_rate_factor(55, extended) == 0.5
    assert learning_rate_factor(65, extended) == pytest.approx(0.75)
    assert learning_rate_factor(75, extended) == 1.0


def test_extensions_of_an_extension():
    extended = section(300, (100, 100, 0.5, 10), (155, 200, None, 0))
    at_155 = 0.5 * 45 / 90
    assert factors(extended) == pytest.approx(
        corners((0, 0), (10, 1), (100, 0), (110, 0.5), (155, at_155), (300, 0))
    )


def test_cosine_and_its_end():
    extended = section(200, (100, 100, 0.6, 0), decay="cosine", final_learning_rate_factor=0.2)
    assert learning_rate_factor(99, extended) < 0.201
    assert learning_rate_factor(100, extended) == 0.6
    assert learning_rate_factor(150, extended) == pytest.approx(0.4)
    assert learning_rate_factor(125, extended) == pytest.approx(0.2 + 0.4 * np.cos(np.pi / 8) ** 2)
    assert learning_rate_factor(200, extended) == 0.2


def test_wsd_stays_and_descends_again():
    extended = section(200, (90, 100, None, 0), decay="wsd", decay_steps=20)
    assert factors(extended) == pytest.approx(
        corners((0, 0), (10, 1), (80, 1), (90, 0.5), (180, 0.5), (200, 0))
    )


def test_wsd_without_room_for_its_descent_begins_it_at_once():
    extended = section(105, (90, 100, None, 0), decay="wsd", decay_steps=20)
    assert factors(extended) == pytest.approx(
        corners((0, 0), (10, 1), (80, 1), (90, 0.5), (105, 0))
    )


def test_the_released_code_s_line_goes_on_from_where_it_was():
    extended = section(300, (50, 100, None, 0), decay="linear_released")
    assert learning_rate_factor(49, extended) == 0.51
    assert factors(extended)[50:] == pytest.approx(corners((0, 0), (50, 0.5), (300, 0))[50:])


@pytest.mark.parametrize("decay", ["linear", "linear_released", "cosine", "wsd"])
@pytest.mark.parametrize(("start", "peak", "warmup"), [(100, 0.5, 7), (60, None, 0), (30, 1.0, 1)])
def test_completed_steps_keep_their_rates(decay, start, peak, warmup):
    changes = {"decay": decay, "decay_steps": 20 if decay == "wsd" else 0}
    before = section(100, **changes)
    extended = section(250, (start, 100, peak, warmup), **changes)
    assert factors(extended)[:start] == factors(before)[:start]
    assert before_extension(extended) == before
    assert all(0 <= factor <= 1 for factor in factors(extended))


def words(extension, max_steps=600):
    return [f"schedule.extensions=[{extension}]", f"schedule.max_steps={max_steps}"]


@pytest.mark.parametrize(
    ("extension", "says"),
    [
        (
            "{from_step=301, previous_max_steps=300}",
            "schedule.extensions[0].from_step 301 is more than previous_max_steps 300",
        ),
        (
            "{from_step=300, previous_max_steps=300, warmup_steps=5}",
            "schedule.extensions[0].warmup_steps 5 leads to no peak_factor; give both",
        ),
        (
            "{from_step=300, previous_max_steps=300, peak_factor=0.5, warmup_steps=301}",
            "schedule.extensions from step 300 with 301 steps of warm-up does not fit before step"
            " 600, where it ends",
        ),
        (
            "{from_step=300, previous_max_steps=300}, {from_step=200, previous_max_steps=400}",
            "schedule.extensions begin at steps [300, 200]: each must begin after the one before",
        ),
        ("{from_step=300, previous_max_steps=300, peak_factor=2}", "is 2; it must be at most 1"),
        ("{from_step=300}", "schedule.extensions[0].previous_max_steps is missing"),
        (
            "{from_step=9, previous_max_steps=9}",
            "schedule.warmup_steps 30 is more than the first previous_max_steps 9",
        ),
    ],
)
def test_extensions_that_cannot_be(extension, says):
    with pytest.raises(UserError) as caught:
        load_run_config("demo", words(extension))
    assert says in str(caught.value)


def test_a_peak_below_the_end_is_refused():
    more = ["schedule.decay=cosine", "schedule.final_learning_rate_factor=0.3"]
    extension = "{from_step=300, previous_max_steps=300, peak_factor=0.2}"
    with pytest.raises(UserError, match=r"peak_factor 0\.2 is less than schedule\.final_learning"):
        load_run_config("demo", [*words(extension), *more])


DEMO = load_run_config("demo")
EXTENDED = load_run_config(
    "demo", words("{from_step=300, previous_max_steps=300, peak_factor=0.5, warmup_steps=10}")
)


@pytest.mark.parametrize(("completed_steps", "verdict"), [(300, "free"), (301, "refused")])
def test_an_extension_is_another_run_only_where_it_was_passed(completed_steps, verdict):
    """Nothing to accept: the steps that are done have the rates that they had."""
    older = load_run_config("demo", ["schedule.max_steps=400"]) if verdict == "refused" else DEMO
    changes = changed_keys(older, EXTENDED, completed_steps)
    assert {change.verdict for change in changes} == {Verdict(verdict)}


def test_the_table_has_both_rates_of_a_dozen_steps():
    rows = {row.step: row for row in rate_table(DEMO, EXTENDED, 300)}
    assert 8 <= len(rows) <= 15
    assert rows[299].old == rows[299].new
    assert rows[300].old is None
    assert rows[300].new == {"generator": 0.0, "discriminator": 0.0}
    peaks = {name: DEMO.optimizer.learning_rate(name) for name in DEMO.networks}
    assert rows[310].new == {name: 0.5 * peak for name, peak in peaks.items()}
    assert max(rows) == 599
    assert rows[299].old["generator"] == pytest.approx(peaks["generator"] / 270)


def test_the_banner_has_the_table_where_rates_change():
    lines = rate_lines(DEMO, EXTENDED, 300)
    assert lines[0].startswith("learning rates (generator, discriminator) of the commit's")
    assert "  step 300: ended -> 0, 0" in lines
    assert any(line.endswith("(done)") for line in lines)
    assert rate_lines(DEMO, DEMO, 300) == []
    assert rate_lines(EXTENDED, EXTENDED, 300) == []
    unchanged = load_run_config("demo", ["schedule.max_consecutive_skipped_steps=3"])
    assert rate_lines(DEMO, unchanged, 300) == []


def test_rates_are_written_shortly():
    assert show_rates({"generator": 1 / 3, "discriminator": 2e-5}) == "0.3333, 2e-05"
    assert show_rates(None) == "ended"
