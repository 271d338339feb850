"""RUN/slurm/jobs.json: which job does which stage; replaced after every sbatch.

Before a job is submitted, its comment is written down: if this process ends before it has heard the
job's id, the job is found by it.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.run_folder import to_json, write_durably

RECORD_NAME = "jobs.json"
_FORMAT = 1


@dataclass(frozen=True)
class SubmittedJob:
    """A job that SLURM took.

    Attributes:
        stage: Its place in the chain.
        job_id: SLURM's number.
        cluster: Where SLURM named one; else empty.
        after: Number of the job that it waits for; empty if there is none.
        array_tasks: Tasks; None if it is no array.
        unix_seconds: When it was submitted.
    """

    stage: str
    job_id: str
    cluster: str
    after: str
    array_tasks: int | None
    unix_seconds: float


@dataclass
class Record:
    """The jobs of a run.

    Attributes:
        folder: RUN/slurm.
        recipe: File that the chain was made from.
        jobs: In the order of their submission; a later one of a stage replaces an earlier one.
        submitting: What is on its way to SLURM: stage, comment, after, array_tasks; empty if
            nothing is.
    """

    folder: Path
    recipe: str = ""
    jobs: list[SubmittedJob] = field(default_factory=list)
    submitting: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Read the record of a run; an empty one if there is none.

        Args:
            folder: RUN/slurm.

        Returns:
            The record.

        Raises:
            UserError: The file is not one of ours.
        """
        path = folder / RECORD_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']}")
            jobs = [SubmittedJob(**each) for each in values["jobs"]]
            return cls(folder, str(values["recipe"]), jobs, dict(values["submitting"]))
        except FileNotFoundError:
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); look with squeue which jobs of the run are in "
                "the queue, end them, remove the file, and submit again"
            ) from error

    def save(self) -> None:
        """Replace the file."""
        values = {
            "format": _FORMAT,
            "recipe": self.recipe,
            "jobs": [asdict(job) for job in self.jobs],
            "submitting": self.submitting,
        }
        write_durably(self.folder / RECORD_NAME, to_json(values))

    def begin(self, stage: str, comment: str, after: str, array_tasks: int | None) -> None:
        """Write down that a job is about to be submitted.

        Args:
            stage: Its stage.
            comment: What it can be found by.
            after: Number of the job that it waits for.
            array_tasks: Tasks of an array.
        """
        self.submitting = {
            "stage": stage,
            "comment": comment,
            "after": after,
            "array_tasks": array_tasks,
        }
        self.save()

    def submitted(self, job_id: str, cluster: str = "") -> SubmittedJob:
        """Write down what SLURM answered.

        Args:
            job_id: SLURM's number.
            cluster: Where it named one.

        Returns:
            The job that was on its way.
        """
        way = self.submitting
        job = SubmittedJob(
            way["stage"], job_id, cluster, way["after"], way["array_tasks"], time.time()
        )
        self.jobs.append(job)
        self.submitting = {}
        self.save()
        return job

    def refused(self) -> None:
        """Write down that nothing is on its way."""
        self.submitting = {}
        self.save()

    def newest(self) -> dict[str, SubmittedJob]:
        """Give the job that counts for each stage.

        Returns:
            Stage -> its last job, in the order of the chain.
        """
        return {job.stage: job for job in self.jobs}
