"""The learning rate over the run, as a function of the step and nothing else."""

from pipeline.config import ScheduleSection


def learning_rate_factor(step: int, schedule: ScheduleSection) -> float:
    """Give the factor on the peak learning rates for one optimizer step.

    The piecewise linear function through (0, 0), (warmup_steps, 1) and (max_steps, 0), at `step`.
    So the very first step has the rate 0 and only fills Adam's averages, as in the original and in
    transformers; without warm-up it has the full rate, and the last step always has a positive one.
    This is the original's `warmup_linear_shift`; its default `warmup_linear` jumps from 1 to
    1 - warmup_steps / max_steps after the warm-up.

    Args:
        step: Optimizer steps completed before this one, from 0; data and schedule go on when a
            network skips a step, so skipped steps count.
        schedule: Warm-up and length, in steps.

    Returns:
        Factor in [0, 1]; 0 from max_steps on.
    """
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    if step >= schedule.max_steps:
        return 0.0
    return (schedule.max_steps - step) / (schedule.max_steps - schedule.warmup_steps)
