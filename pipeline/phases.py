"""Which samples a step trains on, where the sequence length or the batch changes during a run.

A run is a row of phases: those of [[schedule.phases]] and the rest. Each sequence length has a
stream of its own (`pipeline.data`), so positions are counted for each length by itself, and a phase
goes on where an earlier one of the same length stopped. Everything is a sum over phases and a
function of the step; nothing is remembered.

Example with a rest of 8 sequences of 512 tokens:

    until_step 10, sequence_length 128, train_batch_size 4     steps  0-9     128: samples 0-39
    until_step 15, train_batch_size 2                          steps 10-14    512: samples 0-9
    the rest                                                   steps 15-...   512: samples 10-...
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.ds_checks import multiples_near
from pipeline.ds_config import BatchPlan
from pipeline.findings import raise_findings


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with one sequence length and one batch size."""

    first_step: int
    """Step with which it begins."""
    end_step: int
    """Step before which it ends."""
    sequence_length: int
    """Tokens in a sequence."""
    train_batch_size: int
    """Sequences in a step, over all ranks."""

    def steps_before(self, step: int) -> int:
        """Count its steps among the first steps of the run.

        Args:
            step: Completed optimizer steps of the run.

        Returns:
            Completed steps of this phase.
        """
        return max(0, min(step, self.end_step) - self.first_step)


@dataclass(frozen=True)
class TrainSchedule:
    """The phases of a run, without a gap; the last one ends at max_steps."""

    phases: tuple[Phase, ...]

    def phase_at(self, step: int) -> Phase:
        """Look up the phase of a step.

        Args:
            step: Completed optimizer steps before it; from max_steps on it is the last phase.

        Returns:
            The phase, with the step's sequence length and batch size.
        """
        return next((p for p in self.phases if step < p.end_step), self.phases[-1])

    def samples_before(self, step: int, sequence_length: int) -> int:
        """Count the sequences of one length before a step.

        Args:
            step: Completed optimizer steps.
            sequence_length: Tokens in the sequences to count.

        Returns:
            Sequences of that length in the first `step` steps.
        """
        return sum(
            phase.steps_before(step) * phase.train_batch_size
            for phase in self.phases
            if phase.sequence_length == sequence_length
        )

    def first_sample(self, step: int) -> int:
        """Count the sequences of a step's own length before it.

        Args:
            step: Completed optimizer steps before it.

        Returns:
            The number of its first sample among those of its length that are trained on: its
            position in their endless order where nothing is left out (`pipeline.sample_order`).
        """
        return self.samples_before(step, self.phase_at(step).sequence_length)

    def samples_by_length(self) -> dict[int, int]:
        """Count the sequences of each length over the whole schedule.

        Returns:
            Sequence length -> sequences.
        """
        end = self.phases[-1].end_step
        return {
            phase.sequence_length: self.samples_before(end, phase.sequence_length)
            for phase in self.phases
        }

    def tokens_before(self, step: int) -> int:
        """Count tokens, padding included.

        Args:
            step: Completed optimizer steps.

        Returns:
            Sequences times their length over the first `step` steps.
        """
        return sum(
            phase.steps_before(step) * phase.train_batch_size * phase.sequence_length
            for phase in self.phases
        )

    def explain(self) -> list[str]:
        """Write the phases for people.

        Returns:
            One line a phase; none where there is only one.
        """
        if len(self.phases) == 1:
            return []
        return [
            f"steps {phase.first_step:,} to {phase.end_step - 1:,}:"
            f" {phase.train_batch_size:,} sequences of {phase.sequence_length} ="
            f" {phase.train_batch_size * phase.sequence_length:,} tokens a step"
            for phase in self.phases
        ]


def train_schedule(config: RunConfig, plan: BatchPlan, first_step: int = 0) -> TrainSchedule:
    """Lay out the phases of a run, and check that this world can split their batches.

    Args:
        config: The run.
        plan: The DeepSpeed JSON's batch, split over this world.
        first_step: Step at which this start of the run begins; a phase that has ended may have been
            another world's.

    Returns:
        The phases; one where the configuration names none.

    Raises:
        UserError: With every phase whose batch cannot be split, and the sizes that can.
    """
    raise_findings("the run configuration", list(_findings(config, plan, first_step)))
    given = config.schedule.phases
    starts = [0, *(phase.until_step for phase in given)]
    ends = [*starts[1:], config.schedule.max_steps]
    lengths = [phase.sequence_length or config.data.sequence_length for phase in given]
    sizes = [phase.train_batch_size or plan.train_batch_size for phase in given]
    lengths.append(config.data.sequence_length)
    sizes.append(plan.train_batch_size)
    return TrainSchedule(tuple(map(Phase, starts, ends, lengths, sizes)))


def _findings(config: RunConfig, plan: BatchPlan, first_step: int) -> Iterator[str]:
    """Batches of phases that are no number of micro steps, or more than DeepSpeed was told of."""
    micro, ranks = plan.train_micro_batch_size_per_gpu, plan.world_size
    for index, phase in enumerate(config.schedule.phases):
        size, path = phase.train_batch_size, f"schedule.phases[{index}].train_batch_size"
        if size is None or phase.until_step <= first_step:
            continue
        if size > plan.train_batch_size:
            yield (
                f"{path} {size} is more than the DeepSpeed JSON's train_batch_size"
                f" {plan.train_batch_size}, which the run ends with: phases are for smaller batches"
            )
        elif size % (micro * ranks):
            near = multiples_near(size, micro * ranks)
            yield (
                f"{path} {size} is not a multiple of {micro} per rank x {ranks} ranks ="
                f" {micro * ranks}; the nearest that are: {', '.join(map(str, near))}"
            )
