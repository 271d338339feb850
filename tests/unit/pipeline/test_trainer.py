"""The loop's events on real engines: rows, evaluations, commits, stops, skips and failures."""

import json
import signal
from pathlib import Path

import pytest

from data_prep.errors import CorruptError, DivergedError
from pipeline.checkpoint import CheckpointStore, SaveError
from pipeline.commit import Commit, list_commits, verify_commit
from pipeline.config import RunConfig
from pipeline.engine_stepping import StepOutcome
from pipeline.metrics import IntervalSums, MetricsWriter
from pipeline.progress import ProgressDisplay
from pipeline.run_folder import RunFolder
from pipeline.runtime import StopSignal
from pipeline.trainer import Services, Trainer, TrainState
from tests.engines import LENGTH, rig, sequence_batches

NETWORK = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "position_buckets": 8,
}


class Batches:
    """The test's own sequences as a function of the step."""

    def __init__(self, plan, damaged_step=None):
        self._plan = plan
        self._damaged_step = damaged_step

    def at_step(self, step):
        if step == self._damaged_step:
            raise CorruptError("shard-00000.tokens.npy: block 0")
        return sequence_batches(step, self._plan)

    def batch_size_at(self, step):
        return self._plan.train_batch_size

    def tokens_before(self, step):
        return step * self._plan.train_batch_size * LENGTH

    def epochs_at(self, step):
        return step / 10


class Run:
    """A trainer with real services; `evaluate` is the test's."""

    def __init__(self, world, path, *, stage=1, state=None, damaged_step=None, **sections):
        self.rig = rig(world, stage=stage)
        self.folder = RunFolder(Path(path))
        self.folder.acquire()
        self.stop = StopSignal(None)
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
                "evaluation": {"interval_steps": 3},
                "logging": {"interval_steps": 2},
            }
        )
        assert not sections
        self.trainer = Trainer(
            config,
            self.rig.engines,
            self.rig.step,
            {LENGTH: self.rig.keys},
            Batches(self.rig.plan, damaged_step),
            Services(
                checkpoints=CheckpointStore(self.folder.checkpoints, config.checkpoint, 0, None),
                stop=self.stop,
                evaluate=self._evaluate,
                folder=self.folder,
                metrics=MetricsWriter(self.folder.metrics, self.folder.path / "tensorboard", 1),
                progress=ProgressDisplay(0, config.schedule.max_steps),
            ),
            world=world,
            state=state or TrainState(),
            interval=IntervalSums(world.device),
            identity={"world_size": 1},
            config_json="{}\n",
        )

    def _evaluate(self):
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


def test_events_of_an_undisturbed_run(world, tmp_path, capsys):
    run = Run(world, tmp_path)
    assert run.fit() == "done"
    assert run.evaluated_at == [3, 6]
    assert run.commits == [4, 6]
    assert [(row["step"], "eval/mlm_loss" in row) for row in run.rows()] == [
        (2, False),
        (3, True),
        (4, False),
        (6, False),
        (6, True),
    ]
    for commit in list_commits(run.folder.checkpoints):
        verify_commit(commit)
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["status"], state["step"]) == ("running", 6)
    printed = capsys.readouterr().err
    assert "step 2/6  mlm" in printed
    assert "step 6 held-out: mlm 6.0000" in printed


def test_a_row_holds_every_figure(world, tmp_path):
    run = Run(world, tmp_path)
    run.fit()
    row = run.rows()[0]
    assert {name for name in row if not name.startswith("perf/")} == {
        "step",
        "train/mlm_loss",
        "train/mlm_accuracy",
        "train/rtd_loss",
        "train/rtd_accuracy_replaced",
        "train/rtd_accuracy_original",
        "train/replaced_fraction",
        "train/delta_norm",
        "train/epochs",
        "optim/generator_learning_rate",
        "optim/discriminator_learning_rate",
        "optim/generator_grad_norm",
        "optim/discriminator_grad_norm",
        "optim/generator_skipped_steps",
        "optim/discriminator_skipped_steps",
    }
    assert row["train/epochs"] == 0.2
    # The rate of the step that the row ends with: step 1, half of the warm-up.
    assert row["optim/generator_learning_rate"] == 0.5e-3
    assert row["optim/discriminator_learning_rate"] == 1e-3


def test_a_commit_holds_the_interval_that_it_interrupts(world, tmp_path):
    """Rows at 2, 4, 6 and a commit at 5: its sums are those of one step, in hexadecimal."""
    run = Run(world, tmp_path, checkpoint={"interval_steps": 5})
    run.fit()
    tokens = float.fromhex(run.saved(5)["interval_sums"][-1])
    plan = run.rig.plan
    assert tokens == sum(int(b.lengths_B.sum()) for b in sequence_batches(4, plan))
    assert run.saved(5)["state"]["step"] == 5
    assert run.saved(5)["networks"]["generator"] == {"adam_step": 5, "loss_scaler": {}}


@pytest.mark.parametrize("at", [1, 4])
def test_a_stop_commits_the_step_that_it_finds(world, tmp_path, at):
    run = Run(world, tmp_path)
    stop_at(run, at)
    assert run.fit() == "stopped"
    assert run.commits[-1] == at
    assert run.trainer.state.step == at
    assert run.saved(at)["state"]["owes_evaluation"] is False


def stop_at(run, step):
    """A signal in the middle of the step that ends as number `step`."""
    take_step = run.trainer._train_step

    def signalled(completed, *arguments):
        if completed == step - 1:
            run.ask_to_stop()
        return take_step(completed, *arguments)

    run.trainer._train_step = signalled


