"""Submitting a chain: files, then one job after the other, each written down as SLURM takes it."""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from data_prep.errors import UserError
from pipeline.run_folder import write_durably
from pipeline.submit.client import Slurm, SlurmError
from pipeline.submit.record import Record, SubmittedJob
from pipeline.submit.stages import Job

_LOCK_NAME = "submit.lock"


@dataclass(frozen=True)
class Chain:
    """What is to be submitted.

    Attributes:
        recipe: File that it was made from.
        folder: RUN/slurm.
        scripts: Folder of the plain scripts.
        jobs: In their order.
        texts: Stage -> script.
        files: Stage -> name -> text: what its job reads beside the script.
    """

    recipe: Path
    folder: Path
    scripts: Path
    jobs: Sequence[Job]
    texts: Mapping[str, str]
    files: Mapping[str, Mapping[str, str]]


def submit_chain(
    chain: Chain, slurm: Slurm, *, resubmit: bool, say: Callable[[str], None]
) -> list[SubmittedJob]:
    """Submit the stages that are not done.

    Args:
        chain: The chain.
        slurm: SLURM's commands.
        resubmit: Earlier jobs of this run may be in the queue; submit what has none.
        say: Gets a line for every stage.

    Returns:
        The jobs that were submitted.

    Raises:
        UserError: Jobs of the run are in the queue, or SLURM refused one.
    """
    (chain.folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(chain.folder / _LOCK_NAME, timeout=0):
            return _submit(chain, slurm, resubmit, say)
    except Timeout:
        raise UserError(
            f"{chain.folder}: another `deberta submit` is at work; wait for it"
        ) from None


def live_jobs(record: Record, slurm: Slurm) -> dict[str, SubmittedJob]:
    """Find the jobs of a record that may still do something.

    Args:
        record: The record.
        slurm: SLURM's commands.

    Returns:
        Stage -> job.

    Raises:
        UserError: A task of an array has failed while others go on; or SLURM does not answer.
    """
    live = {}
    for stage, job in record.newest().items():
        tasks = slurm.states(job.job_id, job.cluster)
        if not any(task.is_live for task in tasks):
            continue
        if failed := [task.task for task in tasks if task.is_failed]:
            raise UserError(
                f"{stage}: tasks {', '.join(failed)} of array {job.job_id} have failed, and others "
                f"are at work; wait for them or `scancel {job.job_id}`, then --resubmit"
            )
        live[stage] = job
    return live


def _submit(
    chain: Chain, slurm: Slurm, resubmit: bool, say: Callable[[str], None]
) -> list[SubmittedJob]:
    record = Record.load(chain.folder)
    _find_lost(record, slurm, say)
    live = live_jobs(record, slurm)
    if live and not resubmit:
        jobs = ", ".join(f"{stage} {job.job_id}" for stage, job in live.items())
        ids = " ".join(job.job_id for job in live.values())
        raise UserError(
            f"{chain.folder}: jobs of this run are in the queue: {jobs}; --resubmit submits the "
            f"stages that are neither done nor in the queue, `scancel {ids}` ends these"
        )
    record.recipe = str(chain.recipe.absolute())
    _write_shared_files(chain, keep=bool(live))
    submitted, before = [], ""
    for job in chain.jobs:
        if job.stage in live:
            before = live[job.stage].job_id
            say(f"{job.stage}: job {before} is in the queue")
        elif job.is_done():
            say(f"{job.stage}: done, {job.results[0]} is there")
        else:
            submitted.append(_submit_job(chain, job, before, record, slurm))
            before = submitted[-1].job_id
            say(f"{job.stage}: job {before}" + _after_words(submitted[-1]))
    return submitted


def _submit_job(chain: Chain, job: Job, before: str, record: Record, slurm: Slurm) -> SubmittedJob:
    """Write a job's files and submit it."""
    for name, text in chain.files.get(job.stage, {}).items():
        write_durably(chain.folder / name, text)
    script = chain.folder / f"{job.stage}.sbatch"
    write_durably(script, chain.texts[job.stage])
    comment = f"deberta:{uuid.uuid4().hex[:16]}:{job.stage}"
    options = [f"--comment={comment}"]
    if before:
        # Without the second, what waits for a failed job waits for ever.
        options += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
    record.begin(job.stage, comment, before, job.array_tasks)
    try:
        return record.submitted(*slurm.submit(str(script), options))
    except SlurmError as error:
        # The answer may have been lost on its way, and the job be there.
        if job_id := slurm.find(comment):
            return record.submitted(job_id)
        record.refused()
        ids = [each.job_id for each in record.newest().values() if each.job_id]
        cure = f"; submitted so far: {', '.join(ids)}" if before else ""
        raise UserError(
            f"{job.stage}: SLURM refused {script}: {error}{cure}; mend the recipe, then "
            "`deberta submit --resubmit`"
        ) from error


def _find_lost(record: Record, slurm: Slurm, say: Callable[[str], None]) -> None:
    """Find a job whose number nobody has written down."""
    if not record.submitting:
        return
    stage = record.submitting["stage"]
    if job_id := slurm.find(record.submitting["comment"]):
        record.submitted(job_id)
        say(f"{stage}: job {job_id} had been submitted before its number was written down")
    else:
        record.refused()


def _write_shared_files(chain: Chain, *, keep: bool) -> None:
    """Copy what the scripts source; files that jobs in the queue may read stay as they are."""
    for path in sorted([*chain.scripts.glob("*.sh"), *chain.scripts.glob("*.env")]):
        target = chain.folder / path.name
        if path.name == "site.env" or (keep and target.exists()):
            continue
        write_durably(target, path.read_text(encoding="utf-8"))
        shutil.copymode(path, target)
    write_durably(chain.folder / "recipe.toml", chain.recipe.read_text(encoding="utf-8"))


def _after_words(job: SubmittedJob) -> str:
    tasks = f", {job.array_tasks} tasks" if job.array_tasks else ""
    return f"{tasks}, after {job.after}" if job.after else tasks
