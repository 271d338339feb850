"""What SLURM says about a task of an array, and which share of the units that makes its own.

    ArrayTask.from_environment   this task
    ArrayTask.divide             among whom the units are divided

A task does every n-th unit, so a share depends on the numbers of the array alone. The division is
kept with the work, so that `sbatch --array=3,7` after `--array=0-7` means those two shares again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.errors import UserError

_EXAMPLE = "sbatch --array=0-7 --wrap 'deberta-prep build ... --executor slurm-array'"


@dataclass(frozen=True)
class Division:
    """Which tasks share the units: `count` of them, numbered `first`, `first + step`, ..."""

    first: int
    step: int
    count: int

    def share_of(self, task_id: int) -> int | None:
        """The share of a task, from 0; None if it has none."""
        share, rest = divmod(task_id - self.first, self.step)
        return share if not rest and 0 <= share < self.count else None

    def task_id(self, share: int) -> int:
        """The task of a share."""
        return self.first + share * self.step

    def __str__(self) -> str:
        step = f":{self.step}" if self.step > 1 else ""
        return f"{self.first}-{self.task_id(self.count - 1)}{step}"


@dataclass(frozen=True)
class ArrayTask:
    """What SLURM says about this task of an array.

    Args:
        task_id: its number.
        smallest: smallest number in the array.
        largest: largest number in the array.
        step: step between the numbers.
        count: tasks in the array.
        job_id: number of the array's job; empty if unknown.
    """

    task_id: int
    smallest: int
    largest: int
    step: int
    count: int
    job_id: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ArrayTask":
        """Read SLURM's variables; without those of the range, tasks count from 0.

        Args:
            environment: the variables of this process.

        Returns:
            The task.

        Raises:
            UserError: this is no array task, or not one process of one.
        """
        if "SLURM_ARRAY_TASK_ID" not in environment:
            raise UserError(
                f"--executor slurm-array works inside the tasks of a SLURM array, and "
                f"SLURM_ARRAY_TASK_ID is not set. Submit it as one, for example\n  {_EXAMPLE}\n"
                f"or build here with --executor processes --workers N"
            )

        def number(name: str, default: int | None = None) -> int:
            value = environment.get(f"SLURM_ARRAY_TASK_{name}", default)
            try:
                return int(str(value))
            except ValueError:
                raise UserError(
                    f"SLURM_ARRAY_TASK_{name}={value} is not a number; start the task by "
                    f"sbatch, for example\n  {_EXAMPLE}"
                ) from None

        task_id, count = number("ID"), number("COUNT")
        step = number("STEP", 1)
        smallest = number("MIN", 0)
        largest = number("MAX", smallest + (count - 1) * step)
        if step < 1 or count < 1 or not smallest <= task_id <= largest:
            raise UserError(
                f"SLURM_ARRAY_TASK_ID={task_id} is not one of {count} tasks from {smallest} to "
                f"{largest} in steps of {step}; start the task by sbatch, for example\n  {_EXAMPLE}"
            )
        processes = environment.get("SLURM_STEP_NUM_TASKS", "1")
        if "SLURM_PROCID" in environment and processes != "1":
            raise UserError(
                f"{processes} processes of one array task would all do its share; ask for one "
                f"with --ntasks=1 and give it --cpus-per-task=N and --workers N"
            )
        job_id = environment.get("SLURM_ARRAY_JOB_ID", "")
        return cls(task_id, smallest, largest, step, count, job_id)

    @property
    def name(self) -> str:
        """Job and task as SLURM writes them."""
        return f"{self.job_id or 'array'}_{self.task_id}"

    def divide(self, kept: Division | None) -> Division:
        """Find the division that this task belongs to.

        Args:
            kept: that of the tasks before; None if this is the first.

        Returns:
            The kept one where this array names some of its tasks; else that of this array.

        Raises:
            UserError: the array has gaps, so that its shares are not known.
        """
        if kept is not None and None not in map(
            kept.share_of, (self.task_id, self.smallest, self.largest)
        ):
            return kept
        mine = Division(self.smallest, self.step, self.count)
        if mine.task_id(self.count - 1) != self.largest or mine.share_of(self.task_id) is None:
            known = f"; this build was divided among the tasks {kept}" if kept else ""
            raise UserError(
                f"the array of {self.count} tasks between {self.smallest} and {self.largest} has "
                f"gaps, so that nobody would do some of the shares{known}. Give a range, for "
                f"example --array=0-{self.count - 1}"
            )
        return mine
