"""Killed at any moment, a run goes on bit for bit; damage is found; a request to stop is obeyed."""

import json
import random
import shutil
import signal

import pytest

from tests import worlds
from tests.forked_worlds import train, train_and_kill
from tests.worlds import rows

pytestmark = pytest.mark.distributed

# Long enough that a signal after the first rows still finds the run at work.
LONG = ("schedule.max_steps=30", "checkpoint.interval_steps=5", "evaluation.interval_steps=20")


def has_row(folder, step):
    """Whether metrics.jsonl has a row of this step or a later one."""

    def answer():
        try:
            return any(row["step"] >= step for row in rows(folder))
        except (OSError, ValueError):
            return False

    return answer


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"), [(1, "fp32", 1), (1, "bf16", 2), (3, "bf16", 2)]
)
def test_kill_and_resume(
    stage, precision, ranks, tiny_run, deepspeed_json, dataset_folder, tmp_path
):
    config, ds = tiny_run(dropout=0.1), deepspeed_json(stage, 2, precision)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    code, output = train(config, ds, dataset_folder, undisturbed, *LONG, ranks=ranks)
    assert code == 0, output
    step = random.Random(f"{stage}{precision}").choice([3, 6, 12, 18])
    arguments = (config, ds, dataset_folder, killed, *LONG)
    code, output = train_and_kill(has_row(killed, step), signal.SIGKILL, *arguments, ranks=ranks)
    assert code != 0, output
    assert json.loads((killed / "state.json").read_text())["status"] == "running"
    code, output = train(*arguments, ranks=ranks)
    assert code == 0, output
    assert rows(killed) == rows(undisturbed)
    commits = [folder / "checkpoints" / "step-00000030" for folder in (undisturbed, killed)]
    for network in ("generator", "discriminator"):
        for rank in range(ranks):
            name = f"{network}/rank-{rank:05d}.safetensors"
            assert (commits[0] / name).read_bytes() == (commits[1] / name).read_bytes()


def test_stop_request_to_one_rank(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    config, ds = tiny_run(dropout=0.1), deepspeed_json(2, 2)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert train(config, ds, dataset_folder, undisturbed, *LONG, ranks=2)[0] == 0

    def rank_0():
        return json.loads((stopped / ".holder.json").read_text())["pid"]

    arguments = (config, ds, dataset_folder, stopped, *LONG)
    code, output = worlds.train_and_kill(
        has_row(stopped, 3), signal.SIGUSR1, *arguments, only=rank_0, ranks=2
    )
    state = json.loads((stopped / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("stopped", "SIGUSR1"), output
    assert code != 0  # torchrun turns 75 into 1; state.json is what counts
    assert (stopped / "checkpoints" / f"step-{state['step']:08d}").is_dir()
    assert "the same command resumes" in output
    code, output = train(*arguments, ranks=2)
    assert code == 0, output
    assert rows(stopped) == rows(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_code_of_a_stopped_process(number, tiny_run, deepspeed_json, dataset_folder, tmp_path):
    run = tmp_path / "run"
    code, output = worlds.train_and_kill(
        has_row(run, 3), number, tiny_run(), deepspeed_json(1, 4), dataset_folder, run, *LONG
    )
    assert code == 75, output


def test_damaged_commit(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    config, ds = tiny_run(dropout=0.1), deepspeed_json(1, 4)
    run = tmp_path / "run"
    assert train(config, ds, dataset_folder, run)[0] == 0
    expected = rows(run)
    shutil.copytree(run, tmp_path / "copy")
    newest = run / "checkpoints" / "step-00000012" / "generator" / "rank-00000.safetensors"
    flip_a_bit(newest)
    code, output = train(config, ds, dataset_folder, run)
    assert code == 0, output
    assert f"{newest}: sha256 is" in output
    assert "continues " + str(run / "checkpoints" / "step-00000008") in output
    assert rows(run) == expected
    assert list((run / "checkpoints").glob("step-00000012.corrupt-*"))
    for commit in (tmp_path / "copy" / "checkpoints").glob("step-*"):
        flip_a_bit(commit / "manifest.json")
    for _ in range(2):  # the second start must not take the run for a new one
        code, output = train(config, ds, dataset_folder, tmp_path / "copy")
        assert code == 88, output
        assert "no checkpoint is whole" in output
        assert "manifest.json: sha256 is" in output
    state = json.loads((tmp_path / "copy" / "state.json").read_text())
    assert state["status"] == "corrupt"


def test_damaged_shard(tiny_run, deepspeed_json, dataset_folder, tmp_path):
    damaged = tmp_path / "dataset"
    shutil.copytree(dataset_folder, damaged)
    shard = next(damaged.glob("*.tokens.npy"))
    flip_a_bit(shard)
    code, output = train(tiny_run(), deepspeed_json(1, 4), damaged, tmp_path / "run")
    assert code == 88, output
    assert shard.name in output
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "corrupt"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
