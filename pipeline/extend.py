"""More steps for a run, in its folder or in a new one that branches off at an older commit.

    plan_extension    reads and verifies, changes nothing: the new configuration, and the learning
                      rates before and after it
    apply_extension   writes RUN/config.extended.json, which repeats the run with the new schedule;
                      for a branch the new folder is made first, whole or not at all

    NEW_RUN/checkpoints/step-00000080/    the commit, copied and read back
    NEW_RUN/metrics.jsonl                 the rows up to it
    NEW_RUN/skipped_data.jsonl            what roll-backs have left out, where there were any
    NEW_RUN/restarts.jsonl, state.json    where it comes from

Completed steps keep their learning rates (`pipeline.schedule`), so that the extended run resumes
like any other: nothing has to be accepted, and the same command goes on after every stop.
"""

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import CorruptError, UserError
from pipeline.commit import Commit, list_commits, sha256_of, verify_commit
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config, resolved_config_dict
from pipeline.config_schedule import ExtensionSection, ScheduleSection
from pipeline.ds_config import load_deepspeed_config
from pipeline.rate_table import RateRow, rate_table
from pipeline.run_folder import RunFolder, fsync_file, fsync_folder, to_json, write_durably
from pipeline.runtime import job_id
from pipeline.schedule import learning_rate_factor
from pipeline.skip_list import FILE_NAME as SKIP_FILE

CONFIG_NAME = "config.extended.json"
Decay = Literal["continue", "restart"]


@dataclass(frozen=True)
class ExtendOptions:
    """What the user asks for."""

    max_steps: int
    """Optimizer steps of the extended run, those that are done included."""
    decay: Decay = "continue"
    """From the present learning rate on, or after another warm-up."""
    peak_factor: float = 1.0
    """Share of the peak rates that `restart` warms up to."""
    warmup_steps: int | None = None
    """Of `restart`; None takes the run's own, at most a tenth of the new steps."""
    from_step: int | None = None
    """Commit to go on from; None is the newest that is whole."""
    output: Path | None = None
    """New run folder; None extends the run in its own."""


@dataclass(frozen=True)
class Extension:
    """A run that could go on."""

    run: Path
    commit: Commit
    old: RunConfig
    new: RunConfig
    document: dict[str, Any]
    """Of `config.extended.json`."""
    world_size: int
    rows: list[RateRow]
    notes: list[str]

    @property
    def folder(self) -> Path:
        """Where the extended run trains."""
        return Path(self.new.run.folder)

    @property
    def is_branch(self) -> bool:
        """Whether it trains in a folder of its own."""
        return self.folder != self.run

    @property
    def command(self) -> str:
        """The command that trains it in the world that the commit came from."""
        config = str(self.folder / CONFIG_NAME)
        start = ["deberta", "train"]
        if self.world_size > 1:
            start = ["torchrun", "--nproc_per_node", str(self.world_size), "-m", "pipeline.train"]
        return shlex.join([*start, "--config", config, "--deepspeed_config", config])


def plan_extension(run: Path, options: ExtendOptions) -> Extension:
    """Work out an extension without changing anything.

    Args:
        run: Run folder.
        options: What is asked for.

    Returns:
        The plan.

    Raises:
        UserError: There is no such commit, or no such schedule.
        CorruptError: The commit is not as it was written.
    """
    commit, notes = _choose_commit(run, options)
    resolved = str(commit.path / "config.resolved.json")
    old, ds = load_run_config(resolved), load_deepspeed_config(resolved)
    folder = run if options.output is None else options.output
    if options.output is not None:
        _check_output(run, options.output)
    if options.max_steps <= commit.step:
        raise UserError(
            f"--max-steps {options.max_steps}: {commit.path} has {commit.step} steps already; give "
            "more, those that are done included"
        )
    rows = [*old.schedule.extensions, _extension(old.schedule, commit.step, options)]
    words = [
        f"schedule.extensions=[{', '.join(map(_toml, rows))}]",
        f"schedule.max_steps={options.max_steps}",
        f"run.folder={folder}",
    ]
    new = load_run_config(resolved, words)
    world_size = commit.read_json("train_state.json")["identity"]["world_size"]
    return Extension(
        run,
        commit,
        old,
        new,
        resolved_config_dict(new, ds, ds.batch_plan(world_size)),
        world_size,
        rate_table(old, new, commit.step),
        notes,
    )


