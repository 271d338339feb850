"""One SLURM array task's part of a deduplication: its share of the units, and perhaps the rest.

    sbatch --array=0-63 --wrap "deberta-prep dedup corpus ... --executor slurm-array"

Reading and hashing the units is most of the work, and is divided as in `array_build`. Whoever finds
all units sketched does the other steps, with its own processes: the last task, or the same command
with another executor.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_prep.array_build import ShareReport
from data_prep.array_tasks import ArrayTask
from data_prep.dedup import DedupOptions, DedupReport, PlannedDedup, plan_dedup, run_steps
from data_prep.dedup_decisions import SEAL_NAME
from data_prep.dedup_files import sketch_name
from data_prep.dedup_sketch import sketch_unit
from data_prep.dedup_steps import OnStep
from data_prep.errors import UserError
from data_prep.executors import Executor
from data_prep.partial_folders import remove_abandoned
from data_prep.shares import Shares
from data_prep.work_folder import BusyError


def deduplicate_share(
    sources: Sequence[str],
    output: Path,
    options: DedupOptions,
    executor: Executor,
    task: ArrayTask,
    on_step: OnStep = lambda step, done, total: None,
) -> DedupReport | ShareReport:
    """Do one task's share of a deduplication, and the rest if nothing else is left to do.

    Args:
        sources: files, folders or globs; the same for all tasks, as is what follows.
        output: the folder of decisions, on a file system that all tasks see.
        options: everything else that determines the decisions.
        executor: where the work of this task runs.
        task: this task.
        on_step: told the name of a step, how many of its items are done, and how many there are.

    Returns:
        The report of the decisions, or of the share where others have something left to do.

    Raises:
        UserError: bad input, no document left, a full disk.
        CorruptError: the output holds decisions that were changed.
    """
    planned = plan_dedup(sources, output, options)
    if planned.is_complete:
        return planned.complete_report()
    try:
        report = _sketch_share(planned, executor, task, on_step)
        if report.finished_units < report.num_units:
            return report
        try:
            return run_steps(planned, executor, on_step)
        except BusyError as error:
            return replace(report, unfinished=(str(error),))
    except (UserError, OSError):
        # Another task may have finished the decisions meanwhile, and taken the work folder away.
        if not (output / SEAL_NAME).is_file():
            raise
        return planned.complete_report()


def _sketch_share(
    planned: PlannedDedup, executor: Executor, task: ArrayTask, on_step: OnStep
) -> ShareReport:
    job = planned.start()
    shares = Shares.join(planned.work, task)
    shares.began()
    units = shares.of_this_task(planned.units)
    names = {sketch_name(unit.index) for unit in units}
    remove_abandoned(planned.work, names)
    resumed = sum((planned.work / name).is_dir() for name in names)
    try:
        for done, _ in enumerate(executor.run(partial(sketch_unit, job), units), start=1):
            shares.lives()
            on_step("sketch", done, len(units))
    except Exception as error:
        with contextlib.suppress(UserError):  # most often the disk is full
            shares.failed(error)
        raise
    shares.finished()
    finished = {path.name for path in planned.work.iterdir()}
    left = [unit for unit in planned.units if sketch_name(unit.index) not in finished]
    return ShareReport(
        folder=planned.output,
        task=task.name,
        made_units=len(units) - resumed,
        resumed_units=resumed,
        finished_units=len(planned.units) - len(left),
        num_units=len(planned.units),
        unfinished=tuple(shares.describe_unfinished(left)),
        seconds=time.monotonic() - planned.began,
    )
