"""What a start opens around the training loop: commits, rows, progress, held-out figures."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline.checkpoint import CheckpointStore
from pipeline.commit_writer import room_for
from pipeline.config import RunConfig
from pipeline.ds_config import BatchPlan
from pipeline.engine import Engines
from pipeline.engine_state import MOMENTS, state_bytes
from pipeline.evaluate.heldout import evaluate_heldout
from pipeline.evaluate.minimal_pairs import (
    MinimalPair,
    MinimalPairs,
    evaluate_minimal_pairs,
    within_budget,
)
from pipeline.flops import TRAINING_FORWARDS
from pipeline.metrics_writer import MetricsWriter
from pipeline.mixture_sources import heldout_samples
from pipeline.progress import ProgressDisplay
from pipeline.resources import CommitNeeds, ResourceWatch
from pipeline.run_data import RunData
from pipeline.runtime import ranks_on_this_host
from pipeline.session import Session
from pipeline.stragglers import Stragglers
from pipeline.train_state import Services, TrainState
from pipeline.training_step import TrainingStep

_FP32_BYTES = 4
_FILES_OF_NO_RANK = 16
"""Folders, manifest, seal, configuration and state, and their `.partial` names."""

logger = logging.getLogger(__name__)


def checkpoint_store(session: Session) -> CheckpointStore:
    """Open the run's commits.

    Args:
        session: This start.

    Returns:
        The store; what it writes and reads are signs of progress, a new commit is told in
        state.json.
    """
    folder = session.folder

    def publish(step: int) -> None:
        try:
            folder.write_status("running", step)
        except OSError as error:  # the commit is what counts; the next one tries again
            logger.warning("state.json still tells of an earlier step: %s", error)

    return CheckpointStore(
        folder.checkpoints,
        session.config.checkpoint,
        session.world.rank,
        session.control_group,
        writer_group=session.writer_group,
        on_published=publish,
        on_progress=lambda: session.watchdog.mark("files", session.watchdog.step),
    )


def commit_needs(session: Session, engines: Engines) -> CommitNeeds:
    """Count what the next commit takes.

    Args:
        session: This start.
        engines: The networks, behind their first step.

    Returns:
        The whole commit on disk; in memory the copies of all ranks of this host.
    """
    world, networks = session.world, engines.by_name.values()
    numbers = sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for engine in networks
        for parameter in engine.module.parameters()
    )
    whole = numbers * (1 + len(MOMENTS)) * _FP32_BYTES
    shares = [state_bytes(engine, world.rank) for engine in networks]
    # One network's copy at a time where training waits for the files.
    own = sum(shares) if session.config.checkpoint.asynchronous else max(shares)
    others = (ranks_on_this_host(world) - 1) * min(own, whole // world.world_size)
    num_files = world.world_size * len(shares) + _FILES_OF_NO_RANK
    return CommitNeeds(room_for(whole), own + others, num_files)


def open_services(
    session: Session,
    store: CheckpointStore,
    engines: Engines,
    state: TrainState,
    evaluate: Callable[[Callable[[], bool]], dict[str, float] | None],
    health: Callable[[int], str],
) -> Services:
    """Open what the loop calls besides the step.

    Args:
        session: This start.
        store: The run's commits.
        engines: The networks.
        state: Where the loop begins; rows behind it are dropped.
        evaluate: Held-out figures, see `Services`.
        health: Says behind the row of a step how the run stands beside others.

    Returns:
        The services; a collective.
    """
    config, world, folder = session.config, session.world, session.folder
    metrics = progress = None
    if world.is_main:
        folder.cut_metrics(state.step, owes_evaluation=state.owes_evaluation)
        tensorboard: Path = folder.path / "tensorboard"
        metrics = MetricsWriter(folder.metrics, tensorboard, purge_step=state.step + 1)
        progress = ProgressDisplay(state.step, config.schedule.max_steps, health)
    return Services(
        control_group=session.control_group,
        checkpoints=store,
        stop=session.stop,
        evaluate=evaluate,
        folder=folder,
        watchdog=session.watchdog,
        stragglers=Stragglers(config.safety, world, session.control_group),
        resources=ResourceWatch(
            config.safety, world, folder.path, partial(commit_needs, session, engines)
        ),
        metrics=metrics,
        progress=progress,
    )


def evaluate(
    session: Session,
    data: RunData,
    engines: Engines,
    step: TrainingStep,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Evaluate the engines' networks on the held-out split and on pairs of sentences; a collective.

    Args:
        session: This start.
        data: What the run reads.
        engines: The networks.
        step: How they predict.
        should_stop: Asked before every batch, with the same answer on all ranks.

    Returns:
        The `eval/*` figures; none where there is nothing to evaluate on, None where a stop came
        between.
    """
    engines.train(False)
    try:
        heldout = _evaluate_heldout(session, data, step, should_stop)
        probe = None if heldout is None else _probe(session, data, step, should_stop)
        return None if heldout is None or probe is None else {**heldout, **probe}
    finally:
        engines.train(True)


def _evaluate_heldout(
    session: Session, data: RunData, step: TrainingStep, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    if data.heldout.num_sequences == 0:
        return {}
    return evaluate_heldout(
        step.predict,
        stream=data.heldout,
        keys=data.heldout_keys,
        chosen=heldout_samples(
            data.heldout, session.config.data, session.config.evaluation.max_sequences
        ),
        batch_size=session.plan.train_micro_batch_size_per_gpu,
        world=session.world,
        should_stop=should_stop,
    )


def _probe(
    session: Session, data: RunData, step: TrainingStep, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Score as many minimal pairs as their share of the operations allows."""
    if data.minimal_pairs is None:
        return {}
    pairs = probe_pairs(session.config, session.plan, data.minimal_pairs)
    if not pairs:
        return {}
    length = session.config.data.sequence_length
    return evaluate_minimal_pairs(
        step.predict,
        pairs,
        mask_id=data.minimal_pairs.mask_id,
        draw=data.heldout_keys.draw,
        max_forward_tokens=session.plan.train_micro_batch_size_per_gpu * length,
        world=session.world,
        should_stop=should_stop,
    )


def probe_pairs(config: RunConfig, plan: BatchPlan, pairs: MinimalPairs) -> tuple[MinimalPair, ...]:
    """Choose the minimal pairs that a run is probed with.

    Args:
        config: Its evaluation, and how much is trained between two of them.
        plan: Its batch.
        pairs: All pairs.

    Returns:
        Those whose forward passes take at most evaluation.minimal_pairs_compute_fraction of the
        operations of training; the same at every evaluation.
    """
    evaluation = config.evaluation
    steps = min(evaluation.interval_steps or config.schedule.max_steps, config.schedule.max_steps)
    trained_tokens = steps * plan.train_batch_size * config.data.sequence_length
    # A token of training is three forward passes (`pipeline.flops`); short sentences cost less.
    budget = TRAINING_FORWARDS * trained_tokens * evaluation.minimal_pairs_compute_fraction
    return within_budget(pairs, budget)
