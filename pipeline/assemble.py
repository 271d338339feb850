"""From a checked configuration to a trainer that is ready to run, new or resumed.

    1. dataset     opened, and compared with the model
    2. commit      the newest valid one, if there is any; its configuration and data compared
    3. networks    the commit's weights, those of `initialize.path`, or the seed's
    4. engines     DeepSpeed around both; then Adam's state from the commit
    5. trainer     with its services

A commit fits any world size and ZeRO stage (`pipeline.engine_state`). Between these stages the
ranks agree on whether somebody asked to stop: start-up can take minutes, and has nothing to lose.
"""

import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from data_prep.errors import CorruptError, UserError
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit
from pipeline.config_loading import resolved_config_dict
from pipeline.data import train_batches
from pipeline.engine import Engines, start_engines
from pipeline.engine_state import StateReader, restore_state
from pipeline.initialize.pair import initialize_pair
from pipeline.metrics import IntervalSums
from pipeline.modeling.pair import NetworkPair
from pipeline.phases import TrainSchedule
from pipeline.recovery import Recovery, without_streak
from pipeline.reference_curves import HealthCheck, find_reference
from pipeline.resume import (
    Comparison,
    compare_with_commit,
    record_accepted,
    restored_state,
)
from pipeline.run_data import RunData, open_run_data, summarize_dataset
from pipeline.run_folder import to_json, write_durably
from pipeline.run_services import checkpoint_store, evaluate, open_services
from pipeline.runtime import on_all_ranks
from pipeline.session import Session
from pipeline.skip_list import RollBackLog
from pipeline.step import build_step
from pipeline.train_state import TrainState
from pipeline.trainer import Trainer
from pipeline.training_step import StepHooks
from pipeline.weights import load_commit_pair, new_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembled:
    """A trainer and what its banner says."""

    trainer: Trainer
    engines: Engines
    data: RunData
    schedule: TrainSchedule
    resumed_from: Commit | None
    comparison: Comparison
    notes: list[str]


@dataclass(frozen=True)
class _Past:
    """What the run has done before this start."""

    commit: Commit | None
    """Which it goes on from; None for a new run."""
    saved: dict[str, Any]
    """The commit's train_state.json."""
    roll_backs: RollBackLog

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.commit.step if self.commit else 0

    @property
    def memory(self) -> dict[str, Any]:
        """What the commit remembers of divergence."""
        return self.saved.get("recovery", {})


def assemble(session: Session) -> Assembled:
    """Build or resume a run; a collective.

    Args:
        session: This start.

    Returns:
        The trainer, ready for `fit`.

    Raises:
        UserError: Data or configuration do not fit the model or the commit.
        CorruptError: The dataset is damaged, or no commit is whole.
        StopRequested: Somebody asked to stop before anything was trained.
    """
    config, world, group = session.config, session.world, session.control_group
    session.begin("start.data")
    data = on_all_ranks(group, lambda: open_run_data(config))
    reference = on_all_ranks(group, lambda: find_reference(config, session.plan.train_batch_size))
    content = summarize_dataset(data.dataset.manifest)["train"]["content"]
    health = HealthCheck(reference, session.folder.metrics, content)
    store = checkpoint_store(session)
    past = _past(session, store)
    identity = session.identity(data)
    comparison = on_all_ranks(group, lambda: _compare(session, past, identity))
    skip_list = past.roll_backs.skip_list
    batches = train_batches(config, session.plan, data.train, world.rank, past.step, skip_list)
    pair, starting_notes = _starting_networks(session, past.commit, data)
    session.begin("start.engines")
    engines = start_engines(
        pair.trained_modules(),
        optimizer=config.optimizer,
        ds=session.ds,
        plan=session.plan,
        world=world,
    )
    state, interval = _restore(session, past, engines, identity)
    step = build_step(
        engines,
        pair,
        config.objective,
        seed=config.run.seed,
        plan=session.plan,
        world=world,
        hooks=StepHooks(session.stop.agreed, session.watchdog.mark),
    )
    measure = partial(evaluate, session, data, engines, step)
    services = open_services(session, store, engines, state, measure, health)
    recovery = Recovery(config, engines, services, world, past.roll_backs)
    recovery.load(past.memory)
    resolved = resolved_config_dict(config, session.ds, session.plan)
    trainer = Trainer(
        config,
        engines,
        step,
        data.train_keys,
        batches,
        services,
        recovery,
        world=world,
        state=state,
        interval=interval,
        identity=identity,
        config_json=json.dumps(resolved, indent=2) + "\n",
    )
    notes = comparison.notes + starting_notes
    record = partial(_record_start, session, resolved, identity, state.step, notes, comparison)
    on_all_ranks(group, record)
    return Assembled(trainer, engines, data, batches.schedule, past.commit, comparison, notes)


