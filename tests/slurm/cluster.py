"""A real SLURM on hosts of one machine (`hosts.py`): munge, one controller, a slurmd a node.

    Cluster(folder, nodes, gpus)  a context manager; see below for what can be done with it

Nothing is shared with another cluster: the folder holds keys, sockets, state and logs, the hosts'
addresses exist only inside of them, and the names of nodes are the owner's (SLURM's control groups
lie under them). A GPU is a device file. It ends with its owner, by `kill -9` too.
"""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil

from tests.slurm.hosts import Hosts, owner_of, unique_prefix, why_there_can_be_no_hosts
from tests.slurm.settings import configuration_files

CLIENT_TIMEOUT_SECONDS = 30
START_TIMEOUT_SECONDS = 60
PACKAGES = "slurmctld slurmd slurm-client munge"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
_POLL_SECONDS = 0.25
_FREEZER = Path("/sys/fs/cgroup/freezer")
_LAUNCHER = re.compile(r"SLURM_|SLURMD_|SBATCH_|SALLOC_|(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_\w+)$")


def why_there_can_be_no_cluster():
    """What the machine lacks, and the cure; empty where a cluster can start."""
    programs = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
    if missing := [name for name in programs if not shutil.which(name, path=_path())]:
        return (
            f"{', '.join(missing)} not found: `make slurm-packages`, or apt-get install {PACKAGES}"
        )
    if not os.access(_FREEZER, os.W_OK):
        return f"{_FREEZER} cannot be written: SLURM here ends steps by version 1 of control groups"
    return why_there_can_be_no_hosts()


def _path():
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def remove_what_dead_owners_left():
    """Control groups of clusters whose owner died before it could tidy up; they are empty."""
    for group in _FREEZER.glob("slurm_t*-n*"):
        name = re.fullmatch(r"slurm_(t[a-j]+[a-z])-n\d+", group.name)
        if name and not psutil.pid_exists(owner_of(name[1])):
            _remove_control_group(group)


def _remove_control_group(group):
    for each in sorted(group.glob("**/"), key=lambda path: -len(path.parts)):
        try:
            each.rmdir()
        except OSError:  # a process still ends
            return


