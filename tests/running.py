"""A trainer with real engines and services in the test's own process.

A process can start one world only: take it from the fixture `world`.
"""

import json
import signal
from pathlib import Path

import numpy as np

from data_prep.errors import CorruptError
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import Commit, list_commits
from pipeline.config import RunConfig
from pipeline.data import train_batches
from pipeline.metrics import IntervalSums
from pipeline.metrics_writer import MetricsWriter
from pipeline.progress import ProgressDisplay
from pipeline.recovery import Recovery
from pipeline.resources import CommitNeeds, ResourceWatch
from pipeline.run_folder import RunFolder
from pipeline.sample_order import NOTHING_SKIPPED
from pipeline.skip_list import RollBackLog
from pipeline.stop_signal import StopSignal
from pipeline.stragglers import Stragglers
from pipeline.train_state import Services, TrainState
from pipeline.trainer import Trainer
from pipeline.training_step import StepHooks
from pipeline.watchdog import Watchdog
from tests.engines import LENGTH, rig, sequence_batch

NETWORK = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "position_buckets": 8,
}


class Stream:
    """The test's own sequences by their numbers, in place of a dataset's."""

    sequence_length, num_sequences = LENGTH, 400

    def source_weights(self):
        return {}

    def __init__(self, plan, damaged_step):
        self._plan = plan
        self._damaged_step = damaged_step
        self.steps_read = 0

    def batch(self, samples, epochs):
        if self._damaged_step == self.steps_read // 2:
            raise CorruptError("shard-00000.tokens.npy: block 0")
        self.steps_read += 1
        return sequence_batch(samples.tolist())

    def micro_batches(self, samples, epochs, size):
        parts = len(samples) // size
        pairs = zip(np.split(samples, parts), np.split(epochs, parts), strict=True)
        return [self.batch(*each) for each in pairs]

    def announce(self, samples):
        return True

    def stop_announced(self):
        pass

    def token_range(self, sample):
        return sample * LENGTH, (sample + 1) * LENGTH


def batches_of(config, plan, damaged_step=None, skip_list=NOTHING_SKIPPED):
    """All of the test's sequences as a function of the step."""
    streams = {LENGTH: Stream(plan, damaged_step)}
    return train_batches(config, plan, streams, 0, skip_list=skip_list)


class Run:
    """A trainer with real services; `evaluate` is the test's."""

    def __init__(self, world, path, *, stage=1, state=None, damaged_step=None, **sections):
        self.stop = StopSignal(None)
        self.rig = rig(world, stage=stage, hooks=StepHooks(self.stop.agreed, self._mark))
        self.folder = RunFolder(Path(path))
        self.folder.acquire()
        self.when_marked = lambda phase, step: None
        self.evaluated_at = []
        self.answer = lambda: {"eval/mlm_loss": float(self.trainer.state.step)}
        config = RunConfig.model_validate(
            {
                "data": {"sequence_length": LENGTH},
                "model": {"vocab_size": 61},
                "generator": NETWORK,
                "discriminator": NETWORK,
                "optimizer": {
                    "generator_learning_rate": 1e-3,
                    "discriminator_learning_rate": 2e-3,
                },
                "schedule": {"max_steps": 6, "warmup_steps": 2, **sections.pop("schedule", {})},
                "checkpoint": {"interval_steps": 4, **sections.pop("checkpoint", {})},
                "safety": sections.pop("safety", {}),
                "evaluation": {"interval_steps": 3},
                "logging": {"interval_steps": 2},
            }
        )
        assert not sections
        services = Services(
            control_group=None,
            checkpoints=CheckpointStore(
                self.folder.checkpoints,
                config.checkpoint,
                0,
                None,
                on_published=lambda step: self.folder.write_status("running", step),
            ),
            stop=self.stop,
            evaluate=self._evaluate,
            folder=self.folder,
            watchdog=Watchdog(self.folder.path, world, config.safety),
            stragglers=Stragglers(config.safety, world, None),
            resources=ResourceWatch(
                config.safety, world, self.folder.path, lambda: CommitNeeds(0, 0, 0)
            ),
            metrics=MetricsWriter(self.folder.metrics, self.folder.path / "tensorboard", 1),
            progress=ProgressDisplay(0, config.schedule.max_steps),
        )
        self.log = RollBackLog.open(self.folder.path, "", is_main=True, group=None)
        self.trainer = Trainer(
            config,
            self.rig.engines,
            self.rig.step,
            {LENGTH: self.rig.keys},
            batches_of(config, self.rig.plan, damaged_step, self.log.skip_list),
            services,
            Recovery(config, self.rig.engines, services, world, self.log),
            world=world,
            state=state or TrainState(),
            interval=IntervalSums(),
            identity={"world_size": 1},
            config_json="{}\n",
        )

    def _mark(self, phase, step):
        self.when_marked(phase, step)

    def _evaluate(self, should_stop):
        self.asked = should_stop()
        self.evaluated_at.append(self.trainer.state.step)
        return self.answer()

    def fit(self):
        try:
            return self.trainer.fit()
        finally:
            self.trainer.close()
            self.folder.release()

    def ask_to_stop(self):
        self.stop._handle(signal.SIGTERM, None)

    @property
    def commits(self):
        return [commit.step for commit in list_commits(self.folder.checkpoints)]

    def rows(self):
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]

    def saved(self, step):
        name = f"step-{step:08d}"
        return Commit(self.folder.checkpoints / name, step).read_json("train_state.json")