def _choose_commit(run: Path, options: ExtendOptions) -> tuple[Commit, list[str]]:
    """Find and verify the commit to go on from; names damaged ones that were passed over."""
    commits = list_commits(run / "checkpoints")
    if not commits:
        raise UserError(f"{run}: no run with a checkpoint; name a run folder")
    step, notes = options.from_step, []
    if step is not None:
        chosen = [commit for commit in commits if commit.step == step]
        if not chosen:
            there = ", ".join(str(commit.step) for commit in commits)
            raise UserError(f"--from-step {step}: {run} has no such checkpoint; there are {there}")
        if options.output is None and step != commits[-1].step:
            raise UserError(
                f"--from-step {step}: {run} has newer checkpoints, up to step {commits[-1].step}, "
                "which stay as they are; name a folder for the branch with --output NEW_RUN"
            )
        verify_commit(chosen[0])
        return chosen[0], notes
    for commit in reversed(commits):
        try:
            verify_commit(commit)
            return commit, notes
        except CorruptError as error:
            notes.append(f"passed over: {error}")
    raise CorruptError(f"{run}: no checkpoint is whole:\n  " + "\n  ".join(notes))


def _check_output(run: Path, output: Path) -> None:
    if output.resolve() == run.resolve():
        raise UserError(f"--output {output} is the run itself; leave --output out to extend it")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} is not empty; name a new folder")


def _extension(schedule: ScheduleSection, step: int, options: ExtendOptions) -> ExtensionSection:
    """Describe the extension as the schedule stores it."""
    if options.decay == "restart":
        warmup_steps = options.warmup_steps
        if warmup_steps is None:
            warmup_steps = min(schedule.warmup_steps, (options.max_steps - step) // 10)
        return ExtensionSection.model_construct(
            from_step=step,
            previous_max_steps=schedule.max_steps,
            peak_factor=options.peak_factor,
            warmup_steps=warmup_steps,
        )
    if options.warmup_steps is not None:
        raise UserError("--warmup-steps belongs to --decay restart; leave it out")
    if learning_rate_factor(step, schedule) == 0.0:
        raise UserError(
            f"--decay continue: the learning rate has come down to 0 at step {step}, and nothing "
            "would be learned; take --decay restart, or an older checkpoint with --from-step and "
            "--output, or stretch the whole decay with `deberta train ... schedule.max_steps="
            f"{options.max_steps} --accept-config-change`"
        )
    return ExtensionSection(from_step=step, previous_max_steps=schedule.max_steps)


def _toml(row: ExtensionSection) -> str:
    """Write an extension as a word of the command line has it."""
    values = {key: value for key, value in row if value is not None}
    return "{" + ", ".join(f"{key} = {value}" for key, value in values.items()) + "}"


def apply_extension(extension: Extension) -> None:
    """Write the new configuration, into the run's folder or into a new one.

    Args:
        extension: The plan.

    Raises:
        UserError: Somebody trains in the folder, or there is no room for a branch.
        CorruptError: The copy of the commit is not what was read; nothing is left of it.
    """
    if extension.is_branch:
        _branch(extension)
        return
    folder = RunFolder(extension.run)
    folder.acquire(job_id())
    try:
        write_durably(extension.run / CONFIG_NAME, to_json(extension.document))
    except OSError as error:
        raise UserError(f"{extension.run / CONFIG_NAME}: cannot be written ({error})") from error
    finally:
        folder.release()


def _branch(extension: Extension) -> None:
    """Make the new folder under another name, and give it its own when all is on the disk."""
    folder = extension.folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a branch that was interrupted
        partial.mkdir(parents=True)
        _check_room(extension, partial)
        _fill(extension, RunFolder(partial))
        partial.rename(folder)
        fsync_folder(folder.absolute().parent)
    except OSError as error:
        raise UserError(
            f"--output {folder}: the branch could not be written ({error}); {extension.run} is as "
            "it was, and nothing is left behind"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(extension: Extension, partial: Path) -> None:
    needed = sum(path.stat().st_size for path in _files(extension.commit.path))
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"--output {extension.folder}: the checkpoint takes {needed:,} bytes, and {free:,} are "
            "free there; make room, or name a folder elsewhere"
        )


def _fill(extension: Extension, new: RunFolder) -> None:
    """Write everything that a branch begins with."""
    commit, run = extension.commit, extension.run
    copy = Commit(new.checkpoints / commit.path.name, commit.step)
    shutil.copytree(commit.path, copy.path)
    verify_commit(copy)
    for path in _files(copy.path):
        fsync_file(path)
    for path in (*(p for p in copy.path.iterdir() if p.is_dir()), copy.path, new.checkpoints):
        fsync_folder(path)
    write_durably(new.checkpoints / "latest", copy.path.name + "\n")
    for name in ("metrics.jsonl", SKIP_FILE):
        if (run / name).exists():
            shutil.copyfile(run / name, new.path / name)
            fsync_file(new.path / name)
    state = copy.read_json("train_state.json")["state"]
    new.cut_metrics(commit.step, owes_evaluation=state.get("owes_evaluation", False))
    origin = f"branched from {commit.path}"
    seal = sha256_of(copy.path / "manifest.json")
    new.note_restart(
        commit.step, extension.world_size, [f"{origin}, whose manifest has the sha256 {seal}"]
    )
    new.write_status("stopped", commit.step, origin)
    write_durably(new.path / CONFIG_NAME, to_json(extension.document))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
