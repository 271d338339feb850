"""Judges every step, and puts a run back to its newest commit where it went wrong.

    judge       losses, refused steps and replicas of a step -> go on, roll back, or stop
    go_back     records it, puts every engine back, and leaves out the data between
    give_up     what people need to find the cause, then exit code 87

`pipeline.divergence` decides; the trainer applies. What is remembered is part of every commit, so
that a resumed run judges the same.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

from data_prep.errors import CorruptError, DivergedError
from pipeline.checkpoint import SaveError
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.data import TrainBatches
from pipeline.divergence import (
    Decision,
    DivergedStep,
    DivergencePolicy,
    diverged_error,
    write_dump,
)
from pipeline.engine import Engines
from pipeline.engine_reload import reload_state
from pipeline.metrics import ratios
from pipeline.rank_files import StateReader
from pipeline.replicas import ReplicaFinding, differing_ranks
from pipeline.runtime import World
from pipeline.schedule import learning_rate_factor
from pipeline.skip_list import RollBackLog
from pipeline.spikes import Spike, SpikeDetector
from pipeline.train_state import Services, TrainState
from pipeline.training_step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A run as a commit had it, with the data that it goes on with."""

    commit: Commit
    saved: dict[str, Any]
    """The commit's train_state.json."""
    state: TrainState
    batches: TrainBatches


class Recovery:
    """What a run does about divergence and silent corruption; the same on all ranks."""

    def __init__(
        self,
        config: RunConfig,
        engines: Engines,
        services: Services,
        world: World,
        roll_backs: RollBackLog,
    ) -> None:
        """Connect the parts.

        Args:
            config: The run: limits and policies.
            engines: The networks.
            services: Checkpoints and the control group.
            world: This process's place.
            roll_backs: Those of the run so far.
        """
        self._config = config
        self._engines = engines
        self._services = services
        self._world = world
        self._roll_backs = roll_backs
        self._spikes = SpikeDetector(config.safety)
        self._policy = DivergencePolicy(
            config.safety, config.schedule.max_consecutive_skipped_steps
        )

    def remember(self) -> dict[str, Any]:
        """Give what a commit stores.

        Returns:
            JSON-ready values.
        """
        return {"spikes": self._spikes.state(), "roll_back": self._roll_backs.newest_sha256}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on as a commit remembers.

        Args:
            saved: What `remember` returned; empty for a commit that has none.
        """
        self._spikes.load_state(saved.get("spikes", {}))

    def judge(
        self,
        state: TrainState,
        result: StepResult,
        batches: TrainBatches,
        *,
        commit_due: bool = False,
    ) -> Decision:
        """Judge the step that has just ended; a collective.

        Args:
            state: Already counts the step.
            result: What it did.
            batches: The data.
            commit_due: No commit may hold what only some ranks have: replicas are compared.

        Returns:
            What to do.
        """
        limit = self._config.schedule.max_consecutive_skipped_steps
        spike = self._spike(state, result, batches)
        replicas = self._differing_ranks(state.step, commit_due)
        is_streak = state.consecutive_skipped >= limit
        if spike is None and not replicas and not is_streak:
            return Decision("go on")
        return self._policy.decide(
            consecutive_skipped=state.consecutive_skipped,
            spike=spike,
            replicas=replicas,
            newest_commit=self._newest_commit(),
            roll_backs=self._roll_backs.roll_backs,
        )

    def _spike(self, state: TrainState, result: StepResult, batches: TrainBatches) -> Spike | None:
        """The worst spike of a step that was applied."""
        if state.consecutive_skipped:
            return None
        phase = batches.schedule.phase_at(state.step - 1)
        shape = (phase.sequence_length, phase.train_batch_size)
        return self._spikes.observe(_losses(result), shape)

    def _differing_ranks(self, step: int, commit_due: bool) -> list[ReplicaFinding]:
        interval = self._config.safety.replica_interval_steps
        if not interval or (step % interval and not commit_due):
            return []
        return differing_ranks(self._engines, step, self._services.control_group)

    def _newest_commit(self) -> int | None:
        """Step of the commit to go back to; one that is being written is waited for."""
        try:
            self._services.checkpoints.finish()
        except SaveError as error:
            logger.warning("%s", error)
        return self._services.checkpoints.published_step or None

    def go_back(
        self, decision: Decision, state: TrainState, result: StepResult, batches: TrainBatches
    ) -> Restored:
        """Put the engines back to the newest commit; a collective.

        Args:
            decision: To roll back.
            state: At the step that diverged.
            result: What that step did.
            batches: The data so far.

        Returns:
            What the trainer goes on from.

        Raises:
            CorruptError: No commit is whole.
            UserError: The roll-back cannot be recorded.
        """
        self._dump(decision, state, result, batches)
        commit = self._services.checkpoints.newest_valid()
        if commit is None:
            raise CorruptError(
                f"{self._services.folder.checkpoints}: the commit to go back to from step "
                f"{state.step} is gone; restore one from a copy"
            )
        windows = batches.windows_between(commit.step, state.step)
        self._roll_backs.append(
            state.step,
            commit.step,
            decision.reason,
            windows if decision.leaves_out_data else (),
        )
        saved = commit.read_json("train_state.json")
        for name, engine in self._engines.by_name.items():
            reader = StateReader(commit.path / name)
            reload_state(engine, self._world.rank, reader, saved["networks"][name])
        self.load(saved.get("recovery", {}))
        return Restored(
            commit,
            saved,
            without_streak(TrainState(**saved["state"]), self._roll_backs),
            replace(batches, skip_list=self._roll_backs.skip_list),
        )

    def give_up(
        self, decision: Decision, state: TrainState, result: StepResult, batches: TrainBatches
    ) -> DivergedError:
        """Write what people need to find the cause; a collective.

        Args:
            decision: To stop.
            state: At the step that diverged.
            result: What that step did.
            batches: The data.

        Returns:
            The error to raise.
        """
        dump = self._dump(decision, state, result, batches)
        return diverged_error(decision, state.step, self._newest_commit(), dump)

    def _dump(
        self, decision: Decision, state: TrainState, result: StepResult, batches: TrainBatches
    ) -> str:
        factor = learning_rate_factor(state.step - 1, self._config.schedule)
        optimizer = self._config.optimizer
        diverged = DivergedStep(
            step=state.step,
            bad_steps=max(1, state.consecutive_skipped),
            losses=_losses(result),
            outcomes=result.outcomes,
            learning_rates={
                name: optimizer.learning_rate(name) * factor for name in self._config.networks
            },
        )
        return write_dump(
            self._services.folder.path,
            diverged,
            decision,
            batches,
            self._roll_backs.roll_backs,
            is_main=self._world.is_main,
            group=self._services.control_group,
        )


def without_streak(state: TrainState, roll_backs: RollBackLog) -> TrainState:
    """End the streak of a state that the run has gone back to.

    Args:
        state: As a commit had it; refused steps that it counts are followed by other data now.
        roll_backs: The run's.

    Returns:
        The state itself.
    """
    if any(each.commit_step == state.step for each in roll_backs.roll_backs):
        state.consecutive_skipped = 0
    return state


def _losses(result: StepResult) -> dict[str, float]:
    """Global losses of one step."""
    return {k: v for k, v in ratios(result.sums, "train").items() if k.endswith("_loss")}
