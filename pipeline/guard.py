"""Continued pre-training must not make a model worse unnoticed.

    loss_above_chance    a start that lost something, such as Delta: the discriminator is worse than
                         one that knows only how many tokens are replaced
    losses_above_start   training that makes the model worse than it was

The held-out losses of the starting point are kept in every commit.
"""

import math

GUARDED = ("eval/mlm_loss", "eval/rtd_loss")


def loss_above_chance(start: dict[str, float]) -> list[str]:
    """Find a discriminator that begins worse than one that has learned nothing but a frequency.

    Args:
        start: Figures of the model that training began with, before its first step.

    Returns:
        A line if its loss is above the entropy of "replaced", and none otherwise.
    """
    share, loss = start.get("eval/replaced_fraction", 0.0), start.get("eval/rtd_loss", 0.0)
    if not 0.0 < share < 1.0:
        return []
    chance = -share * math.log(share) - (1.0 - share) * math.log(1.0 - share)
    if loss <= chance:
        return []
    return [
        f"eval/rtd_loss of the starting point is {loss:.4f}, above the {chance:.4f} of a "
        f"discriminator that only knows that {share:.1%} of the tokens are replaced. A fresh head "
        "explains this; without one the model did not arrive whole: check the notes on Delta, and "
        "that generator, discriminator and tokenizer belong together"
    ]


def losses_above_start(start: dict[str, float], now: dict[str, float], margin: float) -> list[str]:
    """Find the held-out losses that have risen.

    Args:
        start: Figures of the model that training began with, before its first step.
        now: Figures of an evaluation.
        margin: Tolerated relative rise; 0.05 is 5 %.

    Returns:
        A line for each loss above (1 + margin) x its start.
    """
    # Written so that NaN is told.
    return [
        f"{name} is {now[name]:.4f}, above the starting point's {start[name]:.4f} by more than "
        f"{margin:.0%} (initialize.guard_margin): training makes the model worse; lower "
        "optimizer.*_learning_rate, lengthen schedule.warmup_steps, or check that the data is of "
        "the model's kind"
        for name in GUARDED
        if name in start and name in now and not now[name] <= (1 + margin) * start[name]
    ]
