"""The [schedule] section of RunConfig: how many steps there are, and what changes over them.

    ScheduleSection     steps, warm-up, decay
    PhaseSection        a beginning with shorter sequences or smaller batches
    ExtensionSection    a later end than the run had at first

`pipeline.schedule` turns them into a learning rate, `pipeline.phases` into batches.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config_networks import NonNegativeInt, PositiveInt, Probability, Section


class PhaseSection(Section):
    """[[schedule.phases]]: the beginning of a run, with shorter sequences or smaller batches."""

    until_step: PositiveInt
    """Optimizer step before which the phase ends; the next phase, or the rest, begins there."""
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens in a sequence; data.sequence_length where not given."""
    train_batch_size: PositiveInt | None = None
    """Sequences in a step; the DeepSpeed JSON's where not given."""


class ExtensionSection(Section):
    """[[schedule.extensions]]: another end of the run, chosen when a part of it was done.

    `deberta extend` writes them. Steps before `from_step` keep the schedule that they had.
    """

    from_step: PositiveInt
    """Optimizer step with which it begins."""
    previous_max_steps: PositiveInt
    """schedule.max_steps before it."""
    peak_factor: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the peak learning rates that it warms up to again, and decays from; where not given,
    the share that from_step had: the decay goes on from there."""
    warmup_steps: NonNegativeInt = 0
    """Steps of the line up to peak_factor, from the share that from_step had."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A start behind the end that it moves, and a warm-up to nowhere."""
        if self.from_step > self.previous_max_steps:
            yield (
                "from_step",
                f"{self.from_step} is more than previous_max_steps {self.previous_max_steps}",
            )
        if self.warmup_steps and self.peak_factor is None:
            yield "warmup_steps", f"{self.warmup_steps} leads to no peak_factor; give both"


class ScheduleSection(Section):
    """[schedule]: optimizer steps, and what changes over them."""

    max_steps: PositiveInt
    """Optimizer steps of the whole run."""
    warmup_steps: NonNegativeInt
    """Steps of linear warm-up from zero."""
    decay: Literal["linear", "linear_released", "cosine", "wsd"] = "linear"
    """From the peak to zero at max_steps: in a line, in the line of the released code (which jumps
    by warmup_steps / max_steps behind the warm-up), in half a cosine, or at the end only."""
    decay_steps: NonNegativeInt = 0
    """Last steps in which `wsd` (warmup, stable, decay) goes to zero; for `wsd` alone."""
    final_learning_rate_factor: Probability = 0.0
    """Where `cosine` and `wsd` end, as a share of the peak."""
    phases: tuple[PhaseSection, ...] = ()
    """Shorter sequences or smaller batches at the beginning, in the order of their steps."""
    extensions: tuple[ExtensionSection, ...] = ()
    """Later ends of the run, in the order of their steps; max_steps is that of the last."""
    max_consecutive_skipped_steps: PositiveInt = 20
    """Non-finite steps in a row (of either network) after which the run stops with exit code 87."""

    @property
    def first_max_steps(self) -> int:
        """The end that warmup_steps and the first decay belong to."""
        return self.extensions[0].previous_max_steps if self.extensions else self.max_steps

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Parts that outlast the run, and keys without the decay that they belong to."""
        end = self.first_max_steps
        name = "schedule.max_steps" if not self.extensions else "the first previous_max_steps"
        if self.warmup_steps > end:
            yield (
                "warmup_steps",
                f"{self.warmup_steps} is more than {name} {end};"
                f" add schedule.warmup_steps={end // 10}",
            )
        if (self.decay == "wsd") != (self.decay_steps > 0):
            yield (
                "decay_steps",
                f"{self.decay_steps} does not go with schedule.decay {self.decay}: it is the length"
                " of wsd's descent, and 0 with any other decay",
            )
        if self.warmup_steps + self.decay_steps > max(end, self.warmup_steps):
            yield (
                "decay_steps",
                f"{self.decay_steps} and schedule.warmup_steps {self.warmup_steps} are together"
                f" more than {name} {end}",
            )
        if self.final_learning_rate_factor and self.decay not in ("cosine", "wsd"):
            yield (
                "final_learning_rate_factor",
                f"{self.final_learning_rate_factor} does not go with schedule.decay {self.decay},"
                " which ends at zero; use cosine or wsd",
            )
        ends = [phase.until_step for phase in self.phases]
        if ends != sorted(set(ends)) or (ends and ends[-1] >= self.max_steps):
            yield (
                "phases",
                f"end at steps {ends}: each must end after the one before it, and the last before"
                f" schedule.max_steps {self.max_steps}",
            )
        yield from self._contradicting_extensions()

    def _contradicting_extensions(self) -> Iterator[tuple[str, str]]:
        """Extensions out of order, without room for their warm-up, or below where they end."""
        ends = [*(row.previous_max_steps for row in self.extensions[1:]), self.max_steps]
        for row, end in zip(self.extensions, ends, strict=False):
            if row.from_step + max(1, row.warmup_steps) > end:
                yield (
                    "extensions",
                    f"from step {row.from_step} with {row.warmup_steps} steps of warm-up does not"
                    f" fit before step {end}, where it ends",
                )
            if row.peak_factor is not None and row.peak_factor < self.final_learning_rate_factor:
                yield (
                    "extensions",
                    f"peak_factor {row.peak_factor} is less than schedule."
                    f"final_learning_rate_factor {self.final_learning_rate_factor}, where it ends",
                )
        starts = [row.from_step for row in self.extensions]
        if starts != sorted(set(starts)):
            yield "extensions", f"begin at steps {starts}: each must begin after the one before it"
