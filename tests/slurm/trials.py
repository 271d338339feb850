"""One run under pretrain.sbatch on a live SLURM: submitted, hurt, awaited and judged."""

import json
import sys
import time
from pathlib import Path

from tests.slurm.cluster import ENDED

ROOT = Path(__file__).parents[2]
STANDIN = Path(__file__).with_name("standin.py")
PATIENCE_SECONDS = 120
SETTLED_SECONDS = 15
"""A requeued job is back within 11 s here: one that is not back by then stays away."""


class Trial:
    """A run folder and the job that trains in it."""

    def __init__(self, cluster, folder, home=ROOT):
        """`home` holds slurm/: the repository, or a copy whose scripts a test has broken."""
        self.cluster = cluster
        self.home = Path(home)
        self.folder = Path(folder)
        self.run = self.folder / "run"
        self.job_id = ""
        self.folder.mkdir(parents=True, exist_ok=True)

    def submit(self, *words, nodes=2, tasks=1, minutes=10, options=(), **variables):
        """Submit the stand-in, or what TRAIN_COMMAND names; words go to training."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{self.cluster.environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DEBERTA_HOME": str(self.home),
            "RUN": str(self.run),
            "DATASET": "dataset",
            "CONFIG": "config",
            "DEEPSPEED_CONFIG": "deepspeed.json",
            "TRAIN_COMMAND": f"python {STANDIN}",
            "TRAIN_WORDS": " ".join(words),
            **variables,
        }
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
        shape.append("--cpus-per-task=1")
        self.job_id = self.cluster.sbatch(
            self.home / "slurm/pretrain.sbatch",
            options=[*shape, f"--time={minutes}", *options],
            env=environment,
            cwd=self.folder,
        )
        return self

    # What can be seen

    def text(self):
        """The job's own output and its ranks'."""
        paths = [*sorted(self.folder.glob("*.out")), *sorted(self.run.glob("slurm/*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in paths)

    def decisions(self):
        """The lines of restarts.jsonl."""
        path = self.run / "slurm/restarts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verdicts(self):
        """The decisions without the starts."""
        return [each["decision"] for each in self.decisions() if each["decision"] != "start"]

    def state(self):
        """state.json."""
        return json.loads((self.run / "state.json").read_text())

    def computed(self):
        """Steps that rank 0 of the stand-in has computed, with repetitions."""
        path = self.run / "computed"
        return (
            [int(line.split()[1]) for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    def lost_steps(self):
        """How many steps were computed more than once."""
        return len(self.computed()) - len(set(self.computed()))

    # What can be done

    def until(self, holds, what, seconds=PATIENCE_SECONDS):
        """Wait for something."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come\n{self.text()}\n{self.cluster.tail()}")
            time.sleep(0.1)

    def until_step(self, step):
        """Wait until rank 0 has computed a step."""
        self.until(lambda: step in self.computed(), f"step {step}")
        return self

    def scontrol(self, *words):
        """A word of the user's about the job."""
        self.cluster.client("scontrol", *words, self.job_id)

    def signal(self, name, *where):
        """`scancel --signal`, with `--batch` for the job's shell alone."""
        self.cluster.client("scancel", f"--signal={name}", *where, self.job_id)

    def kill_rank(self, rank, signal_name="KILL"):
        """Send a signal to a rank of the stand-in alone."""
        host, pid = (self.run / f"pid-{rank}").read_text().split()
        assert self.cluster.run_on(host, ["kill", f"-{signal_name}", pid]).returncode == 0

    def end(self, state="COMPLETED", seconds=PATIENCE_SECONDS):
        """Wait until the job has ended in a state and stays there; the job."""
        try:
            job = self.cluster.wait(self.job_id, ENDED, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.text()}") from None
        if job["JobState"] != "COMPLETED":
            time.sleep(SETTLED_SECONDS)
            job = self.cluster.job(self.job_id)
        assert job["JobState"] == state, f"{job}\n{self.decisions()}\n{self.text()}"
        return job

    def seen(self, job):
        """For the table of outcomes."""
        self.until(lambda: self.cluster.states_seen(self.job_id)[-1] == job["JobState"], "the end")
        end = self.state()["status"] if (self.run / "state.json").exists() else ""
        return {
            "states": self.cluster.states_seen(self.job_id),
            "restarts": int(job["Restarts"]),
            "lost_steps": self.lost_steps(),
            "end": f"{job['JobState']}, {end or 'never began'}",
        }


def broken_home(folder, file, old, new):
    """A copy of slurm/ in which a line of a script was replaced."""
    home = Path(folder) / "home"
    (home / "slurm").mkdir(parents=True)
    for path in (ROOT / "slurm").iterdir():
        if path.is_file():
            (home / "slurm" / path.name).write_bytes(path.read_bytes())
            (home / "slurm" / path.name).chmod(path.stat().st_mode)
    broken = home / "slurm" / file
    text = broken.read_text()
    assert text.count(old) == 1, f"{file} no longer holds {old!r} once"
    broken.write_text(text.replace(old, new))
    return home