class Cluster:
    """A SLURM with its jobs.

    `nodes` are names; partition `batch` is the default and may be preempted by `urgent`.
    `states_seen` of a job holds what a poll four times a second has seen.
    """

    def __init__(self, folder, nodes=2, gpus=4, cpus=8, grace_seconds=10, settings=""):
        self.folder = Path(folder).absolute()
        self._prefix = unique_prefix()
        self.controller = f"{self._prefix}-ctl"
        self.nodes = [f"{self._prefix}-n{index + 1}" for index in range(nodes)]
        self._hosts = Hosts(self.folder / "hosts", [self.controller, *self.nodes])
        self._shape = (gpus, cpus, grace_seconds, settings)
        self._seen = {}
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="states", daemon=True)

    @property
    def environment(self):
        """For SLURM's commands on the hosts: the caller's, without another job's or launcher's."""
        kept = {key: value for key, value in os.environ.items() if not _LAUNCHER.match(key)}
        return {**kept, "SLURM_CONF": str(self.folder / "etc/slurm.conf"), "PATH": _path()}

    def __enter__(self):
        remove_what_dead_owners_left()
        self._hosts.__enter__()
        try:
            configuration_files(self.folder, self.controller, self.nodes, self._hosts, *self._shape)
            self._start_munge()
            self.start_controller()
            for name in self.nodes:
                self._start_slurmd(name)
            self.wait_for_nodes()
            self._watcher.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all jobs by ending all hosts."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._hosts.close()
        for name in self.nodes:
            _remove_control_group(_FREEZER / f"slurm_{name}")

    # Commands

    def run_on(self, host, argv, **options):
        """Run a command on a host to its end; see `Hosts.run_on`."""
        options.setdefault("timeout", CLIENT_TIMEOUT_SECONDS)
        options.setdefault("env", self.environment)
        return self._hosts.run_on(host, argv, **options)

    def popen_on(self, host, argv, **options):
        """Start a command on a host; see `Hosts.popen_on`."""
        options.setdefault("env", self.environment)
        return self._hosts.popen_on(host, argv, **options)

    def client(self, *argv, **options):
        """Run a command of SLURM where the controller is; its output."""
        done = self.run_on(self.controller, argv, **options)
        assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done.stdout

    def sbatch(self, script, *words, env=None, cwd=None, options=()):
        """Submit a job.

        Args:
            script: The script's path.
            words: Of the script.
            env: Variables beside `environment`.
            cwd: Where the job starts and writes; the cluster's folder where None.
            options: Of sbatch.

        Returns:
            The job's id, a string.
        """
        environment = {**self.environment, **(env or {})}
        argv = ["sbatch", "--parsable", *options, script, *words]
        answer = self.client(*argv, env=environment, cwd=cwd or self.folder)
        return answer.strip().partition(";")[0]

    def job(self, job_id):
        """All that `scontrol show job` says, by its names; tasks of an array: `12_3`."""
        answer = self.client("scontrol", "-o", "show", "job", job_id)
        return _fields(answer.splitlines()[0])

    def wait(self, job_id, states=ENDED, timeout_seconds=60, when=None):
        """Wait until a job is in one of the states (and `when(job)` holds); the job."""
        states = (states,) if isinstance(states, str) else tuple(states)
        deadline = time.monotonic() + timeout_seconds
        while True:
            job = self.job(job_id)
            if job["JobState"] in states and (when is None or when(job)):
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is not {states}: {job}\n{self.tail()}")
            time.sleep(_POLL_SECONDS)

    def cancel_all(self, timeout_seconds=60):
        """Leave no job for the next test."""
        self.client("scancel", "--user=root")
        deadline = time.monotonic() + timeout_seconds
        while self.client("squeue", "--noheader"):
            assert time.monotonic() < deadline, "jobs do not end: " + self.tail()
            time.sleep(_POLL_SECONDS)

    def states_seen(self, job_id):
        """States of a job in their order, `PENDING RUNNING ...`."""
        return list(self._seen.get(str(job_id), []))

    # Accidents

    def kill_node(self, name):
        """A power cut."""
        self._hosts.kill(name)

    def start_node(self, name):
        """Switch a node on again; it is idle once the controller has heard of it."""
        self._hosts.start(name)
        self._start_slurmd(name)

    def wait_for_nodes(self, timeout_seconds=START_TIMEOUT_SECONDS):
        """Wait until every node is idle."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            done = self.run_on(self.controller, ["sinfo", "-h", "-N", "-o", "%N %T"])
            states = set(done.stdout.splitlines())
            if states == {f"{name} idle" for name in self.nodes}:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are not idle: {states} {done.stderr}\n{self.tail()}")
            time.sleep(0.1)

    def link(self, name, up):
        """Plug or unplug a host's cable."""
        self._hosts.link(name, up)

    def drop(self, source, target, on=True):
        """Lose silently, or no longer, what one host sends to another."""
        self._hosts.drop(source, target, on)

    def stop_controller(self, signal_number=signal.SIGKILL):
        """End slurmctld; its state is on disk."""
        pid = (self.folder / "run/slurmctld.pid").read_text().strip()
        self.run_on(self.controller, ["kill", f"-{int(signal_number)}", pid])
        while self.run_on(self.controller, ["test", "-d", f"/proc/{pid}"]).returncode == 0:
            time.sleep(0.05)

    def start_controller(self):
        """Start slurmctld, again or for the first time, and wait until it answers."""
        self._daemon(self.controller, "slurmctld", "-i")
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self.run_on(self.controller, ["scontrol", "ping"]).returncode:
            assert time.monotonic() < deadline, "slurmctld does not answer: " + self.tail()
            time.sleep(0.1)

    def start_sshd(self):
        """Let root log in from each host to each other."""
        self._hosts.start_sshd()

    def tail(self, lines=15):
        """The ends of all logs, for people."""
        texts = []
        for path in sorted((self.folder / "log").glob("*.log")):
            texts.append(f"== {path.name}")
            texts += path.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(texts)

    # Its parts

    def _start_munge(self):
        folder = self.folder
        (folder / "munge").mkdir(mode=0o700, exist_ok=True)
        key = folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {"key": key, "socket": folder / "run/munge.sock", "pid": folder / "run/munged.pid"}
        self._daemon(
            self.controller,
            *("munged", "--force", f"--key-file={files['key']}", f"--socket={files['socket']}"),
            *(f"--pid-file={files['pid']}", f"--seed-file={folder}/munge/seed"),
            f"--log-file={folder}/munge/munged.log",
        )

    def _start_slurmd(self, name):
        self._daemon(name, "slurmd", "-N", name)

    def _daemon(self, host, *argv):
        # Files, not pipes: a daemon would keep a pipe open, and its reader waiting.
        with (self.folder / "log/daemons.log").open("a") as log:
            done = self.run_on(host, argv, stdout=log, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{argv}: " + self.tail()

    def _watch(self):
        """Note every job's states as they change."""
        while not self._stopping.wait(_POLL_SECONDS):
            try:
                done = self.run_on(self.controller, ["scontrol", "-o", "show", "job"])
            except subprocess.TimeoutExpired:
                continue
            for line in done.stdout.splitlines() if done.returncode == 0 else ():
                job = _fields(line)
                if "JobState" in job:
                    self._note(job)

    def _note(self, job):
        names = [job["JobId"]]
        if "ArrayTaskId" in job:
            names.append(f"{job['ArrayJobId']}_{job['ArrayTaskId']}")
        for name in names:
            states = self._seen.setdefault(name, [])
            if states[-1:] != [job["JobState"]]:
                states.append(job["JobState"])


def _fields(line):
    """`scontrol -o`'s line: values may hold spaces, names do not."""
    found = re.finditer(r"(\S+?)=(.*?)(?= \S+?=|\s*$)", line)
    return {each[1]: each[2] for each in found}
