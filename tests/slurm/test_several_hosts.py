"""Training on two hosts by every launcher: equal losses, a network that fails, a hanging rank."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.hang_report import Beat
from tests.conftest import TINY_RUN
from tests.worlds import rows

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
SHAPE = {"nodes": 2}
JSON = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
}
SLOW = "step.begin:0:0-99:sleep:0.5"
LONG = "step.begin:0:2-99:sleep:2"
SHORT = ("safety.hang_seconds=15", "safety.hang_step_factor=2")
HANG_LIMIT_SECONDS = 90


@pytest.fixture(scope="module")
def words(vocab_size, dataset_folder, tmp_path_factory):
    """What training gets, but for the run folder."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "tiny.toml").write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))
    (folder / "ds.json").write_text(json.dumps(JSON))
    return [
        *("--config", str(folder / "tiny.toml"), "--deepspeed_config", str(folder / "ds.json")),
        *(f"data.path={dataset_folder}", "logging.interval_steps=1"),
    ]


def environment(**more):
    """Of a user on a host; the system's mpirun is first: a virtual environment may have MPICH's."""
    inherited = ("HOME", "LANG", "TMPDIR")
    return {
        **{name: os.environ[name] for name in inherited if name in os.environ},
        "PATH": f"/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin:{Path(sys.executable).parent}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **more,
    }


