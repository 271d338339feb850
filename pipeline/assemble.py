"""From a checked configuration to a trainer that is ready to run, new or resumed.

    1. dataset     opened, and compared with the model
    2. commit      the newest valid one, if there is any; its configuration and data compared
    3. networks    the commit's weights, those of `initialize.path`, or the seed's
    4. engines     DeepSpeed around both; then Adam's state from the commit
    5. trainer     with its services

A commit fits any world size and ZeRO stage (`pipeline.engine_state`).
"""

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.errors import CorruptError, UserError
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config, resolved_config_dict
from pipeline.data import TrainBatches, train_batches
from pipeline.ds_config import BatchPlan, DeepSpeedConfig, load_deepspeed_config
from pipeline.engine import Engines, start_engines
from pipeline.engine_state import StateReader, restore_state
from pipeline.evaluate.heldout import evaluate_heldout
from pipeline.initialize.pair import initialize_pair
from pipeline.metrics import IntervalSums, MetricsWriter
from pipeline.modeling.pair import NetworkPair
from pipeline.phases import TrainSchedule
from pipeline.progress import ProgressDisplay
from pipeline.resume_rules import changed_deepspeed_keys, changed_keys, refuse_changes
from pipeline.run_data import RunData, open_run_data
from pipeline.run_folder import RunFolder, to_json, write_durably
from pipeline.runtime import StopSignal, World, environment, on_all_ranks
from pipeline.step import TrainingStep, build_step
from pipeline.trainer import Services, Trainer, TrainState
from pipeline.weights import load_commit_pair, new_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One start of a run."""

    config: RunConfig
    ds: DeepSpeedConfig
    plan: BatchPlan
    world: World
    control_group: dist.ProcessGroup
    folder: RunFolder
    stop: StopSignal

    def identity(self, data: RunData) -> dict[str, Any]:
        """Collect what a resume compares.

        Args:
            data: The open dataset.

        Returns:
            JSON-ready values.
        """
        return {
            "dataset_fingerprint": data.dataset.fingerprint,
            "tokenizer_fingerprint": data.tokenizer.fingerprint,
            "world_size": self.world.world_size,
            "environment": environment(),
        }


@dataclass(frozen=True)
class Assembled:
    """A trainer and what its banner says."""

    trainer: Trainer
    engines: Engines
    data: RunData
    schedule: TrainSchedule
    resumed_from: Commit | None
    notes: list[str]


def assemble(session: Session) -> Assembled:
    """Build or resume a run; a collective.

    Args:
        session: This start.

    Returns:
        The trainer, ready for `fit`.

    Raises:
        UserError: Data or configuration do not fit the model or the commit.
        CorruptError: The dataset is damaged, or no commit is whole.
    """
    config, world = session.config, session.world
    data = on_all_ranks(session.control_group, lambda: open_run_data(config))
    identity = session.identity(data)
    resolved = resolved_config_dict(config, session.ds, session.plan)
    store = CheckpointStore(
        session.folder.checkpoints, config.checkpoint, world.rank, session.control_group
    )
    commit = store.newest_valid()
    if commit is None and (lost_step := session.folder.committed_step()):
        raise CorruptError(
            f"{session.folder.path}: state.json says that step {lost_step} was committed, but "
            "there is no commit in checkpoints/: restore one from a copy, or start again in "
            "another run.folder"
        )
    saved = commit.read_json("train_state.json") if commit else None
    notes: list[str] = []
    batches = train_batches(
        config, session.plan, data.train, world.rank, commit.step if commit else 0
    )
    if commit and saved:
        notes = compare_with_commit(session, commit, saved["identity"], identity)
    pair, starting_notes = _starting_networks(session, commit, data)
    notes += starting_notes
    engines = start_engines(
        pair.trained_modules(),
        optimizer=config.optimizer,
        ds=session.ds,
        plan=session.plan,
        world=world,
    )
    # A model that is continued is measured before its first step, so that the guard can compare.
    state = TrainState(owes_evaluation=bool(config.initialize.path))
    interval = IntervalSums(world.device)
    if commit and saved:
        for name, engine in engines.by_name.items():
            scalars = saved["networks"][name]
            restore_state(engine, world.rank, StateReader(commit.path / name), scalars)
        state = TrainState(**saved["state"])
        interval.load_state(saved["interval_sums"])
    trainer = _trainer(
        session, data, batches, engines, pair, store, state, interval, identity, resolved
    )
    if world.is_main:
        _record_start(session.folder, resolved, identity, state.step, world, notes)
    return Assembled(trainer, engines, data, batches.schedule, commit, notes)


def _starting_networks(
    session: Session, commit: Commit | None, data: RunData
) -> tuple[NetworkPair, list[str]]:
    """Choose the weights of this start: the commit's, those of another model, or the seed's."""
    config = session.config
    if commit is not None:
        return load_commit_pair(commit, config), []
    if not config.initialize.path:
        return new_pair(config), []
    initialized = on_all_ranks(
        session.control_group, lambda: initialize_pair(config, data.tokenizer)
    )
    notes = list(initialized.notes)
    if data.heldout.num_sequences == 0:
        notes.append(
            "nothing is held out: nobody will notice if training makes this model worse; build "
            "the dataset with `deberta-prep build --heldout-fraction`"
        )
    return initialized.pair, notes


def compare_with_commit(
    session: Session, commit: Commit, before: dict[str, Any], now: dict[str, Any]
) -> list[str]:
    """Refuse to continue another run, and name what keeps a resume from being bit for bit.

    Args:
        session: This start.
        commit: What it would continue.
        before: Identity stored in the commit.
        now: Identity of this start.

    Returns:
        Notes for the banner.

    Raises:
        UserError: Data or configuration belong to another run.
    """
    resolved = str(commit.path / "config.resolved.json")
    changes = changed_keys(load_run_config(resolved), session.config, commit.step)
    changes += changed_deepspeed_keys(load_deepspeed_config(resolved), session.ds)
    notes = refuse_changes(str(session.folder.path), changes)
    for key in ("dataset_fingerprint", "tokenizer_fingerprint"):
        if before[key] != now[key]:
            raise UserError(
                f"data.path {session.config.data.path} is not the data that {commit.path} was "
                f"trained on ({key} {now[key][:12]}, then {before[key][:12]}): give the same "
                "dataset, or start a new run with another run.folder"
            )
    if before["world_size"] != now["world_size"]:
        notes.append(
            f"{now['world_size']} ranks instead of {before['world_size']}: the same samples, masks "
            "and draws; losses agree closely and not bit for bit"
        )
    old, new = before["environment"], now["environment"]
    bound = sorted(set(old) - {"host", "slurm_job_id"})
    return notes + [
        f"{key} was {old[key]} and is now {new.get(key)}: not bit for bit the same from here"
        for key in bound
        if old[key] != new.get(key)
    ]


def _record_start(
    folder: RunFolder,
    resolved: dict[str, Any],
    identity: dict[str, Any],
    step: int,
    world: World,
    notes: list[str],
) -> None:
    """Write the files that describe this start."""
    write_durably(folder.path / "config.resolved.json", to_json(resolved))
    write_durably(folder.path / "environment.json", to_json(identity["environment"]))
    folder.note_restart(step, world.world_size, notes)
    folder.write_status("running", step)


def _trainer(
    session: Session,
    data: RunData,
    batches: TrainBatches,
    engines: Engines,
    pair: NetworkPair,
    store: CheckpointStore,
    state: TrainState,
    interval: IntervalSums,
    identity: dict[str, Any],
    resolved: dict[str, Any],
) -> Trainer:
    """Connect data, step and services."""
    config, world, folder = session.config, session.world, session.folder
    step = build_step(
        engines, pair, config.objective, seed=config.run.seed, plan=session.plan, world=world
    )
    metrics = progress = None
    if world.is_main:
        folder.cut_metrics(state.step, owes_evaluation=state.owes_evaluation)
        tensorboard: Path = folder.path / "tensorboard"
        metrics = MetricsWriter(folder.metrics, tensorboard, purge_step=state.step + 1)
        progress = ProgressDisplay(state.step, config.schedule.max_steps)
    services = Services(
        checkpoints=store,
        stop=session.stop,
        evaluate=partial(_evaluate, session, data, engines, step),
        folder=folder,
        metrics=metrics,
        progress=progress,
    )
    return Trainer(
        config,
        engines,
        step,
        data.train_keys,
        batches,
        services,
        world=world,
        state=state,
        interval=interval,
        identity=identity,
        config_json=json.dumps(resolved, indent=2) + "\n",
    )


def _evaluate(
    session: Session, data: RunData, engines: Engines, step: TrainingStep
) -> dict[str, float] | None:
    """Evaluate the engines' networks on the held-out split; None where a stop came between."""
    if data.heldout.num_sequences == 0:
        return {}
    engines.train(False)
    try:
        return evaluate_heldout(
            step.predict,
            stream=data.heldout,
            keys=data.heldout_keys,
            max_sequences=session.config.evaluation.max_sequences,
            batch_size=session.plan.train_micro_batch_size_per_gpu,
            world=session.world,
            should_stop=session.stop.agreed,
        )
    finally:
        engines.train(True)
