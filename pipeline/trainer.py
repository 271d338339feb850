"""The training loop and its events: step, row of metrics, evaluation, commit, stop.

`Trainer.fit` is the whole loop. Events happen in a fixed order (row, evaluation, commit), so that a
commit holds everything that was written up to its step and a resumed run writes the rest again.
"""

import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline import faults
from pipeline.checkpoint import SaveError
from pipeline.config import RunConfig
from pipeline.data import TrainBatches
from pipeline.engine import Engines, parameter_norm
from pipeline.engine_state import scalar_state
from pipeline.engine_stepping import StepOutcome, set_learning_rates
from pipeline.guard import loss_above_chance, losses_above_start
from pipeline.metrics import IntervalSums
from pipeline.objective_keys import ObjectiveKeys
from pipeline.prefetch import Prefetcher
from pipeline.progress import describe
from pipeline.recovery import Recovery
from pipeline.runtime import World, on_all_ranks
from pipeline.schedule import learning_rate_factor
from pipeline.sequences import SequenceBatch
from pipeline.throughput import Throughput
from pipeline.train_state import Services, TrainState
from pipeline.training_step import StepAbandoned, StepResult, TrainingStep

DELTA_NAME = "deberta.embeddings.word_embeddings._weight"
"""The discriminator's Delta of gradient-disentangled embedding sharing."""
MAX_FAILED_COMMITS = 3
"""Commits in a row that may fail before the run ends: more work than this is not put at risk."""

