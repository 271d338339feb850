"""The learning rate over the run, as a function of the step and nothing else.

linear            0 -> peak at warmup_steps -> 0 at max_steps, in two lines
linear_released   the released code's default: jumps down behind the warm-up
cosine            half a cosine from the peak to the final factor
wsd               warmup, stable, decay: stays at the peak until the last decay_steps
"""

import math

from pipeline.config import ScheduleSection


def learning_rate_factor(step: int, schedule: ScheduleSection) -> float:
    """Give the factor on the peak learning rates for one optimizer step.

    Every decay begins with the same line from (0, 0) to (warmup_steps, 1). So the very first step
    has the rate 0 and only fills Adam's averages, as in the original and in transformers; without
    warm-up it has the full rate. `linear`, the original's `warmup_linear_shift`, and its default
    `linear_released`, there `warmup_linear`, always leave the last step a positive one.

    Args:
        step: Optimizer steps completed before this one, from 0; data and schedule go on when a
            network skips a step, so skipped steps count.
        schedule: Warm-up, decay and length, in steps.

    Returns:
        Factor in [0, 1]; from max_steps on that of the end: 0, or final_learning_rate_factor.

    Source:
        DeBERTa/optims/lr_schedulers.py (both linear ones); Loshchilov and Hutter,
        arXiv:1608.03983, equation 5 (cosine, without restarts); Hu et al., arXiv:2404.06395,
        section 4 (wsd; the descent is a line here).
    """
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    start, end = _descent(schedule)
    if step >= end:
        return schedule.final_learning_rate_factor
    if schedule.decay == "linear_released":
        return (end - step) / end
    if step <= start:
        return 1.0
    height = (end - step) / (end - start)
    if schedule.decay == "cosine":
        # (1 + cos(pi (1 - height))) / 2, without its loss of digits near the end.
        height = math.sin(math.pi / 2 * height) ** 2
    return schedule.final_learning_rate_factor + (1 - schedule.final_learning_rate_factor) * height


def _descent(schedule: ScheduleSection) -> tuple[int, int]:
    """The step with the last full factor, and the one at which the final factor is reached."""
    end = schedule.max_steps
    return (end - schedule.decay_steps if schedule.decay == "wsd" else schedule.warmup_steps), end
