"""`deberta compare` as a user types it: two systems and two seeds, killed once, then finished."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.config_loading import load_run_config
from pipeline.flops import training_flops
from tests.worlds import ROOT, environment, rows

pytestmark = pytest.mark.timeout(1200)
SEEDS = (42, 43)


def command(*words):
    return [sys.executable, "-m", "pipeline.cli", "compare", *map(str, words)]


def kill_when(process, moment):
    """Kill a process and its children, as a machine that goes down does."""
    deadline = time.monotonic() + 240
    while not moment():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.05)
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:
        each.send_signal(signal.SIGKILL)
    process.communicate()


def write_task(folder):
    folder.mkdir()
    for name in ("train", "test"):
        lines = [f"the {w} of {i}\t{w}\n" for i in range(8) for w in ("war", "peace")]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "".join(lines))
    return ("--train", folder / "train.tsv", "--test", folder / "test.tsv")


def test_comparison_is_killed_and_finished(tmp_path, tiny_run, deepspeed_json, dataset_folder):
    gdes, mlm = tmp_path / "gdes.toml", tmp_path / "mlm.toml"
    text = tiny_run().read_text()
    gdes.write_text(text)
    begin, end = text.index("[discriminator]"), text.index("[optimizer]")
    text = text[:begin] + '[objective]\ntask = "mlm"\n' + text[end:]
    mlm.write_text(text.replace("discriminator_learning_rate = 1e-3\n", ""))
    output, deepspeed = tmp_path / "comparison", deepspeed_json(1, 4)
    words = [
        *(gdes, mlm, "--deepspeed_config", deepspeed, "--dataset", dataset_folder),
        *("--output", output, "--seeds", 2, "--epochs", 1, "--max-length", 32),
        *write_task(tmp_path / "peace"),
    ]
    first = output / "runs" / "gdes-seed-42"
    second = output / "runs" / "mlm-seed-42" / "state.json"
    process = subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    kill_when(process, second.exists)
    assert not (output / "comparison.json").exists()
    done = subprocess.run(
        command(*words, "--json"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "[1/4] gdes-seed-42: done before" in done.stderr
    assert len((first / "restarts.jsonl").read_text().splitlines()) == 1
    values = json.loads(done.stdout)
    assert values == json.loads((output / "comparison.json").read_text())
    assert values["failures"] == []
    figures_are_those_of_the_runs(values, output)
    budgets_are_equal(values, gdes)
    the_result_is_written(values, output)


def figures_are_those_of_the_runs(values, output):
    for system in values["systems"]:
        runs = [output / "runs" / f"{system['name']}-seed-{seed}" for seed in SEEDS]
        last = [[row for row in rows(run) if "eval/mlm_loss" in row][-1] for run in runs]
        assert {row["step"] for row in last} == {system["cost"]["steps"]}
        losses = [row["eval/mlm_loss"] for row in last]
        end = system["curve"][-1]
        spread = end["figures"]["eval/mlm_loss"]
        assert spread["mean"] == pytest.approx(sum(losses) / 2)
        assert spread["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
        assert len(system["curve"]) == 2
        accuracy = system["scores"]["peace"]["pretrained"]["accuracy"]
        assert 0 <= accuracy["mean"] <= 1
        assert accuracy["count"] == 2
    cosines = [set(system["cosines"]) for system in values["systems"]]
    assert cosines == [{"E_G", "E_D", "Delta"}, {"E_G"}]


def budgets_are_equal(values, gdes):
    budget = training_flops(load_run_config(str(gdes)), 8)
    assert values["budget"] == pytest.approx(budget)
    for system in values["systems"]:
        one = system["cost"]["flops"] / system["cost"]["steps"]
        assert abs(system["cost"]["flops"] - budget) <= one / 2
    assert values["systems"][1]["cost"]["steps"] > 12, "one network costs less than two"


def the_result_is_written(values, output):
    text = (output / "comparison.md").read_text()
    assert values["command"] in text
    assert values["command"].startswith("deberta compare ")
    assert "## Fine-tuned: peace" in text
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_s_comparison_can_begin(tmp_path):
    """Its commands as they are written, up to the last one's training."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Compare objectives\n")[1]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].strip()
    assert block.splitlines()[-1].endswith("evaluation.interval_steps=30")
    (tmp_path / "data_prep").symlink_to(ROOT / "data_prep")
    done = subprocess.run(
        ["bash", "-euc", f"{block} --dry-run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "demo_electra" in done.stdout
    assert re.search(r"total +│ +15 ", done.stdout)
    assert not (tmp_path / "compare" / "result").exists()
