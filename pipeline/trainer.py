"""The training loop and its events: step, row of metrics, evaluation, commit, stop.

`Trainer.fit` is the whole loop. Events happen in a fixed order (row, evaluation, commit), so that a
commit holds everything that was written up to its step and a resumed run writes the rest again.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_prep.errors import DivergedError
from pipeline.checkpoint import CheckpointStore, SaveError
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.data import SequenceBatch, TrainBatches
from pipeline.engine import Engines, parameter_norm
from pipeline.engine_state import scalar_state
from pipeline.engine_stepping import StepOutcome, set_learning_rates
from pipeline.guard import loss_above_chance, losses_above_start
from pipeline.metrics import IntervalSums, MetricsWriter
from pipeline.objective_keys import ObjectiveKeys
from pipeline.prefetch import Prefetcher
from pipeline.progress import ProgressDisplay, describe
from pipeline.run_folder import RunFolder
from pipeline.runtime import StopSignal, World
from pipeline.schedule import learning_rate_factor
from pipeline.step import StepResult, TrainingStep
from pipeline.throughput import Throughput

DELTA_NAME = "deberta.embeddings.word_embeddings._weight"
"""The discriminator's Delta of gradient-disentangled embedding sharing."""
MAX_FAILED_COMMITS = 3
"""Commits in a row that may fail before the run ends: more work than this is not put at risk."""

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What a commit stores beside the networks; plain values, equal on all ranks."""

    step: int = 0
    """Completed optimizer steps."""
    skipped: dict[str, int] = field(default_factory=dict)
    """By engine: steps refused because a gradient was not finite."""
    consecutive_skipped: int = 0
    """Steps in a row in which some engine refused."""
    owes_evaluation: bool = False
    """A request to stop came before this step's evaluation was done; a resumed run does it."""
    starting_figures: dict[str, float] = field(default_factory=dict)
    """Continued pre-training: the held-out figures of the model that it began with."""

    def count(self, outcomes: dict[str, StepOutcome]) -> None:
        """Record what the optimizers did.

        Args:
            outcomes: By engine.
        """
        self.step += 1
        for name, outcome in outcomes.items():
            self.skipped[name] = self.skipped.get(name, 0) + (not outcome.applied)
        applied = all(outcome.applied for outcome in outcomes.values())
        self.consecutive_skipped = 0 if applied else self.consecutive_skipped + 1


@dataclass
class Services:
    """What the loop calls besides the step; the last three exist on rank 0 only."""

    checkpoints: CheckpointStore
    stop: StopSignal
    evaluate: Callable[[], dict[str, float] | None]
    folder: RunFolder
    metrics: MetricsWriter | None
    progress: ProgressDisplay | None


