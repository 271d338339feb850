"""The loop's events on real engines: rows, evaluations, commits, stops, skips and failures."""

import json

import pytest

from data_prep.errors import CorruptError
from pipeline.checkpoint import SaveError
from pipeline.commit import list_commits, verify_commit
from pipeline.engine_stepping import StepOutcome
from pipeline.train_state import TrainState
from tests.gpu.host_reads import HostReads
from tests.running import Run, batches_of


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


def test_a_step_without_events_reads_the_device_once_an_engine(world, tmp_path):
    """Loss, norms and spikes are judged in every step, from what came to the host together."""
    run, reads = Run(world, tmp_path), HostReads()
    run.when_marked = lambda phase, step: reads.mark(f"{step} {phase}", step)
    with reads:
        run.fit()
    places = {
        place: count
        for place, count in reads.of("4 ").items()
        if not place.endswith(("masking.py:choose_on_host", "stage_1_and_2.py:_optimizer_step"))
    }
    the_read = "pipeline/engine_reads.py:bring"
    assert places == {
        f"4 generator update: {the_read}": 1,
        f"4 discriminator update: {the_read}": 1,
    }
    assert any("metrics.py" in place for place in reads.of("5 ")), "step 6 has a row"


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
    assert row["train/epochs"] == 0.04
    # The rate of the step that the row ends with: step 1, half of the warm-up.
    assert row["optim/generator_learning_rate"] == 0.5e-3
    assert row["optim/discriminator_learning_rate"] == 1e-3


def test_a_commit_holds_the_interval_that_it_interrupts(world, tmp_path):
    """Rows at 2, 4, 6 and a commit at 5: its sums are those of one step, in hexadecimal."""
    run = Run(world, tmp_path, checkpoint={"interval_steps": 5})
    run.fit()
    tokens = float.fromhex(run.saved(5)["interval_sums"][-1])
    batches = batches_of(run.trainer.config, run.rig.plan).at_step(4)
    assert tokens == sum(int(batch.lengths_B.sum()) for batch in batches)
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


@pytest.mark.parametrize(
    ("phase", "taken"),
    [
        ("generator forward 0", False),  # asked between micro steps: nothing has changed yet
        ("generator backward 0", False),
        ("generator backward 1", True),  # no micro step follows
        ("generator update", True),
        ("discriminator forward 0", True),
        ("discriminator update", True),
    ],
)
def test_a_stop_in_the_middle_of_a_step(world, tmp_path, phase, taken):
    run = Run(world, tmp_path, checkpoint={"interval_steps": 100})
    run.when_marked = lambda seen, step: (seen, step) == (phase, 2) and run.ask_to_stop()
    assert run.fit() == "stopped"
    assert run.commits == [3 if taken else 2]
    assert [row["step"] for row in run.rows()] == [2]


def test_a_stop_before_the_first_step_commits_nothing(world, tmp_path):
    run = Run(world, tmp_path)
    run.ask_to_stop()
    assert run.fit() == "stopped"
    assert run.commits == run.rows() == run.evaluated_at == []


def test_a_request_for_a_commit(world, tmp_path):
    run = Run(world, tmp_path)
    run.stop.watch(tmp_path, 0.0)

    def ask(phase, step):
        if (phase, step) == ("generator update", 2):
            (tmp_path / "save-now").touch()
            run.stop._looked_seconds = 0.0  # rank 0 looks at most once a second

    run.when_marked = ask
    assert run.fit() == "done"
    assert run.commits == [3, 4, 6]
    assert not (tmp_path / "save-now").exists()


def test_rows_that_cannot_be_written_hold_back_the_commit(world, tmp_path, caplog):
    run = Run(world, tmp_path, checkpoint={"interval_steps": 2})
    sync, full = run.trainer._services.metrics.sync, [True]

    def refuse():
        if full.pop() if full else False:
            raise OSError(28, "No space left on device")
        sync()

    run.trainer._services.metrics.sync = refuse
    assert run.fit() == "done"
    assert run.commits == [4, 6]
    assert "metrics.jsonl: [Errno 28] No space left on device; the next commit tries" in caplog.text


def stop_at(run, step):
    """A signal late in the step that ends as number `step`."""

    def ask(phase, completed):
        if (phase, completed) == ("discriminator update", step - 1):
            run.ask_to_stop()

    run.when_marked = ask


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
