"""pretrain.sbatch with real training, a rank on each of two hosts: the numbers of no accident."""

import json

import pytest

from tests.conftest import TINY_RUN
from tests.slurm.trials import Trial
from tests.worlds import rows

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SHAPE = {"nodes": 3}
STEPS, COMMIT_STEPS, HURT_AFTER_STEP = 60, 20, 25
JSON = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
}


class RealTrial(Trial):
    """A run of `pipeline.train`."""

    lost = 0

    def train(self, files, dataset, *words, **options):
        """Submit; steps are slow enough to be hit between two commits."""
        toml, ds_json = files
        return self.submit(
            *("logging.interval_steps=1", f"schedule.max_steps={STEPS}"),
            *(f"checkpoint.interval_steps={COMMIT_STEPS}", *words),
            TRAIN_COMMAND="python -m pipeline.train",
            CONFIG=str(toml),
            DEEPSPEED_CONFIG=str(ds_json),
            DATASET=str(dataset),
            DS_ACCELERATOR="cpu",
            OMP_NUM_THREADS="1",
            **options,
        )

    def steps_taken(self):
        """The last row of metrics.jsonl; 0 before the first."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("\n") else 0

    def until_hurt(self):
        """Between two commits."""
        self.until(lambda: self.steps_taken() >= HURT_AFTER_STEP, "a step between two commits")

    def until_restarted(self):
        """Count the steps that the next start takes again."""
        taken = self.steps_taken()

        def starts():
            nonlocal taken
            lines = (self.run / "restarts.jsonl").read_text().splitlines()
            if len(lines) == 1:
                taken = max(taken, self.steps_taken())
            return [json.loads(line) for line in lines]

        self.until(lambda: len(starts()) == 2, "the second start", 180)
        self.lost = taken - starts()[1]["step"]

    def lost_steps(self):
        return self.lost


@pytest.fixture(scope="module")
def files(vocab_size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiny.toml").write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))
    (folder / "ds.json").write_text(json.dumps(JSON))
    return folder / "tiny.toml", folder / "ds.json"


@pytest.fixture(scope="module")
def undisturbed(cluster, files, dataset_folder, tmp_path_factory):
    """Rows of the same run without an accident, on nodes that were checked before."""
    trial = RealTrial(cluster, tmp_path_factory.mktemp("undisturbed"))
    job = trial.train(files, dataset_folder, PREFLIGHT="1").end(seconds=240)
    assert job["Restarts"] == "0"
    assert "all-reduce over 2 ranks" in (trial.run / "slurm/preflight.log").read_text()
    expected = rows(trial.run)
    assert [row["step"] for row in expected if "train/rtd_loss" in row] == [*range(1, STEPS + 1)]
    return expected


@pytest.fixture
def trial(cluster, tmp_path, files, dataset_folder):
    trial = RealTrial(cluster, tmp_path)
    trial.train(files, dataset_folder, DEBERTA_FAULT="step.begin:*:*:sleep:0.2")
    trial.until_hurt()
    yield trial
    cluster.cancel_all()


def usr1(trial):
    trial.signal("USR1", "--batch")


def requeue(trial):
    trial.scontrol("requeue")


def preemption(trial):
    script = trial.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 2\n")
    nodes = f"--nodes={len(trial.cluster.nodes)}"
    trial.cluster.sbatch(script, options=["--partition=urgent", "--exclusive", nodes])


def power_cut(trial):
    trial.cluster.kill_node(trial.cluster.nodes[1])


@pytest.mark.parametrize("accident", [usr1, requeue, preemption, power_cut])
def test_the_numbers_are_those_of_no_accident(accident, cluster, trial, undisturbed, outcome):
    accident(trial)
    try:
        trial.until_restarted()
        job = trial.end(seconds=240)
    finally:
        if accident is power_cut:
            cluster.start_node(cluster.nodes[1])
            cluster.wait_for_nodes()
    assert trial.state() == {"status": "done", "step": STEPS, "reason": ""}
    assert rows(trial.run) == undisturbed
    assert (trial.lost > 0) == (accident is power_cut)
    assert job["Restarts"] == "1"
    outcome(f"real training: {accident.__name__}", **trial.seen(job))
