"""Learning rates of two configurations side by side, before anything is changed.

`deberta extend` prints the table and `deberta train` its lines, where a run goes on with other
rates than it would have had.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.schedule import learning_rate_factor

_EVEN_STEPS = 6
"""Steps between the present one and the end that the table has besides the landmarks."""


@dataclass(frozen=True)
class RateRow:
    """The learning rates of one optimizer step, by network."""

    step: int
    old: dict[str, float] | None
    """None where the run would have ended before."""
    new: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Prepare the row for JSON.

        Returns:
            Step, old and new rates.
        """
        return {"step": self.step, "old": self.old, "new": self.new}


def rate_table(old: RunConfig, new: RunConfig, step: int) -> list[RateRow]:
    """Compare learning rates around and after a step.

    Args:
        old: The configuration so far.
        new: The one from now on.
        step: Completed optimizer steps; the row of this step is the first one that is trained anew.

    Returns:
        About a dozen rows: two completed steps, landmarks of both schedules, and evenly spaced
        steps up to the last one.
    """
    return [RateRow(at, _rates(old, at), _rates(new, at)) for at in _steps(old, new, step)]


def rate_lines(old: RunConfig, new: RunConfig, step: int) -> list[str]:
    """Write the table for a banner.

    Args:
        old: The configuration of the commit.
        new: That of this start.
        step: Completed optimizer steps.

    Returns:
        A heading and a line for each row; nothing where all steps to come keep their rates.
    """
    if (old.schedule, old.optimizer) == (new.schedule, new.optimizer):
        return []
    rows = rate_table(old, new, step)
    if all(row.old == row.new for row in rows if row.step >= step):
        return []
    return [
        f"learning rates ({', '.join(new.networks)}) of the commit's schedule and from now on:",
        *(
            f"  step {row.step:,}: {show_rates(row.old)} -> {show_rates(row.new)}"
            + (" (done)" if row.step < step else "")
            for row in rows
        ),
    ]


def show_rates(rates: dict[str, float] | None) -> str:
    """Write the rates of a step.

    Args:
        rates: By network; None where there is no such step.

    Returns:
        Such as "0.0003, 0.0002".
    """
    return "ended" if rates is None else ", ".join(f"{rate:.4g}" for rate in rates.values())


def _rates(config: RunConfig, step: int) -> dict[str, float] | None:
    if step >= config.schedule.max_steps:
        return None
    factor = learning_rate_factor(step, config.schedule)
    return {name: config.optimizer.learning_rate(name) * factor for name in config.networks}


def _steps(old: RunConfig, new: RunConfig, step: int) -> list[int]:
    """Steps worth a row, all of them steps of the new schedule or of the old one."""
    schedule = new.schedule
    last = max(schedule.max_steps, old.schedule.max_steps) - 1
    steps = {step // 2, step - 1, step, old.schedule.max_steps - 1, schedule.max_steps - 1}
    steps |= {row.from_step + row.warmup_steps for row in schedule.extensions}
    steps |= {schedule.max_steps - schedule.decay_steps, old.schedule.max_steps}
    steps |= {step + (last - step) * part // _EVEN_STEPS for part in range(_EVEN_STEPS + 1)}
    return sorted(at for at in steps if 0 <= at <= last)
