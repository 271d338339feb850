"""SLURM's own commands, and what they answer.

Queries are tried a few times, because controllers restart. Submitting is not: an answer that was
lost may belong to a job that is in the queue, so each job carries a comment by which it is found.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.errors import UserError

TIMEOUT_SECONDS = 60
_TRIES = 3
_PASSING = re.compile(r"contact|timed out|onnection|gave no answer")
_WAIT_SECONDS = 2.0
_ENDED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
_QUEUE_FIELDS = "%F|%K|%T|%r|%S|%N"
_ACCOUNTING_FIELDS = "JobID,State,ExitCode"


class SlurmError(UserError):
    """SLURM refused, or did not answer."""


@dataclass(frozen=True)
class TaskState:
    """A job, or a task of an array, as the queue or the accounting sees it.

    Attributes:
        task: Its number in the array; empty for a job that is none, or for several that wait.
        state: SLURM's word, as RUNNING.
        reason: Why it waits or how it ended; empty if unknown.
        start: When it started or is expected to; empty if unknown.
        nodes: Its nodes; empty if it has none.
    """

    task: str
    state: str
    reason: str = ""
    start: str = ""
    nodes: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it waits, runs or ends, so that it may still do something."""
        return self.state not in _ENDED

    @property
    def is_failed(self) -> bool:
        """Whether it has ended without success."""
        return not self.is_live and self.state != "COMPLETED"


@dataclass(frozen=True)
class Slurm:
    """SLURM's commands in an environment.

    Attributes:
        environment: Of the commands.
    """

    environment: Mapping[str, str]

    def absence(self) -> str:
        """Say why this machine cannot submit.

        Returns:
            The reason; empty if SLURM answers.
        """
        if self._program("sbatch") is None:
            return "sbatch is not on this machine"
        try:
            self._ask(["sinfo", "--noheader", "--format=%R"])
        except SlurmError as error:
            return f"SLURM does not answer ({error})"
        return ""

    def refusal(self, script: str) -> str:
        """Ask whether SLURM would take a job.

        Args:
            script: The job's script.

        Returns:
            Why not, in SLURM's words; empty if it would.
        """
        done = self._run(["sbatch", "--test-only"], stdin=script)
        if done.returncode == 0:
            return ""
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        words = [
            line.removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
            for line in lines
            if "error" in line or "failure" in line
        ]
        return "; ".join(words or lines) or f"sbatch --test-only ended with {done.returncode}"

    def submit(self, script: str, options: Sequence[str]) -> tuple[str, str]:
        """Submit a script.

        Args:
            script: Its path.
            options: Of sbatch.

        Returns:
            The job's id, and its cluster where SLURM names one.

        Raises:
            SlurmError: SLURM refused, or its answer was lost.
        """
        done = self._run(["sbatch", "--parsable", *options, script])
        match = re.search(r"^(\d+)(?:;(\S+))?$", done.stdout, re.MULTILINE)
        if match is None:
            raise SlurmError(_last_line(done) or "sbatch gave no job id")
        return match[1], match[2] or ""

    def find(self, comment: str) -> str:
        """Find a job by its comment.

        Args:
            comment: What it was submitted with.

        Returns:
            Its id; empty if there is none.

        Raises:
            SlurmError: SLURM did not answer.
        """
        answer = self._ask(["squeue", "--noheader", "--me", "--states=all", "--format=%F|%k"])
        pairs = (line.partition("|") for line in answer.splitlines())
        return next((job_id for job_id, _, text in pairs if text == comment), "")

    def states(self, job_id: str, cluster: str = "") -> list[TaskState]:
        """Ask for a job, in the queue and then in the accounting.

        Args:
            job_id: The job's id, or an array's.
            cluster: Where it is, in a federation.

        Returns:
            Its tasks; none if SLURM has forgotten it.

        Raises:
            SlurmError: SLURM did not answer.
        """
        where = [f"--clusters={cluster}"] if cluster else []
        words = ["--noheader", "--array", "--states=all", f"--jobs={job_id}"]
        try:
            answer = self._ask(["squeue", *words, f"--format={_QUEUE_FIELDS}", *where])
        except SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
            answer = ""
        fields = [line.split("|") for line in answer.splitlines() if line.count("|") == 5]
        found = [
            TaskState(_absent(task), state, _absent(reason), _absent(start), nodes)
            for job, task, state, reason, start, nodes in fields
            if job == job_id
        ]
        return found or self._from_accounting(job_id, where)

    def _from_accounting(self, job_id: str, where: Sequence[str]) -> list[TaskState]:
        """Ask sacct, which many small clusters have not."""
        if self._program("sacct") is None:
            return []
        words = ["--noheader", "--parsable2", "--allocations", f"--jobs={job_id}"]
        done = self._run(["sacct", *words, f"--format={_ACCOUNTING_FIELDS}", *where])
        if done.returncode != 0:
            return []
        rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
        return [
            # A cancelled job's state names who has done it: CANCELLED by 0.
            TaskState(job.partition("_")[2], state.split()[0], f"exit code {code}")
            for job, state, code in rows
        ]

    def max_array_size(self) -> int | None:
        """Ask how many tasks an array may have; task numbers stay below it.

        Returns:
            MaxArraySize; None if SLURM does not say.
        """
        try:
            answer = self._ask(["scontrol", "show", "config"])
        except SlurmError:
            return None
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer, re.MULTILINE)
        return None if match is None else int(match[1])

    def partitions(self) -> list[str]:
        """Ask for the partitions.

        Returns:
            Their names; none if SLURM does not say.
        """
        try:
            return self._ask(["sinfo", "--noheader", "--format=%R"]).split()
        except SlurmError:
            return []

    def _program(self, name: str) -> str | None:
        return shutil.which(name, path=self.environment.get("PATH"))

    def _ask(self, argv: Sequence[str]) -> str:
        """Run a query, a few times if it fails."""
        done = self._run(argv)
        for _ in range(_TRIES - 1):
            if done.returncode == 0 or not _PASSING.search(done.stderr):
                break
            time.sleep(_WAIT_SECONDS)
            done = self._run(argv)
        if done.returncode != 0:
            raise SlurmError(f"{argv[0]}: {_last_line(done)}")
        return done.stdout

    def _run(
        self, argv: Sequence[str], stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command; one that is missing or hangs is one that failed."""
        program = self._program(argv[0])
        if program is None:
            return subprocess.CompletedProcess(argv, 127, "", f"{argv[0]} is not on this machine")
        try:
            return subprocess.run(
                [program, *argv[1:]],
                input=stdin if stdin is not None else "",
                env=dict(self.environment),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            said = f"{argv[0]} gave no answer within {TIMEOUT_SECONDS} s"
            return subprocess.CompletedProcess(argv, 124, "", said)


def _absent(word: str) -> str:
    """SLURM's words for nothing."""
    return "" if word in ("N/A", "None", "(null)") else word


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1].removeprefix("sbatch: error: ") if lines else ""
