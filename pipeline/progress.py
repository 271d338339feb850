"""What a person sees while training runs: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.terminal import tell

_SHOWN = {
    "train/mlm_loss": "mlm",
    "train/rtd_loss": "rtd",
    "train/rtd_accuracy_replaced": "replaced",
    "perf/tokens_per_second": "tok/s",
    "perf/mfu": "mfu",
}


def describe(figures: dict[str, float]) -> str:
    """Write the figures of a row in one short line.

    Args:
        figures: A row of metrics.

    Returns:
        For example "mlm 6.1203  rtd 0.3341  replaced 0.412  tok/s 5,120".
    """
    words = []
    for name, label in _SHOWN.items():
        if name in figures:
            value = figures[name]
            words.append(f"{label} {value:,.0f}" if value >= 1000 else f"{label} {value:.4f}")
    return "  ".join(words)


class ProgressDisplay:
    """Shows steps done, the last figures and the time that is left; rank 0 only."""

    def __init__(
        self,
        first_step: int,
        max_steps: int,
        health: Callable[[int], str] = lambda _step: "",
    ) -> None:
        """Start the display.

        Args:
            first_step: Completed steps at the start.
            max_steps: Steps of the whole run.
            health: Says behind the row of a step how the run stands beside others; nothing at most
                steps.
        """
        self._health = health
        self._max_steps = max_steps
        self._first_step = first_step
        self._started_seconds = time.monotonic()
        self._live: Progress | None = None
        if sys.stderr.isatty():
            self._live = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._live.add_task("", total=max_steps, completed=first_step)
            self._live.start()

    def advance(self, step: int) -> None:
        """Move the bar.

        Args:
            step: Completed steps.
        """
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Show a row of metrics.

        Args:
            step: Completed steps.
            figures: The row.
        """
        if self._live is not None:
            self._live.update(self._task, description=describe(figures))
        else:
            self.say(f"step {step:,}/{self._max_steps:,}  {describe(figures)}  {self._left(step)}")
        if line := self._health(step):
            self.say(line)

    def say(self, text: str) -> None:
        """Print one line without tearing the bar.

        Args:
            text: The line.
        """
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            tell(text)

    def _left(self, step: int) -> str:
        rate = (time.monotonic() - self._started_seconds) / max(1, step - self._first_step)
        seconds = int(rate * (self._max_steps - step))
        return f"left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Stop the live display."""
        if self._live is not None:
            self._live.stop()