class Launched:
    """`deberta launch` at work on the first host."""

    def __init__(self, hosts, run, words, *options, **variables):
        self.hosts, self.run = hosts, run
        self.began = time.monotonic()
        names = ",".join(f"{name}:1" for name in hosts.names)
        start = [sys.executable, "-m", "pipeline.cli", "launch", "--hosts", names, *options]
        self.log = run.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = hosts.popen_on(
                hosts.names[0],
                [*start, "--", *words, f"run.folder={run}"],
                env=environment(**variables),
                cwd=run.parent,
                stdout=log,
                stderr=log,
            )

    def num_rows(self):
        """Of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until_step(self, step, seconds=120):
        """Wait for a row."""
        deadline = time.monotonic() + seconds
        while self.num_rows() < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def end(self, seconds=150):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def state(self):
        return json.loads((self.run / "state.json").read_text())

    def left(self):
        """Processes of training on any host."""
        found = {}
        for name in self.hosts.names:
            done = self.hosts.run_on(name, ["pgrep", "-f", f"[p]ipeline.train.*{self.run}"])
            found[name] = done.stdout.split()
        return {name: pids for name, pids in found.items() if pids}

    def until_nothing_is_left(self, seconds):
        deadline = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < deadline, (left, self.log.read_text())
            time.sleep(0.5)


@pytest.fixture
def launched(hosts, tmp_path, words):
    """Start a run; the hosts are clean at the end."""
    running = []

    def start(*options, more=(), **variables):
        run = tmp_path / f"run-{len(running)}"
        running.append(Launched(hosts, run, [*words, *more], *options, **variables))
        return running[-1]

    yield start
    for each in running:
        for name in hosts.names:
            hosts.link(name, up=True)
        for name in hosts.names:
            hosts.run_on(name, ["pkill", "-KILL", "-f", str(each.run)])
        each.end(30)


def losses(run):
    """Of every step, without what measures time."""
    return rows(run)


def srun(cluster, *words, **variables):
    """A step of one task on each node, with no launcher between; the finished process."""
    mine = environment(**variables)
    mine["PATH"] = f"{mine['PATH']}:{cluster.environment['PATH']}"
    return cluster.run_on(
        cluster.controller,
        ["srun", "--nodes=2", "--ntasks-per-node=1", *words],
        env={**cluster.environment, **mine},
        timeout=200,
    )


def test_every_launcher_gives_the_same_losses(launched, cluster, words, tmp_path, outcome):
    runs = {}
    for launcher in ("pdsh", "openmpi", "torchrun", "mpirun"):
        run = launched("--launcher", launcher)
        assert run.end() == 0, run.log.read_text()
        assert run.state()["status"] == "done"
        runs[launcher] = losses(run.run)
    by_srun = tmp_path / "by-srun"
    train = [sys.executable, "-m", "pipeline.train", *words, f"run.folder={by_srun}"]
    done = srun(cluster, *train)
    assert done.returncode == 0, done.stderr
    runs["srun"] = losses(by_srun)
    first = runs["pdsh"]
    assert len(first) >= 12
    for launcher, found in runs.items():
        assert found == first, launcher
    outcome("launchers on two hosts", end=f"{len(first)} equal rows by {', '.join(runs)}")


def test_a_network_that_comes_back_costs_nothing(launched, hosts, outcome):
    run = launched(DEBERTA_FAULT=SLOW)
    run.until_step(3)
    hosts.link(hosts.names[1], up=False)
    time.sleep(4)
    before = run.num_rows()
    time.sleep(8)
    assert run.num_rows() == before, "training did not need the link"
    hosts.link(hosts.names[1], up=True)
    assert run.end() == 0, run.log.read_text()
    assert len((run.run / "restarts.jsonl").read_text().splitlines()) == 1
    outcome("a host's link is down for 12 s", end="the run went on to its end", restarts=0)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_a_network_that_stays_away_ends_the_run_on_all_hosts(launcher, launched, hosts, outcome):
    alive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=4"
    run = launched(
        *("--launcher", launcher, "--patience-seconds", "20"),
        more=SHORT,
        DEBERTA_FAULT=SLOW,
        PDSH_SSH_ARGS_APPEND=alive,
    )
    run.until_step(3)
    hosts.link(hosts.names[1], up=False)
    since = time.monotonic()
    code = run.end(HANG_LIMIT_SECONDS)
    run.until_nothing_is_left(HANG_LIMIT_SECONDS - (time.monotonic() - since))
    seconds = time.monotonic() - since
    assert code == 86, run.log.read_text()
    reason = run.state()["reason"]
    assert run.state()["status"] == "hang"
    assert "the network or a device does not answer" in reason
    assert reason in run.log.read_text()
    collectives = sorted((run.run / "logs").glob("collectives-rank-*.json"))
    assert len(collectives) == 2
    seen = f"all ended after {seconds:.0f} s, by {launcher}: {reason}"
    outcome(f"a host's link is down for good ({launcher})", end=seen)


def test_a_stopped_rank_is_named(launched, hosts, outcome):
    run = launched("--patience-seconds", "5", more=SHORT, DEBERTA_FAULT=SLOW)
    run.until_step(3)
    beat = Beat.read(run.run / "heartbeats", 1)
    stopped = hosts.run_on(hosts.names[1], ["kill", f"-{signal.SIGSTOP}", str(beat.pid)])
    assert stopped.returncode == 0, stopped.stderr
    since = time.monotonic()
    assert run.end(HANG_LIMIT_SECONDS) == 86, run.log.read_text()
    reason = run.state()["reason"]
    assert reason.startswith(
        f"hang: rank 1 (host {hosts.names[1]}, pid {beat.pid}) gave no sign of"
    )
    assert reason in run.log.read_text()
    # DeepSpeed's launcher gives its ranks 30 s to end, which this one cannot use.
    run.until_nothing_is_left(HANG_LIMIT_SECONDS - (time.monotonic() - since))
    outcome("SIGSTOP to the rank of the second host", end=reason)


def test_a_launcher_that_is_killed_leaves_ranks_that_are_named(launched, hosts, outcome):
    run = launched(DEBERTA_FAULT=LONG)
    run.until_step(3)
    assert hosts.run_on(hosts.names[0], ["pkill", "-KILL", "-f", "^pdsh -S"]).returncode == 0
    assert run.end() == 1, run.log.read_text()
    said = run.log.read_text()
    assert "the launcher ended with 0, and the run did not: state.json says running" in said
    assert "still at work: rank 0 (host " in said
    (run.run / "stop").touch()
    run.until_nothing_is_left(60)
    assert run.state()["status"] == "stopped"
    outcome("SIGKILL to pdsh", end="1; both ranks named; `stop` ended them with a commit")


def test_signals_reach_all_ranks_through_a_launcher_that_dies_of_them(launched, hosts, outcome):
    run = launched("--launcher", "torchrun", DEBERTA_FAULT=SLOW)
    run.until_step(3)
    words = ["pkill", "-USR1", "-f", "[p]ipeline.cli launch"]
    assert hosts.run_on(hosts.names[0], words).returncode == 0
    assert run.end() == 75, run.log.read_text()
    assert run.state()["status"] == "stopped"
    assert run.state()["step"] >= 3
    outcome("SIGUSR1 to deberta launch by torchrun", end=f"75, step {run.state()['step']}")


def test_nodes_are_looked_at_together(cluster, tmp_path, outcome):
    doctor = [sys.executable, "-m", "pipeline.cli", "doctor", "--node", "--run", str(tmp_path)]
    first, second = cluster.nodes
    well = srun(cluster, *doctor)
    assert well.returncode == 0, well.stdout + well.stderr
    lines = well.stdout.splitlines()
    checks = [line.split(": ok, ")[0] for line in lines]
    for node in (first, second):
        assert {f"{node} gpu", f"{node} run folder {tmp_path}", f"{node} network"} <= {*checks}
    assert any(line.startswith(f"{first} network: ok, gloo all-reduce over 2") for line in lines)
    assert any(line.startswith(f"{first} clock: ok, all 2 ranks within") for line in lines)
    assert any(line.startswith(f"{first} versions: ok, the same on 2 ranks") for line in lines)
    bad = srun(cluster, "--gpus-per-node=2", *doctor, DS_ACCELERATOR="", GLOO_SOCKET_IFNAME="ib7")
    assert bad.returncode != 0
    for node in (first, second):
        assert f"{node} gpu: FAIL, 0 are visible and 2 were given to the job" in bad.stdout
        assert f"{node} network: FAIL, GLOO_SOCKET_IFNAME=ib7, and this node has " in bad.stdout
    outcome("deberta doctor on two nodes", end=f"{len(lines)} lines ok; GPUs and interface missed")