def _past(session: Session, store: CheckpointStore) -> _Past:
    """Find out how far the run is, and what it has left out."""
    commit = _commit_to_continue(session, store)
    saved = commit.read_json("train_state.json") if commit else {}
    roll_backs = RollBackLog.open(
        session.folder.path,
        saved.get("recovery", {}).get("roll_back", ""),
        is_main=session.world.is_main,
        group=session.control_group,
    )
    return _Past(commit, saved, roll_backs)


def _compare(session: Session, past: _Past, identity: dict[str, Any]) -> Comparison:
    """Compare this start with what it goes on from; notes in `identity` what was accepted."""
    if past.commit is None:
        return Comparison()
    comparison = compare_with_commit(
        past.commit,
        session.config,
        session.ds,
        before=past.saved["identity"],
        now=identity,
        accepts=session.accepts,
    )
    identity["accepted"] = [asdict(each) for each in comparison.accepted_so_far]
    return comparison


def _restore(
    session: Session, past: _Past, engines: Engines, identity: dict[str, Any]
) -> tuple[TrainState, IntervalSums]:
    """Put optimizer state, counters and sums back; the first values for a new run."""
    interval = IntervalSums()
    if past.commit is None:
        # A model that is continued is measured before its first step: the guard compares with it.
        return TrainState(owes_evaluation=bool(session.config.initialize.path)), interval
    for name, engine in engines.by_name.items():
        reader = StateReader(past.commit.path / name)
        restore_state(engine, session.world.rank, reader, past.saved["networks"][name])
    interval.load_state(past.saved["interval_sums"])
    state = restored_state(past.commit, past.saved, identity)
    return without_streak(state, past.roll_backs), interval


def _commit_to_continue(session: Session, store: CheckpointStore) -> Commit | None:
    """Find the commit that this start goes on from; None for a new run."""
    commit = store.newest_valid()
    if commit is None and (lost_step := session.folder.committed_step()):
        raise CorruptError(
            f"{session.folder.path}: state.json says that step {lost_step} was committed, but "
            "there is no commit in checkpoints/: restore one from a copy, or start again in "
            "another run.folder"
        )
    return commit


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


def _record_start(
    session: Session,
    resolved: dict[str, Any],
    identity: dict[str, Any],
    step: int,
    notes: list[str],
    comparison: Comparison,
) -> None:
    """Write the files that describe this start."""
    folder = session.folder
    if not session.world.is_main:
        return
    try:
        # First of all: what follows makes the accepted configuration the run's own.
        record_accepted(folder.path / "restarts.jsonl", comparison.accepted)
        write_durably(folder.path / "config.resolved.json", to_json(resolved))
        write_durably(folder.path / "environment.json", to_json(identity["environment"]))
        folder.note_restart(step, session.world.world_size, notes)
        folder.write_status("running", step)
    except OSError as error:
        raise UserError(
            f"run.folder {folder.path}: cannot be written ({error}); make room or repair the disk, "
            "then the same command goes on"
        ) from error
