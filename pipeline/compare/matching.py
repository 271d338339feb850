"""What a budget buys: the steps of every system, and its schedule at that length.

    cost_until        what a run has spent after some of its steps
    steps_for         steps that spend a budget of FLOPs, tokens or steps
    scaled_words      the schedule at another length, as `section.key=value` words

A schedule keeps its shape: warm-up, descent and phases take the same shares of every length, and
evaluations fall on the same shares of the budget.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.config import PhaseSection, RunConfig
from pipeline.ds_config import BatchPlan
from pipeline.flops import training_flops_per_token
from pipeline.phases import train_schedule

Match = Literal["flops", "steps", "tokens"]

SCALED_KEYS = (
    "schedule.max_steps",
    "schedule.warmup_steps",
    "schedule.decay_steps",
    "schedule.phases",
    "evaluation.interval_steps",
)
"""What `scaled_words` sets."""


@dataclass(frozen=True)
class Cost:
    """What some steps of a run spend; padding counts as tokens."""

    steps: int
    tokens: int
    flops: float
    """Of the minimal exact algorithm (`pipeline.flops`), the generator's included."""

    def of(self, match: Match) -> float:
        """Look up the spending by what is matched.

        Args:
            match: "flops", "steps" or "tokens".

        Returns:
            The amount.
        """
        return {"flops": self.flops, "steps": self.steps, "tokens": self.tokens}[match]


def cost_until(config: RunConfig, step: int, plan: BatchPlan) -> Cost:
    """Count what a run has spent after some steps.

    Args:
        config: The run.
        step: Completed optimizer steps, at most schedule.max_steps.
        plan: Its batch.

    Returns:
        The spending.

    Raises:
        UserError: A phase has a batch that cannot be split.
    """
    schedule = train_schedule(config, plan)
    flops = sum(
        phase.steps_before(step)
        * (phase.train_batch_size * phase.sequence_length)
        * training_flops_per_token(config, phase.sequence_length)
        for phase in schedule.phases
    )
    return Cost(step, schedule.tokens_before(step), flops)


def steps_for(config: RunConfig, match: Match, budget: float, plan: BatchPlan) -> int:
    """Find the length at which a run spends a budget.

    Args:
        config: The run, at any length.
        match: What the budget counts.
        budget: FLOPs, steps or tokens.
        plan: Its batch.

    Returns:
        The nearest number of steps; 0 where the budget is less than half of one.
    """
    length = config.schedule.max_steps
    whole = cost_until(config, length, plan)
    return round(length * (budget / whole.of(match)))


def scaled_words(config: RunConfig, max_steps: int, evaluations: int) -> list[str]:
    """Write a run's schedule at another length.

    Args:
        config: The run.
        max_steps: The other length, in steps.
        evaluations: Held-out evaluations, evenly spaced, the last one at the end.

    Returns:
        A word for each of SCALED_KEYS that the run uses.
    """
    schedule, ratio = config.schedule, max_steps / config.schedule.max_steps

    def scaled(steps: int) -> int:
        return max(1, round(steps * ratio)) if steps else 0

    words = [
        f"schedule.max_steps={max_steps}",
        f"schedule.warmup_steps={scaled(schedule.warmup_steps)}",
        # Rounded up: rounded down, a last interval of a step or two would add an evaluation.
        f"evaluation.interval_steps={-(-max_steps // evaluations)}",
    ]
    if schedule.decay_steps:
        descent = max(1, int(schedule.decay_steps * ratio))  # with the warm-up at most max_steps
        words.append(f"schedule.decay_steps={descent}")
    if schedule.phases:
        phases = (_toml(phase, scaled(phase.until_step)) for phase in schedule.phases)
        words.append(f"schedule.phases=[{', '.join(phases)}]")
    return words


def _toml(phase: PhaseSection, until_step: int) -> str:
    """Write a phase as an inline table, with another end."""
    values = {**phase.model_dump(exclude_none=True), "until_step": until_step}
    return "{" + ", ".join(f"{key}={value}" for key, value in values.items()) + "}"


def count_evaluations(config: RunConfig) -> int:
    """Count the held-out evaluations of a run.

    Args:
        config: The run.

    Returns:
        How many there are, that at the end included.
    """
    interval = config.evaluation.interval_steps
    return -(-config.schedule.max_steps // interval) if interval else 1