@pytest.mark.parametrize("when", ["before the evaluation", "during the evaluation"])
@pytest.mark.parametrize("at", [3, 6])
def test_an_evaluation_that_a_stop_prevents_is_made_up_for(world, tmp_path, when, at):
    run = Run(world, tmp_path)
    if when == "before the evaluation":
        stop_at(run, at)
    else:
        answer = run.answer

        def interrupted():
            if run.trainer.state.step != at:
                return answer()
            run.ask_to_stop()
            return None

        run.answer = interrupted
    assert run.fit() == "stopped"
    assert run.commits[-1] == at, "a stop is obeyed at once"
    saved = run.saved(at)["state"]
    assert saved["owes_evaluation"] is True
    rows_before = run.rows()
    assert not any(row["step"] == at and "eval/mlm_loss" in row for row in rows_before)

    again = Run(world, tmp_path, state=TrainState(**saved))
    assert again.fit() == "done"
    assert again.evaluated_at[0] == at
    expected = [3, 6] if at == 3 else [6]
    assert again.evaluated_at == expected
    assert again.rows()[len(rows_before)] == {"step": at, "eval/mlm_loss": float(at)}
    assert again.trainer.state.owes_evaluation is False


def test_a_stop_while_making_up_for_an_evaluation(world, tmp_path):
    run = Run(world, tmp_path, state=TrainState(step=3, owes_evaluation=True))
    run.answer = lambda: None
    assert run.fit() == "stopped"
    assert run.trainer.state == TrainState(step=3, owes_evaluation=True)
    assert run.commits == []


def test_a_run_that_is_done_does_nothing(world, tmp_path):
    run = Run(world, tmp_path, state=TrainState(step=6))
    assert run.fit() == "done"
    assert run.evaluated_at == run.commits == run.rows() == []


def test_without_heldout_sequences_a_run_goes_on(world, tmp_path):
    run = Run(world, tmp_path)
    run.answer = dict
    assert run.fit() == "done"
    assert run.evaluated_at == [3, 6]
    assert [row["step"] for row in run.rows()] == [2, 4, 6]


def poison(run, network):
    return run.rig.module(network).register_forward_hook(
        lambda _module, _arguments, output: output._replace(loss_sum=output.loss_sum * float("nan"))
    )


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_a_streak_of_skipped_steps_ends_the_run(world, tmp_path, stage, network):
    run = Run(world, tmp_path, stage=stage, schedule={"max_consecutive_skipped_steps": 5})
    poison(run, network)
    with pytest.raises(DivergedError) as caught:
        run.fit()
    assert caught.value.exit_code == 87
    message = str(caught.value)
    assert "5 steps in a row had a non-finite gradient, the last one step 5" in message
    assert "the newest commit is step 4" in message
    assert "learning_rate" in message
    state = run.trainer.state
    assert (state.step, state.consecutive_skipped) == (5, 5)
    assert state.skipped == {"generator": 0, "discriminator": 0, network: 5}
    assert [row["step"] for row in run.rows()] == [2, 3, 4], "everything before it is on disk"
    assert run.rows()[0][f"optim/{network}_skipped_steps"] == 2


def test_skips_are_counted_and_a_good_step_ends_the_streak():
    state = TrainState()
    good, bad = StepOutcome(True, 1.0), StepOutcome(False, float("nan"))
    for generator, discriminator in [
        (good, bad),
        (bad, good),
        (bad, bad),
        (good, good),
        (bad, good),
    ]:
        state.count({"generator": generator, "discriminator": discriminator})
    skipped = {"generator": 3, "discriminator": 2}
    assert state == TrainState(step=5, skipped=skipped, consecutive_skipped=1)


def test_damaged_data_ends_the_run_at_its_step(world, tmp_path):
    run = Run(world, tmp_path, damaged_step=5)
    with pytest.raises(CorruptError, match=r"shard-00000\.tokens\.npy"):
        run.fit()
    assert run.trainer.state.step == 5
    assert run.commits == [4]


class FullDisk:
    """The checkpoint folder is a file until `room` is made: mkdir fails as a full disk would."""

    def __init__(self, run):
        self._folder = run.folder.checkpoints
        self._folder.rmdir()
        self._folder.write_text("")

    def make_room(self):
        self._folder.unlink()
        self._folder.mkdir()


def test_a_failed_commit_is_tried_again(world, tmp_path, caplog):
    run = Run(world, tmp_path, checkpoint={"interval_steps": 2})
    disk = FullDisk(run)
    run.answer = lambda: disk.make_room() or {} if run.trainer.state.step == 3 else {}
    assert run.fit() == "done"
    assert run.commits == [4, 6]
    assert "step 2: rank 0 cannot write a checkpoint" in caplog.text
    assert "the next commit tries again" in caplog.text


@pytest.mark.parametrize("stop", [False, True])
def test_a_failed_last_commit_ends_the_run_with_its_cure(world, tmp_path, stop):
    run = Run(world, tmp_path, checkpoint={"interval_steps": 100})
    FullDisk(run)
    if stop:
        stop_at(run, 2)
    with pytest.raises(SaveError) as caught:
        run.fit()
    assert run.trainer.state.step == (2 if stop else 6)
    assert "the newest commit is step 0: make room, then the same command goes on" in str(
        caught.value
    )


def test_three_failed_commits_are_too_many(world, tmp_path):
    run = Run(world, tmp_path, checkpoint={"interval_steps": 1})
    FullDisk(run)
    with pytest.raises(SaveError):
        run.fit()
    assert run.trainer.state.step == 3
