"""The learning rate over the run, as a function of the step and nothing else.

linear            0 -> peak at warmup_steps -> 0 at max_steps, in two lines
linear_released   the released code's default: jumps down behind the warm-up
cosine            half a cosine from the peak to the final factor
wsd               warmup, stable, decay: stays at the peak until the last decay_steps

A run that was extended follows its first schedule up to the extension, then a line up to another
peak (or none), and then the same decay from there to the new end.
"""

import functools
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
        schedule: Warm-up, decay, length and extensions, in steps.

    Returns:
        Factor in [0, 1]; from max_steps on that of the end: 0, or final_learning_rate_factor.

    Source:
        DeBERTa/optims/lr_schedulers.py (both linear ones); Loshchilov and Hutter,
        arXiv:1608.03983, equation 5 (cosine, without restarts); Hu et al., arXiv:2404.06395,
        section 4 (wsd; the descent is a line here); Ibrahim et al., arXiv:2403.08763, section 4
        (warming up again from where the decay has come to, and decaying again).
    """
    if schedule.extensions:
        return _extended_factor(step, schedule)
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.decay == "linear_released" and step < schedule.max_steps:
        return (schedule.max_steps - step) / schedule.max_steps
    return _descended(step, schedule, schedule.warmup_steps, 1.0)


@functools.lru_cache(maxsize=16)
def before_extension(schedule: ScheduleSection) -> ScheduleSection:
    """Take the last extension back.

    Args:
        schedule: A schedule with at least one extension.

    Returns:
        The schedule that was extended.
    """
    *earlier, last = schedule.extensions
    return schedule.model_copy(
        update={"extensions": tuple(earlier), "max_steps": last.previous_max_steps}
    )


def _extended_factor(step: int, schedule: ScheduleSection) -> float:
    """The factor of a schedule with extensions; the last one decides from its first step on."""
    extension = schedule.extensions[-1]
    before = before_extension(schedule)  # pyright: ignore[reportArgumentType]  frozen, so hashable
    if step < extension.from_step:
        return learning_rate_factor(step, before)
    start = learning_rate_factor(extension.from_step, before)
    peak = start if extension.peak_factor is None else extension.peak_factor
    warmed_up = extension.from_step + extension.warmup_steps
    if step < warmed_up:
        return start + (peak - start) * (step - extension.from_step) / extension.warmup_steps
    return _descended(step, schedule, warmed_up, peak)


def _descended(step: int, schedule: ScheduleSection, warmed_up: int, peak: float) -> float:
    """The factor behind a warm-up: at the peak, on the way down, or at the end."""
    end, final = schedule.max_steps, schedule.final_learning_rate_factor
    start = max(warmed_up, end - schedule.decay_steps) if schedule.decay == "wsd" else warmed_up
    if step >= end:
        return final
    if step <= start:
        return peak
    height = (end - step) / (end - start)
    if schedule.decay == "cosine":
        # (1 + cos(pi (1 - height))) / 2, without its loss of digits near the end.
        height = math.sin(math.pi / 2 * height) ** 2
    return final + (peak - final) * height
