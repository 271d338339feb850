"""From a checked configuration to a trainer that is ready to run, new or resumed.

    1. dataset     opened, and compared with the model
    2. commit      the newest valid one, if there is any; its configuration and data compared
    3. networks    initial weights from the seed, or the commit's
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

import torch
import torch.distributed as dist

from data_prep.errors import CorruptError, UserError
from data_prep.manifest import SPLITS
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config, resolved_config_dict
from pipeline.data import SampleOrder, SequenceStream, TrainBatches
from pipeline.ds_config import BatchPlan, DeepSpeedConfig, load_deepspeed_config
from pipeline.engine import Engines, start_engines
from pipeline.engine_state import StateReader, restore_state
from pipeline.evaluate.heldout import evaluate_heldout
from pipeline.metrics import IntervalSums, MetricsWriter
from pipeline.modeling.networks import Discriminator, Generator, init_weights
from pipeline.progress import ProgressDisplay
from pipeline.resume_rules import changed_deepspeed_keys, changed_keys, refuse_changes
from pipeline.run_folder import RunFolder, to_json, write_durably
from pipeline.runtime import StopSignal, World, environment, on_all_ranks
from pipeline.step import ObjectiveKeys, RTDStep
from pipeline.trainer import Services, Trainer, TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenData:
    """The dataset of a run, checked against its configuration."""

    dataset: Dataset
    tokenizer: Tokenizer
    train: SequenceStream
    heldout: SequenceStream

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        return self.tokenizer.mask_id

    def describe(self) -> str:
        """Sum up the data for the banner.

        Returns:
            Fingerprint, shards, tokens and sequences of both splits.
        """
        train, heldout = self.train, self.heldout
        return (
            f"{len(self.dataset.manifest.shards)} shards, fingerprint "
            f"{self.dataset.fingerprint[:12]}; train {train.num_tokens:,} tokens in "
            f"{train.num_sequences:,} sequences, held out {heldout.num_sequences:,} sequences"
        )


def open_data(config: RunConfig) -> OpenData:
    """Open the dataset and compare it with the model.

    Args:
        config: The run.

    Returns:
        The open data.

    Raises:
        UserError: The vocabulary differs, or there is nothing to train on.
        CorruptError: The dataset is not what was written.
    """
    dataset = Dataset.open(config.data.path)
    vocab_size = dataset.manifest.vocab_size
    if vocab_size != config.model.vocab_size:
        raise UserError(
            f"data.path {config.data.path} was tokenized with a vocabulary of {vocab_size}, "
            f"model.vocab_size is {config.model.vocab_size}: set model.vocab_size={vocab_size}, or "
            "choose a dataset that belongs to this model"
        )
    length = config.data.sequence_length
    train, heldout = (SequenceStream(dataset, split, length) for split in SPLITS)
    if train.num_sequences == 0:
        raise UserError(f"data.path {config.data.path} holds no training tokens: build it again")
    return OpenData(dataset, Tokenizer.load(dataset.tokenizer_folder), train, heldout)


def build_networks(config: RunConfig) -> tuple[Generator, Discriminator]:
    """Build both networks with the initial weights of the run's seed.

    Args:
        config: The run.

    Returns:
        The generator and the discriminator, fp32, on the CPU.
    """
    generator = Generator(config.generator, config.model)
    discriminator = Discriminator(config.discriminator, config.model)
    for number, network in enumerate((generator, discriminator)):
        init_weights(network, config.run.seed + number)
    return generator, discriminator


def load_commit_weights(commit: Commit, config: RunConfig) -> tuple[Generator, Discriminator]:
    """Build both networks with the fp32 weights of a commit.

    Args:
        commit: A verified commit.
        config: The run it belongs to.

    Returns:
        The generator and the discriminator, fp32, on the CPU.

    Raises:
        CorruptError: The commit's parameters are not the model's.
    """
    networks = build_networks(config)
    for name, network in zip(("generator", "discriminator"), networks, strict=True):
        shapes = {key: parameter.shape for key, parameter in network.named_parameters()}
        weights = StateReader(commit.path / name).weights(shapes)
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                parameter.copy_(weights[key])
    return networks


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

    def identity(self, data: OpenData) -> dict[str, Any]:
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
    data: OpenData
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
    data = on_all_ranks(session.control_group, lambda: open_data(config))
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
    if commit and saved:
        notes = compare_with_commit(session, commit, saved["identity"], identity)
    generator, discriminator = (
        load_commit_weights(commit, config) if commit else build_networks(config)
    )
    engines = start_engines(
        generator,
        discriminator,
        optimizer=config.optimizer,
        ds=session.ds,
        plan=session.plan,
        world=world,
    )
    state, interval = TrainState(), IntervalSums(world.device)
    if commit and saved:
        for name, engine in engines.items().items():
            scalars = saved["networks"][name]
            restore_state(engine, world.rank, StateReader(commit.path / name), scalars)
        state = TrainState(**saved["state"])
        interval.load_state(saved["interval_sums"])
    trainer = _trainer(session, data, engines, store, state, interval, identity, resolved)
    if world.is_main:
        _record_start(session.folder, resolved, identity, state.step, world, notes)
    return Assembled(trainer, engines, data, commit, notes)


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
    changes = changed_keys(load_run_config(resolved), session.config)
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
    data: OpenData,
    engines: Engines,
    store: CheckpointStore,
    state: TrainState,
    interval: IntervalSums,
    identity: dict[str, Any],
    resolved: dict[str, Any],
) -> Trainer:
    """Connect data, step and services."""
    config, world, folder = session.config, session.world, session.folder
    length, seed = config.data.sequence_length, config.run.seed
    train_keys = ObjectiveKeys(config.objective, seed, length, data.mask_id, "train")
    batches = TrainBatches(
        data.train,
        SampleOrder(
            data.train.num_sequences,
            seed,
            length,
            config.data.block_sequences,
            config.data.window_blocks,
        ),
        train_batch_size=session.plan.train_batch_size,
        micro_batch_size=session.plan.train_micro_batch_size_per_gpu,
        world_size=world.world_size,
        rank=world.rank,
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
        evaluate=partial(_evaluate, session, data, engines),
        folder=folder,
        metrics=metrics,
        progress=progress,
    )
    return Trainer(
        config,
        engines,
        RTDStep(engines, config.objective, train_keys, seed=seed, plan=session.plan, world=world),
        batches,
        services,
        world=world,
        state=state,
        interval=interval,
        identity=identity,
        config_json=json.dumps(resolved, indent=2) + "\n",
    )


def _evaluate(session: Session, data: OpenData, engines: Engines) -> dict[str, float] | None:
    """Evaluate the engines' networks on the held-out split; None where a stop came between."""
    config = session.config
    if data.heldout.num_sequences == 0:
        return {}
    for engine in engines.items().values():
        engine.eval()
    try:
        return evaluate_heldout(
            engines.generator,
            engines.generator.module.token_embeddings,
            engines.discriminator,
            stream=data.heldout,
            keys=ObjectiveKeys(
                config.objective,
                config.run.seed,
                config.data.sequence_length,
                data.mask_id,
                "heldout",
            ),
            max_sequences=config.evaluation.max_sequences,
            batch_size=session.plan.train_micro_batch_size_per_gpu,
            world=session.world,
            should_stop=session.stop.agreed,
        )
    finally:
        for engine in engines.items().values():
            engine.train()
