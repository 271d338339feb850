"""One SLURM array task's part of a build: its share of the units, and perhaps the assembly.

    sbatch --array=0-63 --wrap "deberta-prep build corpus ... --executor slurm-array"

Each task plans the same units, does its share and looks whether all are there. Whoever finds them
all makes the dataset: the last task, the same tasks submitted again, or a build with another
executor, which also does what is missing. Tasks need not run at the same time, take no lock, and
may be killed, requeued or started twice.
"""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.array_tasks import ArrayTask
from data_prep.build import MAX_MALFORMED, OnUnitDone, OnUnits
from data_prep.build_plan import BuildOptions
from data_prep.build_steps import BuildReport, PlannedBuild, plan_build
from data_prep.errors import UserError
from data_prep.executors import Executor
from data_prep.manifest import is_complete
from data_prep.partial_folders import remove_abandoned
from data_prep.shares import Shares
from data_prep.unit_work import build_unit, unit_folder_name
from data_prep.work_folder import open_work_folder


@dataclass(frozen=True)
class ShareReport:
    """What an array task did that left others something to do.

    Args:
        folder: the folder that will be the dataset.
        task: job and number of the task.
        made_units: units that it made.
        resumed_units: units of its share that were there before.
        finished_units: units of all shares that are finished.
        num_units: units of the build.
        unfinished: one line for each task that has something left to do.
        seconds: time that this run took.
    """

    folder: Path
    task: str
    made_units: int
    resumed_units: int
    finished_units: int
    num_units: int
    unfinished: tuple[str, ...]
    seconds: float


def build_share(
    sources: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: BuildOptions,
    executor: Executor,
    task: ArrayTask,
    on_units: OnUnits = lambda units: None,
    on_unit_done: OnUnitDone = lambda done: None,
    max_malformed: float = MAX_MALFORMED,
) -> BuildReport | ShareReport:
    """Do one task's share of a build, and make the dataset if nothing else is left to do.

    Args:
        sources: files, folders or globs; the same for all tasks, as is what follows.
        tokenizer: tokenizer folder or model file.
        output: the dataset folder, on a file system that all tasks see.
        options: everything else that determines the bytes.
        executor: where the units of the share are worked on.
        task: this task.
        on_units: told the units of the share before the work begins.
        on_unit_done: told each finished unit.
        max_malformed: share of malformed inputs above which nothing is published, in [0, 1].

    Returns:
        The report of the dataset, or of the share where others have something left to do.

    Raises:
        UserError: bad input, too much of it malformed, another build in the folder, a full disk.
        CorruptError: the output is a dataset whose manifest was changed.
    """
    planned = plan_build(sources, tokenizer, output, options, max_malformed)
    if planned.is_complete:
        return planned.complete_report({})
    work, report = open_work_folder(output), None
    workers: Counter[str] = Counter()
    try:
        if not is_complete(output):
            report = _run_share(planned, work, executor, task, on_units, on_unit_done, workers)
    except (UserError, OSError):
        # Another process may have finished the dataset meanwhile, and taken the work folder away.
        if not is_complete(output):
            raise
    if isinstance(report, ShareReport) and not is_complete(output):
        return report
    shutil.rmtree(work, ignore_errors=True)
    return report if isinstance(report, BuildReport) else planned.complete_report(workers)


def _run_share(
    planned: PlannedBuild,
    work: Path,
    executor: Executor,
    task: ArrayTask,
    on_units: OnUnits,
    on_unit_done: OnUnitDone,
    workers: Counter[str],
) -> BuildReport | ShareReport:
    shares = Shares.join(work, task)
    shares.began()
    try:
        job = planned.start(work)
        units = shares.of_this_task(planned.units)
        remove_abandoned(work, {unit_folder_name(unit.index) for unit in units})
        on_units(units)
        for done in executor.run(partial(build_unit, job), units):
            workers[done.worker] += 1
            shares.lives()
            on_unit_done(done)
    except Exception as error:
        with contextlib.suppress(UserError):  # most often the disk is full
            shares.failed(error)
        raise
    shares.finished()
    unfinished = planned.unfinished(work)
    if not unfinished:
        return planned.finish(job, workers)
    return ShareReport(
        folder=planned.output,
        task=task.name,
        made_units=workers.total() - workers[""],
        resumed_units=workers[""],
        finished_units=len(planned.units) - len(unfinished),
        num_units=len(planned.units),
        unfinished=tuple(shares.describe_unfinished(unfinished)),
        seconds=time.monotonic() - planned.began,
    )
