"""AdamW, clipping and learning rates from plain tensors, one formula after another.

Loshchilov and Hutter (arXiv:1711.05101) with the habits of the released code (debertav3-facts.md,
section 4.2): epsilon outside the root, decay times the learning rate, no decay where a name
contains "bias" or "LayerNorm.weight", one global norm for clipping. With `bias_correction` the
averages are those of Kingma and Ba (arXiv:1412.6980, algorithm 1); the released code has none.
"""

import math

import torch


class PlainAdamW:
    """Averages and weights by name; a step changes the weights in place."""

    def __init__(self, weights, section, clipping=0.0):
        self.weights = weights
        self.betas, self.eps = section.betas, section.eps
        self.weight_decay = section.weight_decay
        self.bias_correction = section.bias_correction
        self.clipping = clipping
        self.mean = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.square = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.steps = 0

    def step(self, gradients, learning_rates):
        """Clip and update, with a rate for each name; the global norm before clipping."""
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        factor = self.clipping / norm if 0 < self.clipping < norm else 1.0
        self.steps += 1
        beta_1, beta_2 = self.betas
        for name, weight in self.weights.items():
            gradient = gradients[name] * factor
            mean, square = self.mean[name], self.square[name]
            mean.mul_(beta_1).add_((1 - beta_1) * gradient)
            square.mul_(beta_2).add_((1 - beta_2) * gradient**2)
            if self.bias_correction:
                mean = mean / (1 - beta_1**self.steps)
                square = square / (1 - beta_2**self.steps)
            decay = 0.0 if exempt(name) else self.weight_decay
            with torch.no_grad():
                update = mean / (square.sqrt() + self.eps) + decay * weight
                weight.sub_(learning_rates[name] * update)
        return norm


def exempt(name):
    """Whether a parameter does not decay."""
    return "bias" in name or "LayerNorm.weight" in name


def learning_rate_factor(step, schedule):
    """Factor on the peak rate of a step; `schedule` has the fields of the section [schedule]."""
    share = step / schedule.max_steps
    warmup = schedule.warmup_steps / schedule.max_steps
    if share < warmup:
        return share / warmup
    if schedule.decay == "linear_released":  # `warmup_linear` of the released code
        return 1 - share
    if schedule.decay == "linear":  # its `warmup_linear_shift`
        return (1 - share) / (1 - warmup)
    last = schedule.final_learning_rate_factor
    if schedule.decay == "cosine":
        return last + (1 - last) * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))) / 2
    left = (schedule.max_steps - step) / schedule.decay_steps
    return last + (1 - last) * min(1.0, left)
