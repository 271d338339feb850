"""`deberta submit` against a live SLURM's answers, with stand-ins for what the jobs do."""

import json
import sys
from pathlib import Path

import pytest

from tests.submitting import DEEPSPEED
from tests.worlds import ROOT

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 2, "gpus": 0, "settings": "MaxArraySize=20"}
PREP = """#!/bin/bash
#SBATCH --array=0-7
set -euo pipefail
[[ ${SLURM_ARRAY_TASK_ID:-} != 1 || -e allowed ]] || exit 3
if [[ $EXECUTOR == processes ]]; then cp -r DATASET "$OUTPUT"; fi
"""
PRETRAIN = """#!/bin/bash
#SBATCH --nodes=1
set -euo pipefail
mkdir -p "$RUN"
echo '{"status": "done", "step": 300, "reason": ""}' > "$RUN/state.json"
"""
RECIPE = """
[run]
folder = "runs/mine"
[prep]
sources = ["corpus"]
tokenizer = "tokenizer"
array_tasks = 3
[pretrain]
config = "demo"
overrides = ["model.vocab_size=700"]
deepspeed_config = "ds.json"
nodes = 2
gpus_per_node = 0
ntasks_per_node = 2
"""


@pytest.fixture
def deberta(cluster, tmp_path, tokenizer_folder, dataset_folder):
    """`deberta` typed where the controller is, in a folder with a recipe."""
    scripts = tmp_path / "home/slurm"
    scripts.mkdir(parents=True)
    (scripts / "site.env").touch()
    (scripts / "prep.sbatch").write_text(PREP.replace("DATASET", str(dataset_folder)))
    (scripts / "pretrain.sbatch").write_text(PRETRAIN)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    (tmp_path / "ds.json").write_text(DEEPSPEED)
    (tmp_path / "recipe.toml").write_text(RECIPE)

    def deberta(*words):
        environment = {
            **cluster.environment,
            "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DEBERTA_HOME": str(tmp_path / "home"),
        }
        argv = [sys.executable, "-m", "pipeline.cli", *words]
        return cluster.run_on(cluster.controller, argv, env=environment, cwd=tmp_path, timeout=120)

    yield deberta
    cluster.cancel_all()


def test_what_slurm_would_refuse_is_told_before_anything_is_submitted(cluster, deberta, tmp_path):
    recipe = RECIPE.replace("array_tasks = 3", 'array_tasks = 30\npartition = "batsh"')
    recipe = recipe.replace("nodes = 2", "nodes = 4")
    (tmp_path / "wrong.toml").write_text(recipe)
    done = deberta("submit", "wrong.toml")
    assert done.returncode == 2
    for words in (
        "prep: an array of 30 tasks; SLURM here takes 20 (MaxArraySize)",
        "assemble: partition 'batsh' does not exist, did you mean 'batch'?",
        "pretrain: sbatch --test-only: Requested node configuration is not available",
    ):
        assert words in done.stderr, done.stderr
    assert not cluster.client("squeue", "--noheader")
    assert not (tmp_path / "runs").exists()


def test_a_failed_task_cancels_what_waits_and_resubmit_goes_on(cluster, deberta, tmp_path, outcome):
    slurm = tmp_path / "runs/mine/slurm"
    done = deberta("submit", "recipe.toml")
    assert done.returncode == 0, done.stderr
    first = {job["stage"]: job["job_id"] for job in record(slurm)["jobs"]}
    assert cluster.wait(f"{first['prep']}_1")["JobState"] == "FAILED"
    for stage in ("assemble", "pretrain"):
        assert cluster.wait(first[stage])["JobState"] == "CANCELLED"
    status = json.loads(deberta("status", "runs/mine", "--json").stdout)
    assert status["jobs"][0]["states"] == {"COMPLETED": 2, "FAILED": 1}
    assert status["jobs"][0]["failed_tasks"] == ["1"]
    assert status["jobs"][2]["states"] == {"CANCELLED": 1}

    (tmp_path / "allowed").touch()
    again = deberta("submit", "recipe.toml")
    assert again.returncode == 0, again.stderr
    newest = {job["stage"]: job["job_id"] for job in record(slurm)["jobs"]}
    assert len(record(slurm)["jobs"]) == 6
    assert cluster.wait(newest["pretrain"])["JobState"] == "COMPLETED"
    finished = deberta("submit", "recipe.toml")
    assert finished.stdout.count("done, ") == 3
    states = [*cluster.states_seen(f"{first['prep']}_1"), *cluster.states_seen(newest["pretrain"])]
    outcome("a failed array task, then --resubmit", states=states, end="done")


def test_a_job_that_was_not_written_down_is_found_in_the_queue(cluster, deberta, tmp_path):
    slurm = tmp_path / "runs/mine/slurm"
    (tmp_path / "allowed").touch()
    text = RECIPE + 'sbatch_options = ["--begin=now+1hour"]\n'
    (tmp_path / "recipe.toml").write_text(text)
    done = deberta("submit", "recipe.toml")
    assert done.returncode == 0, done.stderr
    values = record(slurm)
    last = values["jobs"].pop()
    comment = cluster.job(last["job_id"])["Comment"].strip()
    names = ("stage", "after", "array_tasks")
    values["submitting"] = {"comment": comment, **{name: last[name] for name in names}}
    (slurm / "jobs.json").write_text(json.dumps(values))
    again = deberta("submit", "recipe.toml")
    assert again.returncode == 2
    assert f"pretrain {last['job_id']}; --resubmit" in again.stderr
    assert record(slurm)["jobs"][-1]["job_id"] == last["job_id"]
    assert record(slurm)["submitting"] == {}


def record(slurm):
    return json.loads((slurm / "jobs.json").read_text())