logger = logging.getLogger(__name__)


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
        recovery: Recovery,
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
            recovery: Judges every step.
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
        self._recovery = recovery
        self._world = world
        self._interval = interval
        self.identity = identity
        self._config_json = config_json
        self._clock = Throughput(config, world)
        self._last_commit = state.step
        self._owes_commit = False
        self._failed_commits = 0
        self._slowest_rank_ratio: dict[str, float] = {}

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
        self._prefetcher = self._read_ahead()
        try:
            stopping = self._services.stop.agreed() or self._repay_evaluation()
            while self.state.step < max_steps and not stopping:
                result = self._take_step(self._wait_for_data())
                if shortage := self._services.resources.look():
                    self._services.stop.run_short(shortage)
                requests = self._services.stop.agreed_requests()
                stopping = requests.stop
                if result is not None:
                    self._write_row_when_due(result)
                    if self._go_back_when_diverged(result):
                        stopping = stopping or self._repay_evaluation()
                        continue
                    stopping = self._evaluate_when_due(stopping)
                self._commit_when_due(stopping, requests.save)
            self._finish_commits()
            return "stopped" if stopping else "done"
        finally:
            self._prefetcher.close()

    def _read_ahead(self) -> Prefetcher:
        """Begin to read the data of the next steps."""
        last_step = self.config.schedule.max_steps
        return Prefetcher(self._batches, self.state.step, last_step, device=self._world.device)

    def _wait_for_data(self) -> list[SequenceBatch]:
        """Take the micro batches of the step that comes next."""
        self._services.watchdog.mark("data", self.state.step)
        with self._clock.waiting_for_data():
            return self._prefetcher.next()

    def _take_step(self, micro_batches: list[SequenceBatch]) -> StepResult | None:
        """Train on the micro batches of the step that comes next, and count it.

        None where a request to stop came before a weight had changed: the step was not taken.
        """
        step, length = self.state.step, micro_batches[0].input_ids_BL.shape[1]
        factor = learning_rate_factor(step, self.config.schedule)
        try:
            result = self._train_step(
                step, micro_batches, self._keys[length], partial(self._set_rates, factor)
            )
        except StepAbandoned:
            return None
        self._services.watchdog.step_ended(
            self._clock.count_step(self._batches.batch_size_at(step), length)
        )
        self.state.count(result.outcomes)
        if bool(result.sums.isfinite().all()):  # one loss that is not would hide all the others
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
        """Write a row at intervals; ranks are compared at intervals of their own."""
        services = self._services
        ratio = services.stragglers.add(result.forward_seconds, self.state.step)
        if ratio is not None:
            self._slowest_rank_ratio = {"perf/slowest_rank_ratio": ratio}
        if services.progress is not None:
            services.progress.advance(self.state.step)
        if not self._is_due(self.config.logging.interval_steps):
            return
        figures = {
            **self._interval.take(),
            **self._delta_figure(),
            "train/epochs": self._batches.epochs_at(self.state.step),
            **self._source_epochs(),
            **self._optimizer_figures(result.outcomes),
            **self._clock.take(),
            **self._slowest_rank_ratio,
        }
        if services.metrics is not None and services.progress is not None:
            services.metrics.write(self.state.step, figures)
            services.progress.show(self.state.step, figures)

    def _source_epochs(self) -> dict[str, float]:
        epochs = self._batches.source_epochs_at(self.state.step)
        return {f"train/epochs/{source}": value for source, value in epochs.items()}

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
            figures = self._services.evaluate(self._between_batches)
        if figures and self.config.initialize.path:
            self._guard(figures)
        if figures and self._services.metrics is not None and self._services.progress is not None:
            self._services.metrics.write(self.state.step, figures)
            shown = describe({k.replace("eval/", "train/"): v for k, v in figures.items()})
            self._services.progress.say(f"step {self.state.step:,} held-out: {shown}")
        return figures is not None

    def _between_batches(self) -> bool:
        """Asked before every held-out batch: whether to give up the evaluation."""
        faults.reach("evaluate.batch", self.state.step)
        self._services.watchdog.mark("evaluate", self.state.step)
        return self._services.stop.agreed()

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

    def _commit_when_due(self, stopping: bool, wanted: bool) -> None:
        """Commit at intervals, at the end and on request; a full disk must not end a long run."""
        is_last = stopping or self.state.step == self.config.schedule.max_steps
        due = self._is_due(self.config.checkpoint.interval_steps)
        self._owes_commit = self._owes_commit or wanted or due
        # A commit in the middle of a streak of refused steps would be no place to go back to.
        can_wait = self.state.consecutive_skipped > 0 and not is_last
        # A step that was abandoned right behind a commit leaves nothing new.
        is_new = self.state.step != self._last_commit
        if not (self._owes_commit or is_last) or can_wait or not is_new:
            return
        self._owes_commit = False
        self._services.stop.saved()
        try:
            self.commit(wait=is_last)
            self._failed_commits = 0
        except SaveError as error:
            self._failed_commits += 1
            if is_last or self._failed_commits == MAX_FAILED_COMMITS:
                with contextlib.suppress(SaveError):  # one that is under way may succeed
                    self._services.checkpoints.finish()
                raise SaveError(
                    f"{error}; the newest commit is step {self._newest_commit}: make room, then "
                    "the same command goes on from there"
                ) from error
            logger.warning("step %d: %s; the next commit tries again", self.state.step, error)

    @property
    def _newest_commit(self) -> int:
        return self._services.checkpoints.published_step

    def commit(self, *, wait: bool = False) -> None:
        """Publish the state of this step boundary, or begin to; a collective.

        Args:
            wait: Return when it is published, with checkpoint.asynchronous too.

        Raises:
            SaveError: It, or the asynchronous one before it, cannot be written; on all ranks.
        """
        engines, step = self._engines.by_name, self.state.step
        self._services.watchdog.mark("save", step)
        with self._clock.paused():
            train_state = {
                "state": vars(self.state),
                "interval_sums": self._interval.state(),
                "networks": {name: scalar_state(engine) for name, engine in engines.items()},
                "identity": self.identity,
                "tokens": self._batches.tokens_before(step),
                "recovery": self._recovery.remember(),
            }
            on_all_ranks(self._services.control_group, self._sync_rows)
            # Where this raises for an asynchronous commit before it, this one is under way.
            self._last_commit = step if self.config.checkpoint.asynchronous else self._last_commit
            commit = self._services.checkpoints.save(
                step, engines, train_state, self._config_json, wait=wait
            )
        self._last_commit = step
        logger.info("commit %s", commit.path)

    def _finish_commits(self) -> None:
        """Wait for a commit that is still being written; one that fails now is written again."""
        try:
            self._services.checkpoints.finish()
        except SaveError as error:
            logger.warning("%s; step %d is written again", error, self.state.step)
            self.commit(wait=True)

    def _sync_rows(self) -> None:
        """Put the rows of metrics.jsonl on the disk; a commit must not outlive them."""
        if self._services.metrics is not None:
            try:
                self._services.metrics.sync()
            except OSError as error:
                raise SaveError(f"{self._services.folder.metrics}: {error}") from error

    def close(self) -> None:
        """Flush and close what was opened for output."""
        if self._services.metrics is not None:
            self._services.metrics.close()
        if self._services.progress is not None:
            self._services.progress.close()

    def _go_back_when_diverged(self, result: StepResult) -> bool:
        """Judge the step; whether the run goes on from an earlier one. A collective.

        Raises:
            DivergedError: Going back would not help, or there is nothing to go back to.
        """
        step, recovery = self.state.step, self._recovery
        commit_due = self._owes_commit or self._is_due(self.config.checkpoint.interval_steps)
        decision = recovery.judge(self.state, result, self._batches, commit_due=commit_due)
        if decision.action == "go on":
            if decision.reason:
                logger.warning("step %d: %s", step, decision.reason)
            return False
        arguments = (decision, self.state, result, self._batches)
        if decision.action == "stop":
            raise recovery.give_up(*arguments)
        with self._clock.paused():
            restored = recovery.go_back(*arguments)
            self._prefetcher.close()
            self._batches = restored.batches
            self.state = restored.state
            self._interval.load_state(restored.saved["interval_sums"])
            self._last_commit = self.state.step
            self._rewind_output()
            self._prefetcher = self._read_ahead()
        logger.warning(
            "step %d: %s; back to the commit of step %d, %s",
            *(step, decision.reason, self.state.step),
            "without the data since then" if decision.leaves_out_data else "to take it again",
        )
        return True

    def _rewind_output(self) -> None:
        """Drop the rows that the run will write again."""
        services, step = self._services, self.state.step
        if services.metrics is not None and services.progress is not None:
            services.metrics.close()
            services.folder.cut_metrics(step, owes_evaluation=self.state.owes_evaluation)
            services.metrics.reopen(step + 1)
            services.progress.advance(step)
