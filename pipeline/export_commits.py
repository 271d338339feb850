"""Which commits an export is made of: one, the newest ones, or those of some steps."""

import logging
from collections.abc import Collection
from pathlib import Path

from data_prep.errors import CorruptError, UserError
from pipeline.commit import Commit, list_commits, read_manifest, verify_commit

logger = logging.getLogger(__name__)


def find_commit(run_or_commit: Path) -> Commit:
    """Find and verify the commit that a path means.

    Args:
        run_or_commit: A run folder, its checkpoints folder, or one commit.

    Returns:
        The commit; of a run the newest one whose every byte is as written, and what was passed
        over is named in the log.

    Raises:
        UserError: There is no commit.
        CorruptError: The commit that is named, or every commit of the run, is damaged.
    """
    path = run_or_commit
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder or one of its checkpoints")
    if (path / "manifest.json").is_file() or (path / "train_state.json").is_file():
        commit = Commit(path, 0)
        verify_commit(commit)
        return Commit(path, int(read_manifest(commit)["step"]))
    commits = list_commits(path / "checkpoints") or list_commits(path)
    if not commits:
        raise UserError(
            f"{path}: neither a run folder with a checkpoint nor a checkpoint; a run's first is "
            "written after checkpoint.interval_steps"
        )
    problems = []
    for commit in reversed(commits):
        try:
            verify_commit(commit)
        except CorruptError as error:
            logger.warning("%s; the checkpoint before it is used", error)
            problems.append(str(error))
        else:
            return commit
    raise CorruptError("no checkpoint is whole:\n  " + "\n  ".join(problems))


def find_newest_commits(run: Path, count: int) -> list[Commit]:
    """Find and verify the newest commits of a run, to average them.

    Args:
        run: A run folder, or its checkpoints folder.
        count: How many, at least 1.

    Returns:
        The commits, the newest first; damaged ones are passed over and named in the log.

    Raises:
        UserError: There are not so many.
    """
    found: list[Commit] = []
    for commit in reversed(list_commits(run / "checkpoints") or list_commits(run)):
        try:
            verify_commit(commit)
        except CorruptError as error:
            logger.warning("%s; the checkpoint before it is used", error)
        else:
            found.append(commit)
        if len(found) == count:
            return found
    raise UserError(
        f"{run}: has {len(found)} whole checkpoints, and {count} are to be averaged: name a run "
        "folder with as many (checkpoint.keep_last, checkpoint.milestone_interval_steps), or "
        "average fewer"
    )


def find_step_commits(run: Path, steps: Collection[int] | None) -> list[Commit]:
    """Find and verify the commits of some steps.

    Args:
        run: A run folder, or its checkpoints folder.
        steps: Optimizer steps; all that are whole where None.

    Returns:
        The commits, oldest first; with None damaged ones are passed over and named in the log.

    Raises:
        UserError: There is none of a step.
        CorruptError: One that is named is damaged.
    """
    commits = {each.step: each for each in list_commits(run / "checkpoints") or list_commits(run)}
    if missing := sorted(set(steps or ()) - commits.keys()):
        there = ", ".join(map(str, commits)) or "none"
        raise UserError(
            f"{run}: no checkpoint after {', '.join(map(str, missing))} steps; there are: {there} "
            "(checkpoint.milestone_interval_steps keeps them)"
        )
    found = []
    for step in sorted(commits if steps is None else set(steps)):
        try:
            verify_commit(commits[step])
        except CorruptError as error:
            if steps is not None:
                raise
            logger.warning("%s; the checkpoint is left out", error)
        else:
            found.append(commits[step])
    return found
