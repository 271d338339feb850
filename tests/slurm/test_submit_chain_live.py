"""`deberta submit` on a live SLURM: text, a prepared dataset, two nodes of training, a model."""

import json
import sys
from pathlib import Path

import pytest

from tests.task_files import write_glue
from tests.worlds import ROOT

pytestmark = pytest.mark.slurm
SHAPE = {"nodes": 2, "gpus": 0}
TIMEOUT_SECONDS = 240

RECIPE = """
[run]
folder = "runs/it's $(touch HIT)"
name = "mine"

[site]
file = "site.env"

[tokenizer]
sources = ["corpus"]
vocab_size = 600
txt_document = "line"
cpus_per_task = 1
mem = "1G"

[prep]
sources = ["corpus"]
txt_document = "line"
heldout_fraction = 0.1
unit_bytes = 40_000
array_tasks = 4
cpus_per_task = 1
mem = "1G"

[pretrain]
config = "tiny.toml"
deepspeed_config = "ds.json"
overrides = ["schedule.max_steps=6", "checkpoint.interval_steps=3"]
nodes = 2
gpus_per_node = 0
ntasks_per_node = 1
time = "00:10:00"

[export]
cpus_per_task = 1
mem = "2G"

[evaluate]
cpus_per_task = 1
mem = "2G"
seeds = 2
[[evaluate.tasks]]
name = "colour"
train = "a task.jsonl"
test = "a task.jsonl"
epochs = 1
max_length = 16
[[evaluate.tasks]]
name = "entailment"
task = "rte"
data = "glue data"
epochs = 1
max_length = 16
"""
TASK = "".join(
    json.dumps({"text": f"{word} {n}", "label": word}) + "\n"
    for n in range(4)
    for word in ("red", "blue")
)


@pytest.fixture
def workplace(cluster, corpus, tiny_run, deepspeed_json, tmp_path):
    """A folder as a person has it, and `deberta` typed in it where the controller is."""
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "corpus").symlink_to(corpus)
    tiny = tiny_run().read_text()
    vocabulary = next(line for line in tiny.splitlines() if line.startswith("vocab_size"))
    (folder / "tiny.toml").write_text(tiny.replace(vocabulary, "vocab_size = 700"))
    (folder / "ds.json").write_text(deepspeed_json().read_text())
    (folder / "setup.sh").write_text("export FROM_SETUP=$UNSET\n")
    (folder / "site.env").write_text("SBATCH_PARTITION=batch\nDEBERTA_SETUP=setup.sh\n")
    (folder / "a task.jsonl").write_text(TASK)
    write_glue(folder / "glue data", train=8, dev=8, test=2)
    (folder / "recipe.toml").write_text(RECIPE)

    def deberta(*words):
        environment = {
            **cluster.environment,
            "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        argv = [sys.executable, "-m", "pipeline.cli", *words]
        return cluster.run_on(
            cluster.controller, argv, env=environment, cwd=folder, timeout=TIMEOUT_SECONDS
        )

    deberta.folder = folder
    return deberta


def logs(run):
    """The end of every log, for people."""
    paths = [*(run / "slurm/logs").glob("*"), *(run / "slurm").glob("rank-*")]
    return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(paths))


@pytest.mark.timeout(600)
def test_text_becomes_a_model_by_one_command(cluster, workplace, outcome):
    folder = workplace.folder
    run = folder / "runs/it's $(touch HIT)"
    done = workplace("submit", "recipe.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = ["tokenizer", "prep", "assemble", "pretrain", "export", "evaluate"]
    record = json.loads((run / "slurm/jobs.json").read_text())
    assert [job["stage"] for job in record["jobs"]] == stages
    ids = {job["stage"]: job["job_id"] for job in record["jobs"]}

    again = workplace("submit", "recipe.toml")
    assert again.returncode == 2
    assert "--resubmit submits the stages that are neither done nor in the queue" in again.stderr

    shares = [f"{ids['prep']}_{task}" for task in range(4)]
    scores = [f"{ids['evaluate']}_{task}" for task in range(5)]
    alone = [ids[stage] for stage in stages[2:5]]
    for job_id in (ids["tokenizer"], *shares, *alone, *scores):
        job = cluster.wait(job_id, timeout_seconds=TIMEOUT_SECONDS)
        assert job["JobState"] == "COMPLETED", f"{job}\n{logs(run)}"

    status = json.loads(workplace("status", str(run), "--json").stdout)
    assert status["queue"] == "asked"
    assert [job["states"] for job in status["jobs"]] == [
        {"COMPLETED": {"prep": 4, "evaluate": 5}.get(stage, 1)} for stage in stages
    ]
    assert (status["training"]["status"], status["training"]["step"]) == ("done", 6)
    assert "step: 6 of 6 (100.0%), committed 6" in workplace("status", str(run)).stdout

    from transformers import AutoModel

    model = AutoModel.from_pretrained(run / "export/discriminator")
    assert model.config.vocab_size == 700
    figures = json.loads((run / "evaluation/heldout.json").read_text())["heldout"]["figures"]
    assert figures["eval/mlm_loss"] > 0
    own = json.loads((run / "evaluation/colour/results.json").read_text())
    assert [each["seed"] for each in own["runs"]] == [0, 0, 1, 1]
    assert set(own["intervals"]["pretrained"]) == {"accuracy", "macro_f1"}
    published = json.loads((run / "evaluation/entailment/results.json").read_text())
    figures = published["tasks"]["rte"]["figures"]
    assert [len(figure["by_seed"]) for figure in figures] == [2]
    starts = (run / "restarts.jsonl").read_text().splitlines()
    assert [json.loads(line)["world_size"] for line in starts] == [2]
    assert not (folder / "HIT").exists()

    finished = workplace("submit", "recipe.toml")
    assert finished.returncode == 0
    assert finished.stdout.count("done, ") == len(stages)
    outcome("chain of six jobs by deberta submit", states=("COMPLETED",) * 6, end="done")
