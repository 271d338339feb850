"""Divergence on real engines: streaks of refused steps, roll-backs, spikes, and the end."""

import dataclasses
import shutil

import pytest
import torch

from data_prep.errors import DivergedError
from pipeline import faults
from pipeline.engine_reload import reload_state
from pipeline.rank_files import StateReader
from pipeline.skip_list import SkipList
from pipeline.train_state import TrainState
from tests.running import Run


def poison(run, network):
    return run.rig.module(network).register_forward_hook(
        lambda _module, _arguments, output: output._replace(loss_sum=output.loss_sum * float("nan"))
    )


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_a_streak_without_a_commit_ends_the_run(world, tmp_path, stage, network):
    run = Run(world, tmp_path, stage=stage, schedule={"max_consecutive_skipped_steps": 5})
    poison(run, network)
    with pytest.raises(DivergedError) as caught:
        run.fit()
    assert caught.value.exit_code == 87
    message = str(caught.value)
    assert "step 5: 5 steps in a row had a non-finite gradient" in message
    assert "there is no commit to go back to" in message
    assert "learning_rate" in message
    assert str(tmp_path / "divergence-step-00000005.json") in message
    state = run.trainer.state
    assert (state.step, state.consecutive_skipped) == (5, 5)
    assert state.skipped == {"generator": 0, "discriminator": 0, network: 5}
    assert run.commits == [], "a streak is no place to go back to"
    assert [row["step"] for row in run.rows()] == [2, 3, 4], "everything before it is on disk"
    assert run.rows()[0][f"optim/{network}_skipped_steps"] == 2


@pytest.fixture
def hurt():
    """Injures the run that follows."""
    yield lambda text: faults.configure(text, 0)
    faults.configure("", 0)


def samples_of(run, first_step, end_step, skip_list=None):
    """Samples of consecutive steps, by default as the run takes them in the end."""
    batches = run.trainer._batches
    if skip_list is not None:
        batches = dataclasses.replace(batches, skip_list=skip_list)
    steps = (batches.samples_at(step, 0)[1].tolist() for step in range(first_step, end_step))
    return [sample for step in steps for sample in step]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_streak_goes_back_and_leaves_its_data_out(world, tmp_path, hurt, stage):
    """Three steps of NaN behind the commit of step 4: other data, and the run ends well."""
    sections = {"schedule": {"max_consecutive_skipped_steps": 3, "max_steps": 9}}
    run = Run(world, tmp_path, stage=stage, **sections)
    hurt("step.generator_loss:0:5-7:nan::6")  # two micro steps each
    assert run.fit() == "done"
    (roll_back,) = run.log.roll_backs
    assert (roll_back.at_step, roll_back.commit_step) == (8, 4)
    assert "3 steps in a row had a non-finite gradient" in roll_back.reason
    assert run.commits == [4, 8, 9]
    left_out = samples_of(run, 4, 8, SkipList())
    assert samples_of(run, 0, 4) == samples_of(run, 0, 4, SkipList())
    assert not set(left_out) & set(samples_of(run, 4, 9))
    assert samples_of(run, 4, 6) == samples_of(run, 8, 10, SkipList()), "the data goes on behind"
    assert [row["step"] for row in run.rows()] == [2, 3, 4, 6, 6, 8, 9, 9]
    assert run.trainer.state.skipped == {"generator": 0, "discriminator": 0}
    assert (tmp_path / "divergence-step-00000008.json").is_file()

    # A new process that goes on from the same commit, with the same list, ends with the same bits.
    again = Run(world, tmp_path, stage=stage, **sections)
    commit = again.trainer._services.checkpoints.newest_valid()
    assert commit.step == 9
    for step in (8, 9):
        shutil.rmtree(run.folder.checkpoints / f"step-{step:08d}")
    saved = run.saved(4)
    for name, engine in again.rig.engines.by_name.items():
        reader = StateReader(run.folder.checkpoints / "step-00000004" / name)
        reload_state(engine, 0, reader, saved["networks"][name])
    again.trainer.state = TrainState(**saved["state"])
    assert again.fit() == "done"
    for name in ("generator", "discriminator"):
        for key, weight in again.rig.weights(name).items():
            assert torch.equal(weight, run.rig.weights(name)[key]), key


def test_going_back_has_an_end(world, tmp_path, hurt):
    run = Run(
        world,
        tmp_path,
        schedule={"max_consecutive_skipped_steps": 3, "max_steps": 60},
        checkpoint={"interval_steps": 1},
    )
    hurt("step.discriminator_loss:0:5-60:inf")
    with pytest.raises(DivergedError) as caught:
        run.fit()
    assert [(each.at_step, each.commit_step) for each in run.log.roll_backs] == [(8, 5), (8, 5)]
    assert "after 2 roll-backs to about here (safety.max_rollbacks is 2)" in str(caught.value)
    assert "the newest commit is step 5" in str(caught.value)
    windows = [each.windows[0] for each in run.log.roll_backs]
    assert windows[0].end_position == windows[1].first_position


@pytest.mark.parametrize("policy", ["log", "rollback"])
def test_a_spike(world, tmp_path, hurt, caplog, policy):
    run = Run(
        world,
        tmp_path,
        schedule={"max_steps": 26},
        checkpoint={"interval_steps": 10},
        safety={"spike_policy": policy, "spike_window_steps": 16},
    )
    hurt("step.generator_loss:0:22:scale:100:2")
    assert run.fit() == "done"
    assert "train/mlm_loss" in caplog.text
    assert "is a spike" in caplog.text
    assert [each.at_step for each in run.log.roll_backs] == [23] * (policy == "rollback")
    assert run.commits == [10, 20, 26][-3:]
    assert run.saved(20)["recovery"]["spikes"]["windows"]["train/mlm_loss"]


def test_refused_steps_are_not_in_a_row(world, tmp_path, hurt):
    hurt("step.generator_loss:0:0:nan")
    run = Run(world, tmp_path)
    assert run.fit() == "done"
    assert run.rows()[0]["train/mlm_loss"] > 0, "the loss of the good step"
    assert run.rows()[0]["optim/generator_skipped_steps"] == 1
