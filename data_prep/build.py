"""`deberta-prep build`: sources -> dataset, the same bytes for any number of workers and kills.

    1 plan       sources -> units; a function of the input alone           OUTPUT/.work/plan.json
    2 units      workers make the shards of each unit, and its mark        OUTPUT/.work/unit-000012
    3 assembly   shards are numbered in unit order; the manifest is last    OUTPUT/

Run again after any interruption, a build repeats the plan, refuses to go on if it differs from the
stored one, skips the units whose mark fits, and assembles. The work folder is removed at the end.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data_prep.build_plan import BuildOptions
from data_prep.build_steps import BuildReport, PlannedBuild, plan_build
from data_prep.documents import Unit
from data_prep.errors import UserError
from data_prep.executors import Executor
from data_prep.manifest import is_complete
from data_prep.partial_folders import remove_abandoned
from data_prep.unit_work import UnitDone, build_unit
from data_prep.work_folder import build_lock, open_work_folder

MAX_MALFORMED = 0.1
"""Share of malformed inputs above which a build stops unless more is allowed."""

OnUnits = Callable[[list[Unit]], None]
OnUnitDone = Callable[[UnitDone], None]


def build(
    sources: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: BuildOptions,
    executor: Executor,
    on_units: OnUnits = lambda units: None,
    on_unit_done: OnUnitDone = lambda done: None,
    max_malformed: float = MAX_MALFORMED,
) -> BuildReport:
    """Build a dataset, or go on with a build that was interrupted.

    Args:
        sources: files, folders or globs, as the user named them; these names go into the manifest.
        tokenizer: tokenizer folder or model file.
        output: the dataset folder.
        options: everything else that determines the bytes.
        executor: where the units are worked on.
        on_units: told the plan before the work begins.
        on_unit_done: told each finished unit.
        max_malformed: share of malformed inputs above which nothing is published, in [0, 1].

    Returns:
        The report. A dataset that is complete already, from the same input, is left as it is.

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
        with build_lock(work, output):
            if not is_complete(output):
                report = _run(planned, work, executor, on_units, on_unit_done, workers)
    except (UserError, OSError):
        # Array tasks may have finished the dataset meanwhile, and taken the work folder away.
        if not is_complete(output):
            raise
    # Only now: NFS keeps a folder alive in which a file, such as our lock, is open.
    shutil.rmtree(work, ignore_errors=True)
    return report or planned.complete_report(workers)


def _run(
    planned: PlannedBuild,
    work: Path,
    executor: Executor,
    on_units: OnUnits,
    on_unit_done: OnUnitDone,
    workers: Counter[str],
) -> BuildReport:
    job = planned.start(work)
    remove_abandoned(work)
    on_units(planned.units)
    for done in executor.run(partial(build_unit, job), planned.units):
        workers[done.worker] += 1
        on_unit_done(done)
    return planned.finish(job, workers)
