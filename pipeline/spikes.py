"""Loss spikes: a step whose loss lies far above those of the steps before it.

Each loss is judged by itself, by a robust z-score that neither the spikes before it nor a slow
descent disturb:

    z = (x - median) / (1.4826 MAD)    MAD is the median distance from the median

A spike does not enter the window that later steps are compared with. Where several follow one
another they are a new level and no spikes: they become the window. A change of the sequence length
or of the batch changes the losses, and begins a new window.

Everything is plain Python and part of a commit, so that a resumed run decides the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.config import SafetySection

MIN_STEPS = 32
"""Steps without which nothing is judged; fewer where the window is shorter."""
NEW_LEVEL_STEPS = 16
"""Spikes in a row that are a new level."""
_NORMAL_MAD = 1.4826  # of a normal distribution: standard deviation / MAD
# Losses that hardly vary, as those of very large batches, make no spike of a thousandth.
_LEAST_RELATIVE_DEVIATION = 1e-3


@dataclass(frozen=True)
class Spike:
    """A loss far above its window."""

    loss: str
    """Name of the loss."""
    value: float
    median: float
    """Of the window."""
    z_score: float
    in_a_row: int
    """1 for the first; behind the last of `NEW_LEVEL_STEPS` the window is theirs."""

    def explain(self) -> str:
        """Write it for people.

        Returns:
            For example "train/mlm_loss 9.31 is a spike: 14.2 robust deviations above the median
            6.80 of the steps before".
        """
        return (
            f"{self.loss} {self.value:.4g} is a spike: {self.z_score:.1f} robust deviations above "
            f"the median {self.median:.4g} of the steps before"
        )


class SpikeDetector:
    """Compares every step's losses with those of the steps before it."""

    def __init__(self, section: SafetySection) -> None:
        """Start with empty windows.

        Args:
            section: Threshold, 0 for never, and the window's steps.
        """
        self._threshold = section.spike_threshold
        self._window_steps = section.spike_window_steps
        self._min_steps = min(MIN_STEPS, section.spike_window_steps)
        self._phase: list[int] = []
        self._windows: dict[str, list[float]] = {}
        self._above: dict[str, list[float]] = {}

    def observe(self, losses: Mapping[str, float], phase: Sequence[int]) -> Spike | None:
        """Judge a step that was applied, then remember it.

        Args:
            losses: Global losses of the step by name; what is not finite is passed over.
            phase: What losses depend on beside the weights: sequence length and batch size.

        Returns:
            The spike with the highest z-score; None where there is none.
        """
        if self._threshold == 0:
            return None
        if list(phase) != self._phase:
            self._phase, self._windows, self._above = list(phase), {}, {}
        finite = [(name, value) for name, value in losses.items() if math.isfinite(value)]
        spikes = [self._judge(name, value) for name, value in finite]
        return max((s for s in spikes if s is not None), key=lambda s: s.z_score, default=None)

    def _judge(self, name: str, value: float) -> Spike | None:
        window = self._windows.setdefault(name, [])
        above = self._above.setdefault(name, [])
        if len(window) >= self._min_steps:
            middle, z_score = _robust_z_score(value, window)
            if z_score > self._threshold:
                above.append(value)
                spike = Spike(name, value, middle, z_score, len(above))
                if len(above) == NEW_LEVEL_STEPS:
                    self._windows[name], self._above[name] = above, []
                return spike
        above.clear()
        window.append(value)
        del window[: -self._window_steps]
        return None

    def state(self) -> dict[str, Any]:
        """Give what a commit stores.

        Returns:
            JSON-ready values.
        """
        return {
            "phase": list(self._phase),
            "windows": {name: list(values) for name, values in self._windows.items()},
            "above": {name: list(values) for name, values in self._above.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a commit stood.

        Args:
            state: What `state` returned; empty for a commit that has none.
        """
        self._phase = list(state.get("phase", ()))
        self._windows = {name: list(v) for name, v in state.get("windows", {}).items()}
        self._above = {name: list(v) for name, v in state.get("above", {}).items()}


def _robust_z_score(value: float, window: Sequence[float]) -> tuple[float, float]:
    """The window's median, and how far a value lies above it."""
    middle = median(window)
    deviation = _NORMAL_MAD * median(abs(each - middle) for each in window)
    deviation = max(deviation, _LEAST_RELATIVE_DEVIATION * abs(middle))
    return middle, (value - middle) / deviation if deviation else 0.0