class Trainer:
    """Runs optimizer steps until the schedule ends or somebody asks to stop."""

    def __init__(
        self,
        config: RunConfig,
        engines: Engines,
        train_step: TrainingStep,
        keys: Mapping[int, ObjectiveKeys],
        batches: TrainBatches,
        services: Services,
        *,
        world: World,
        state: TrainState,
        interval: IntervalSums,
        identity: dict[str, Any],
        config_json: str,
    ) -> None:
        """Connect the parts.

        Args:
            config: The run.
            engines: The networks.
            train_step: One optimizer step.
            keys: By sequence length: the random functions of masks and draws.
            batches: The data as a function of the step.
            services: Checkpoints, signals, evaluation and output.
            world: This process's place.
            state: Where to start.
            interval: Sums of the interval that a commit interrupted.
            identity: What must be the same on resume (data, tokenizer, environment).
            config_json: The resolved configuration, stored in every commit.
        """
        self.config = config
        self.state = state
        self._engines = engines
        self._train_step = train_step
        self._keys = keys
        self._batches = batches
        self._services = services
        self._world = world
        self._interval = interval
        self.identity = identity
        self._config_json = config_json
        self._clock = Throughput(config, world)
        self._last_commit = state.step
        self._failed_commits = 0

    def fit(self) -> str:
        """Train; all ranks execute the same statements.

        Returns:
            "done" or "stopped".

        Raises:
            DivergedError: Too many steps in a row were not finite.
            CorruptError: A shard's bytes are not what was written.
            SaveError: The last commit, or several in a row, could not be written.
        """
        max_steps = self.config.schedule.max_steps
        prefetcher = Prefetcher(self._batches, self.state.step, max_steps)
        try:
            stopping = self._repay_evaluation()
            while self.state.step < max_steps and not stopping:
                with self._clock.waiting_for_data():
                    micro_batches = prefetcher.next()
                result = self._take_step(micro_batches)
                stopping = self._services.stop.agreed()
                self._write_row_when_due(result)
                stopping = self._evaluate_when_due(stopping)
                self._commit_when_due(stopping)
                self._refuse_divergence()
            return "stopped" if stopping else "done"
        finally:
            prefetcher.close()

    def _take_step(self, micro_batches: list[SequenceBatch]) -> StepResult:
        """Train on the micro batches of the step that comes next, and count it."""
        step, length = self.state.step, micro_batches[0].input_ids_BL.shape[1]
        factor = learning_rate_factor(step, self.config.schedule)
        result = self._train_step(
            step, micro_batches, self._keys[length], partial(self._set_rates, factor)
        )
        self._clock.count_step(self._batches.batch_size_at(step), length)
        self.state.count(result.outcomes)
        self._interval.add(result.sums)
        return result

    def _set_rates(self, factor: float, name: str) -> None:
        """Write the learning rates of the coming step into one engine."""
        set_learning_rates(self._engines.by_name[name], self.config.optimizer, factor)

    def _is_due(self, interval_steps: int) -> bool:
        """Whether an event falls on the step that just ended; the last step has all events."""
        step = self.state.step
        last = step == self.config.schedule.max_steps
        return last or (interval_steps > 0 and step % interval_steps == 0)

    def _write_row_when_due(self, result: StepResult) -> None:
        services = self._services
        if services.progress is not None:
            services.progress.advance(self.state.step)
        if not self._is_due(self.config.logging.interval_steps):
            return
        figures = {
            **self._interval.take(),
            **self._delta_figure(),
            "train/epochs": self._batches.epochs_at(self.state.step),
            **self._optimizer_figures(result.outcomes),
            **self._clock.take(),
        }
        if services.metrics is not None and services.progress is not None:
            services.metrics.write(self.state.step, figures)
            services.progress.show(self.state.step, figures)

    def _delta_figure(self) -> dict[str, float]:
        """How far E_D has moved from E_G; a collective."""
        if self.config.objective.task == "mlm" or self.config.objective.embedding_sharing != "gdes":
            return {}
        joint = self._engines.by_name.get("joint")
        engine = joint or self._engines.by_name["discriminator"]
        name = f"discriminator.{DELTA_NAME}" if joint else DELTA_NAME
        return {"train/delta_norm": parameter_norm(engine, name, self._world)}

    def _optimizer_figures(self, outcomes: dict[str, StepOutcome]) -> dict[str, float]:
        """Learning rates of the networks; gradient norms and refused steps of the engines."""
        factor = learning_rate_factor(self.state.step - 1, self.config.schedule)
        optimizer = self.config.optimizer
        rates = {
            f"optim/{network}_learning_rate": optimizer.learning_rate(network) * factor
            for network in self.config.networks
        }
        norms = {f"optim/{name}_grad_norm": each.grad_norm for name, each in outcomes.items()}
        skipped = {f"optim/{name}_skipped_steps": self.state.skipped[name] for name in outcomes}
        return {**rates, **norms, **skipped}

    def _evaluate_when_due(self, stopping: bool) -> bool:
        """Evaluate at intervals and at the end; returns whether to stop.

        A request to stop comes first: what was not evaluated is owed by the commit of this step.
        """
        if not self._is_due(self.config.evaluation.interval_steps):
            return stopping
        self.state.owes_evaluation = stopping or not self._evaluate()
        return self.state.owes_evaluation

    def _repay_evaluation(self) -> bool:
        """Do the evaluation that a stopped run left out; returns whether to stop again."""
        if self.state.owes_evaluation:
            self.state.owes_evaluation = not self._evaluate()
        return self.state.owes_evaluation

    def _evaluate(self) -> bool:
        """Write the held-out figures of this step; False where a request to stop came between."""
        with self._clock.paused():
            figures = self._services.evaluate()
        if figures and self.config.initialize.path:
            self._guard(figures)
        if figures and self._services.metrics is not None and self._services.progress is not None:
            self._services.metrics.write(self.state.step, figures)
            shown = describe({k.replace("eval/", "train/"): v for k, v in figures.items()})
            self._services.progress.say(f"step {self.state.step:,} held-out: {shown}")
        return figures is not None

    def _guard(self, figures: dict[str, float]) -> None:
        """Judge and keep the figures of the starting point; warn where a later loss is higher."""
        margin, start = self.config.initialize.guard_margin, self.state.starting_figures
        if self.state.step == 0:
            self.state.starting_figures = figures
            lines = loss_above_chance(figures)
        else:
            lines = losses_above_start(start, figures, margin)
        for line in lines:
            logger.warning("step %d: %s", self.state.step, line)

    def _commit_when_due(self, stopping: bool) -> None:
        """Commit at intervals, at the end and on request; a full disk must not end a long run."""
        if not stopping and not self._is_due(self.config.checkpoint.interval_steps):
            return
        try:
            with self._clock.paused():
                self.commit()
            self._failed_commits = 0
        except SaveError as error:
            self._failed_commits += 1
            is_last = stopping or self.state.step == self.config.schedule.max_steps
            if is_last or self._failed_commits == MAX_FAILED_COMMITS:
                raise SaveError(
                    f"{error}; the newest commit is step {self._last_commit}: make room, then the "
                    "same command goes on from there"
                ) from error
            logger.warning("step %d: %s; the next commit tries again", self.state.step, error)

    def commit(self) -> Commit:
        """Publish the state of this step boundary; a collective.

        Returns:
            The commit.
        """
        engines = self._engines.by_name
        train_state = {
            "state": vars(self.state),
            "interval_sums": self._interval.state(),
            "networks": {name: scalar_state(engine) for name, engine in engines.items()},
            "identity": self.identity,
            "tokens": self._batches.tokens_before(self.state.step),
        }
        step = self.state.step
        if self._services.metrics is not None:
            self._services.metrics.sync()
        commit = self._services.checkpoints.save(step, engines, train_state, self._config_json)
        self._last_commit = step
        if self._world.is_main:
            self._services.folder.write_status("running", step)
        logger.info("committed %s", commit.path)
        return commit

    def close(self) -> None:
        """Flush and close what was opened for output."""
        if self._services.metrics is not None:
            self._services.metrics.close()
        if self._services.progress is not None:
            self._services.progress.close()

    def _refuse_divergence(self) -> None:
        limit = self.config.schedule.max_consecutive_skipped_steps
        if self.state.consecutive_skipped >= limit:
            raise DivergedError(
                f"{limit} steps in a row had a non-finite gradient, the last one step "
                f"{self.state.step}; the newest commit is step {self._last_commit}. Lower "
                "optimizer.*_learning_rate, use bf16 instead of fp16, or raise "
                "schedule.warmup_steps (limit: schedule.max_consecutive_skipped_steps)"
            )
