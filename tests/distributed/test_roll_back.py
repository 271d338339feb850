"""A run that goes back to a commit and leaves data out: also when it is killed behind that."""

import json

import pytest

from tests.forked_worlds import train
from tests.worlds import rows

pytestmark = pytest.mark.distributed

WORDS = (
    "checkpoint.interval_steps=4",
    "schedule.max_consecutive_skipped_steps=2",
    "logging.interval_steps=1",
)
# Both micro batches of the steps 9 and 10; what is taken instead of them is good.
NOT_FINITE = "step.generator_loss:*:9-99:nan::4"


def last_commit(folder):
    commit = folder / "checkpoints" / "step-00000012"
    return {
        str(path.relative_to(commit)): path.read_bytes() for path in commit.rglob("*.safetensors")
    }


@pytest.mark.faults
def test_the_data_stays_left_out_when_the_run_is_killed(
    tiny_run, deepspeed_json, dataset_folder, tmp_path, monkeypatch
):
    config, ds = tiny_run(dropout=0.1), deepspeed_json(2, precision="bf16")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setenv("DEBERTA_FAULT", NOT_FINITE)
    code, output = train(config, ds, dataset_folder, whole, *WORDS)
    assert code == 0, output
    assert "back to the commit of step 8" in output
    monkeypatch.setenv("DEBERTA_FAULT", f"{NOT_FINITE};step.end:0:11:kill")
    code, output = train(config, ds, dataset_folder, killed, *WORDS)
    assert code != 0, output
    monkeypatch.delenv("DEBERTA_FAULT")
    skipped = [(folder / "skipped_data.jsonl").read_text() for folder in (whole, killed)]
    assert skipped[0] == skipped[1]
    record = json.loads(skipped[0])
    assert (record["at_step"], record["commit_step"]) == (11, 8)
    assert record["windows"] == [{"sequence_length": 32, "first_position": 64, "end_position": 88}]
    code, output = train(config, ds, dataset_folder, killed, *WORDS)
    assert code == 0, output
    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(whole) if "train/mlm_loss" in row] == [*range(1, 13)]
    assert last_commit(killed) == last_commit(whole) != {}
    dump = json.loads((whole / "divergence-step-00000011.json").read_text())
    assert [each["completed_steps_before"] for each in dump["samples"]] == [9, 10]
    # Step 8 begins behind the window: 8 samples of its own and the 24 that are left out.
    epochs = {row["step"]: row["train/epochs"] for row in rows(whole) if "train/epochs" in row}
    assert epochs[9] - epochs[8] == pytest.approx(4 * (epochs[8] - epochs[7]))
    assert epochs[10] - epochs[9] == pytest.approx(epochs[8] - epochs[7])


def test_data_that_is_never_good_ends_the_run(
    tiny_run, deepspeed_json, dataset_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("DEBERTA_FAULT", "step.generator_loss:*:9-99:nan")
    folder = tmp_path / "run"
    words = (*WORDS, "safety.max_rollbacks=1")
    code, output = train(tiny_run(), deepspeed_json(), dataset_folder, folder, *words)
    assert code == 87, output
    assert "2 steps in a row had a non-finite gradient" in output
    assert "after 1 roll-backs to about here (safety.max_rollbacks is 1)" in output
    assert "the newest commit is step 8" in output
    assert str(folder / "divergence-step-00000011-2.json") in output
    state = json.loads((folder / "state.json").read_text())
    assert (state["status"], state["step"]) == ("diverged", 8)
    assert len((folder / "skipped_data.jsonl").read_text().splitlines()) == 1
