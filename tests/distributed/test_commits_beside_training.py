"""checkpoint.asynchronous: what is written while training goes on is what training waited for."""

import json

import pytest

from pipeline import faults
from tests.forked_worlds import train
from tests.worlds import environment, rows

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

WORDS = ("checkpoint.interval_steps=2", "checkpoint.keep_last=9", "schedule.max_steps=10")


def tensors(folder):
    """Every rank file of every commit, by its name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in (folder / "checkpoints").rglob("*.safetensors")
        if "partial" not in path.parent.parent.name
    }


def test_killed_while_it_writes_beside_training(
    tiny_run, deepspeed_json, dataset_folder, tmp_path, monkeypatch
):
    """Rank 0 dies with the commit of step 6 written but not named; the run resumes from step 4."""
    config, ds = tiny_run(dropout=0.1), deepspeed_json(3, 2, "bf16")
    waits, beside = tmp_path / "waits", tmp_path / "beside"
    code, output = train(config, ds, dataset_folder, waits, *WORDS, ranks=2)
    assert code == 0, output
    words = (*WORDS, "checkpoint.asynchronous=true")
    with monkeypatch.context() as patch:
        patch.setenv(faults.VARIABLE, "save.rename:0:6:kill")
        assert faults.VARIABLE in environment()
        code, output = train(config, ds, dataset_folder, beside, *words, ranks=2)
    assert code != 0, output
    left = {path.name for path in (beside / "checkpoints").iterdir()}
    assert left == {"latest", "step-00000002", "step-00000004", "step-00000006.partial"}
    state = json.loads((beside / "state.json").read_text())
    assert (state["status"], state["step"]) == ("running", 4)
    code, output = train(config, ds, dataset_folder, beside, *words, ranks=2)
    assert code == 0, output
    assert "step-00000004" in output
    assert tensors(beside) == tensors(waits)
    assert len(tensors(beside)) == 5 * 2 * 2
    assert rows(beside) == rows(waits)
    assert json.loads((beside / "state.json").read_text())["step"] == 10
    assert (beside / "checkpoints" / "latest").read_text() == "step-00000010\n"
