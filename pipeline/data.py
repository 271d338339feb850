"""From a split's token stream to batches: every batch is a function of the step.

    1. `pipeline.sequences` cuts the stream into sequences and reads them.
    2. `pipeline.sample_order` permutes the sequences of every epoch; each sequence length has an
       order of its own. Where sources have weights, `pipeline.mixture` chooses among them first.
    3. `pipeline.phases` says which positions of which order a step takes, and
       `TrainBatches.at_step` cuts them into micro batches by rank; another world size cuts the same
       samples. Without phases, step s takes [s * batch, (s + 1) * batch). Positions in the skip
       list, which roll-backs add to, are passed over.
    4. `pipeline.prefetch` asks for the next steps in a thread, and puts them where a GPU can fetch
       them; `TrainBatches.in_order` tells the dataset what they will need, which is read and
       checked ahead.

Nothing is remembered between steps: resuming is asking for another step.
"""

from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.config import RunConfig
from pipeline.ds_config import BatchPlan
from pipeline.mixture import MixtureOrder
from pipeline.mixture_sources import is_mixture, mixture_sources
from pipeline.phases import TrainSchedule, train_schedule
from pipeline.sample_order import (
    NOTHING_SKIPPED,
    Int64Array,
    SampleOrder,
    SkipList,
    SkippedWindow,
)
from pipeline.sequences import SequenceBatch, SequenceStream

_SAMPLES_AHEAD = (
    32_768  # of this rank: a window of the default order, or what many ranks need longer
)


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of one rank, as a function of the step."""

    streams: Mapping[int, SequenceStream]
    """By sequence length."""
    orders: Mapping[int, SampleOrder | MixtureOrder]
    """By sequence length."""
    schedule: TrainSchedule
    micro_batch_size: int
    world_size: int
    rank: int
    skip_list: SkipList = NOTHING_SKIPPED
    """What roll-backs have left out."""

    def batch_size_at(self, step: int) -> int:
        """Look up the batch of a step.

        Args:
            step: Completed optimizer steps before it.

        Returns:
            Its sequences, over all ranks.
        """
        return self.schedule.phase_at(step).train_batch_size

    def tokens_before(self, step: int) -> int:
        """Count the tokens of the first steps, padding included.

        Args:
            step: Completed optimizer steps.

        Returns:
            Tokens.
        """
        return self.schedule.tokens_before(step)

    def epochs_at(self, step: int) -> float:
        """Give the passes over the split's tokens after so many steps.

        Args:
            step: Completed optimizer steps.

        Returns:
            Epochs, with fraction, added up over the sequence lengths. What was left out before the
            last sample counts as passed: the data is that much further.
        """
        return sum(
            self._positions_before(step, length) / stream.num_sequences
            for length, stream in self.streams.items()
        )

    def source_epochs_at(self, step: int) -> dict[str, float]:
        """Give the passes over each source of a mixture after so many steps.

        Args:
            step: Completed optimizer steps.

        Returns:
            Source -> epochs, with fraction, added up over the sequence lengths; nothing where
            sources are drawn by their sizes.
        """
        epochs: Counter[str] = Counter()
        for length, order in self.orders.items():
            if isinstance(order, MixtureOrder):
                epochs.update(order.passes_before(self._positions_before(step, length)))
        return dict(epochs)

    def _positions_before(self, step: int, sequence_length: int) -> int:
        """How far one length's order has been used up after so many steps."""
        count = self.schedule.samples_before(step, sequence_length)
        last = self.skip_list.positions(sequence_length, np.array([count - 1], np.int64))
        return int(last[0]) + 1 if count else 0

    def at_step(self, step: int) -> list[SequenceBatch]:
        """Read this rank's micro batches of one optimizer step.

        Args:
            step: Completed optimizer steps before this one.

        Returns:
            One batch a micro step, as many as the step's batch needs. Over all ranks and micro
            steps they hold, once each, as many positions of the order of the step's sequence length
            as its batch has sequences: those after the first `schedule.first_sample(step)` that
            are not left out.

        Raises:
            CorruptError: As for `SequenceStream.batch`.
        """
        epochs, samples = self.samples_at(step, self.rank)
        return self._stream_at(step).micro_batches(samples, epochs, self.micro_batch_size)

    def in_order(self, first_step: int, end_step: int) -> Generator[list[SequenceBatch]]:
        """Read this rank's micro batches of consecutive steps.

        Threads hash the blocks that the next steps need for the first time meanwhile.

        Args:
            first_step: Completed optimizer steps before the first of them.
            end_step: The same for the first step behind them.

        Yields:
            What `at_step` gives, step by step.

        Raises:
            CorruptError: As for `at_step`, at the step that needs what is damaged.
        """
        known: deque[tuple[Int64Array, Int64Array]] = deque()  # of the steps from this one on
        announced = first_step
        try:
            for step in range(first_step, end_step):
                announced = max(announced, step)
                while announced < end_step:
                    if announced == step + len(known):
                        if known and len(known) * len(known[0][1]) >= _SAMPLES_AHEAD:
                            break
                        known.append(self.samples_at(announced, self.rank))
                    if not self._stream_at(announced).announce(known[announced - step][1]):
                        break
                    announced += 1
                epochs, samples = known.popleft()
                yield self._stream_at(step).micro_batches(samples, epochs, self.micro_batch_size)
        finally:
            for stream in self.streams.values():
                stream.stop_announced()

    def _stream_at(self, step: int) -> SequenceStream:
        return self.streams[self.schedule.phase_at(step).sequence_length]

    def samples_at(self, step: int, rank: int) -> tuple[Int64Array, Int64Array]:
        """Name the samples that a rank trains on in one optimizer step, without reading them.

        Args:
            step: Completed optimizer steps before this one.
            rank: Any rank of this world.

        Returns:
            (epochs, samples), int64 [n] each, micro step by micro step.
        """
        phase = self.schedule.phase_at(step)
        per_micro_step = self.micro_batch_size * self.world_size
        first = self.schedule.first_sample(step) + rank * self.micro_batch_size
        starts = np.arange(first, first + phase.train_batch_size, per_micro_step, dtype=np.int64)
        # One call for the whole step: the order's cost is that of calls, not of samples.
        counts = (starts[:, None] + np.arange(self.micro_batch_size, dtype=np.int64)).ravel()
        positions = self.skip_list.positions(phase.sequence_length, counts)
        return self.orders[phase.sequence_length].samples(positions)

    def windows_between(self, first_step: int, end_step: int) -> tuple[SkippedWindow, ...]:
        """Give the data of consecutive steps, to be left out when they are taken again.

        Args:
            first_step: Completed optimizer steps before the first of them.
            end_step: The same for the first step behind them.

        Returns:
            One window for every sequence length that they train on.
        """
        windows = (
            self.skip_list.window_of(
                length,
                self.schedule.samples_before(first_step, length),
                self.schedule.samples_before(end_step, length),
            )
            for length in self.streams
        )
        return tuple(window for window in windows if window is not None)


