"""Going back to commits: a damaged one, a kill in between, and ranks that differ.

`tests/unit/pipeline/test_recovery.py` has streaks and spikes, with the trainer.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pipeline import faults, recovery
from pipeline.checkpoint import CheckpointStore
from pipeline.config import CheckpointSection
from pipeline.data import TrainBatches
from pipeline.engine_state import local_slices, scalar_state
from pipeline.phases import Phase, TrainSchedule
from pipeline.recovery import Recovery
from pipeline.replicas import ReplicaFinding
from pipeline.run_folder import RunFolder
from pipeline.sample_order import SampleOrder, SkippedWindow
from pipeline.sequences import SequenceStream
from pipeline.skip_list import RollBackLog
from pipeline.train_state import TrainState
from tests.engines import LENGTH, rig, small_config

NAN_FROM_STEP_2 = "step.generator_loss:*:2-99:nan;step.discriminator_loss:*:2-99:nan"


class Split:
    """So many tokens, which nobody reads."""

    def split_tokens(self, _split):
        return 1000


def data():
    """Eight samples a step, as the rig's batches."""
    stream = SequenceStream(Split(), "train", LENGTH)
    order = SampleOrder(stream.num_sequences, 3, LENGTH, 4, 4)
    schedule = TrainSchedule((Phase(0, 100, LENGTH, 8),))
    return TrainBatches({LENGTH: stream}, {LENGTH: order}, schedule, 4, 1, 0)


class Run:
    """What the trainer does around a recovery, in a few lines."""

    def __init__(self, world, folder, remembered="", **keys):
        document = small_config().model_dump()
        document["safety"] |= keys
        document["schedule"]["max_consecutive_skipped_steps"] = 2
        config = type(small_config()).model_validate(document)
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.folder = folder
        self.rig = rig(world, stage=1)
        self.log = RollBackLog.open(folder, remembered, is_main=True, group=None)
        self.store = CheckpointStore(folder / "checkpoints", CheckpointSection(), 0, None)
        self.batches, self.state = replace(data(), skip_list=self.log.skip_list), TrainState()
        services = SimpleNamespace(
            checkpoints=self.store, control_group=None, folder=RunFolder(folder)
        )
        self.recovery = Recovery(config, self.rig.engines, services, world, self.log)

    def step(self):
        """Train a step and judge it."""
        self.result = self.rig.run(self.state.step)
        self.state.count(self.result.outcomes)
        return self.recovery.judge(self.state, self.result, self.batches)

    def commit(self):
        engines = self.rig.engines.by_name
        train_state = {
            "state": dict(vars(self.state)),
            "networks": {name: scalar_state(engine) for name, engine in engines.items()},
            "recovery": self.recovery.remember(),
        }
        self.store.save(self.state.step, engines, train_state, "{}")

    def undo(self, decision):
        assert decision.action == "roll back"
        restored = self.recovery.go_back(decision, self.state, self.result, self.batches)
        self.state, self.batches = restored.state, restored.batches
        assert restored.saved["state"]["step"] == restored.commit.step == self.state.step

    def bits(self):
        return [
            values.clone()
            for engine in self.rig.engines.by_name.values()
            for part in local_slices(engine, 0)
            for values in part.tensors.values()
        ]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def poisoned():
    faults.configure(NAN_FROM_STEP_2, rank=0)
    yield
    faults.configure("", rank=0)


def test_a_roll_back_goes_on_as_one_that_was_killed_in_the_middle(world, tmp_path):
    """The line is written first: a process that starts then has the same state and data."""
    run = Run(world, tmp_path)
    run.step()
    run.commit()
    faults.configure(NAN_FROM_STEP_2.replace("2-99", "1-2"), rank=0)
    try:
        run.step()
        run.undo(run.step())
    finally:
        faults.configure("", rank=0)
    again = Run(world, tmp_path, remembered="")
    assert again.batches.skip_list == run.batches.skip_list
    assert again.log.roll_backs == run.log.roll_backs
    run.step()
    run.commit()
    newest = run.store.newest_valid().read_json("train_state.json")["recovery"]
    assert newest["roll_back"] == run.log.newest_sha256
    assert Run(world, tmp_path, newest["roll_back"]).log.roll_backs == run.log.roll_backs


def test_a_damaged_commit_is_passed_over_and_more_data_left_out(world, tmp_path, poisoned):
    run = Run(world, tmp_path)
    run.step()
    run.commit()
    first = run.bits()
    run.step()
    run.commit()
    file = tmp_path / "checkpoints" / "step-00000002" / "generator" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    run.step()
    run.undo(run.step())
    assert run.state.step == 1
    assert equal(run.bits(), first)
    assert run.batches.skip_list.windows == (SkippedWindow(LENGTH, 8, 32),)
    assert run.log.roll_backs[0].commit_step == 1


def test_ranks_that_differ_take_the_same_data_again(world, tmp_path, monkeypatch):
    """What ranks really hold is compared in `tests/distributed/test_reload_in_place.py`."""
    run = Run(world, tmp_path, replica_interval_steps=3)
    seen = []

    def differing_ranks(engines, step, _group):
        assert engines is run.rig.engines
        seen.append(step)
        return [ReplicaFinding("generator", ("w",), (2,), 4)] if step == 6 else []

    monkeypatch.setattr(recovery, "differing_ranks", differing_ranks)
    for _ in range(4):
        run.step()
    assert seen == [3]
    run.commit()
    committed = run.bits()
    run.step()
    decision = run.step()
    assert decision.action == "roll back"
    assert decision.reason.startswith("rank 2 of 4 differs from the majority")
    run.undo(decision)
    assert run.state.step == 4
    assert equal(run.bits(), committed)
    assert run.batches.skip_list.windows == ()
    assert len(run.log.roll_backs) == 1
    never = Run(world, tmp_path, replica_interval_steps=0)
    never.step()
    assert seen == [3, 6]