def train_batches(
    config: RunConfig,
    plan: BatchPlan,
    streams: Mapping[int, SequenceStream],
    rank: int,
    first_step: int = 0,
    skip_list: SkipList = NOTHING_SKIPPED,
) -> TrainBatches:
    """Order the training sequences of a run and cut them into batches.

    Args:
        config: The run: seed, blocks and phases.
        plan: The batch of this world.
        streams: The training split, by each of `config.sequence_lengths`.
        rank: This rank.
        first_step: Step at which this start of the run begins.
        skip_list: What roll-backs have left out.

    Returns:
        The batches of this rank.

    Raises:
        UserError: This world cannot split the batch of a phase that has not ended.
    """
    return TrainBatches(
        streams,
        {length: _order(config, stream) for length, stream in streams.items()},
        train_schedule(config, plan, first_step),
        plan.train_micro_batch_size_per_gpu,
        plan.world_size,
        rank,
        skip_list,
    )


def _order(config: RunConfig, stream: SequenceStream) -> SampleOrder | MixtureOrder:
    """The endless order of the sequences of one length."""
    data, seed, length = config.data, config.run.seed, stream.sequence_length
    if is_mixture(stream, data):
        sources = mixture_sources(stream, data)
        return MixtureOrder(sources, seed, length, data.block_sequences, data.window_blocks)
    return SampleOrder(stream.num_sequences, seed, length, data.block_sequences, data.window_blocks)


def heldout_batches(
    stream: SequenceStream, chosen: Int64Array, batch_size: int, world_size: int, rank: int
) -> Iterator[tuple[SequenceBatch, bool]]:
    """Read this rank's share of held-out sequences, the same ones every time.

    Every rank gets as many batches as the others, because a forward pass of a sharded model is a
    collective; one that has run out repeats the first sequence, marked as not real.

    Args:
        stream: The held-out split.
        chosen: int64 [n], the sequences that all ranks read together; at least one.
        batch_size: Sequences in one batch; the last one may be smaller.
        world_size: Number of ranks.
        rank: This rank.

    Yields:
        (batch, whether it counts).
    """
    for round_start in range(0, len(chosen), world_size * batch_size):
        start = round_start + rank * batch_size
        is_real = start < len(chosen)
        samples = chosen[start : start + batch_size] if is_real else chosen[:1]
        yield stream.batch(samples, np.zeros_like(samples)), is_real
