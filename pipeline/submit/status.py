"""How a chain and its training stand: from the queue where there is one, and from files.

- `read_status`: everything as plain values, which `--json` prints.
- `status_lines`: the same for people.

Files that may be torn or missing are read as far as they go: a status must never fail because of
what it reports on.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.submit.client import Slurm, SlurmError, TaskState
from pipeline.submit.record import Record, SubmittedJob

_TAIL_BYTES = 1 << 16
_SHOWN_DECISIONS = 6
_RATE = "perf/tokens_per_second"
_STEP_SECONDS = "perf/step_seconds"
_MAX_STEPS = ("run_config", "schedule", "max_steps")


def read_status(run: Path, slurm: Slurm) -> dict[str, Any]:
    """Collect how a run stands.

    Args:
        run: Run folder.
        slurm: SLURM's commands, if this machine has them.

    Returns:
        `run`, `queue` (where the states of jobs come from), `jobs`, `training`, `restarts`.

    Raises:
        UserError: The folder is no run, or its record of jobs cannot be read.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    record = Record.load(run / "slurm")
    state = _read_object(run / "state.json")
    rows = _last_rows(run / "metrics.jsonl")
    if not (record.jobs or state or rows):
        raise UserError(f"{run}: neither a record of jobs nor a training; is it the run folder?")
    queue, jobs = _job_values(record, slurm)
    return {
        "run": str(run),
        "queue": queue,
        "jobs": jobs,
        "training": _training_values(run, state, rows),
        "restarts": _read_rows(run / "slurm" / "restarts.jsonl"),
    }


def _job_values(record: Record, slurm: Slurm) -> tuple[str, list[dict[str, Any]]]:
    """Each stage's job with what SLURM says about it, and whether it says anything."""
    queue = slurm.absence() if record.jobs else ""
    values = []
    for job in record.newest().values():
        tasks: list[TaskState] = []
        if not queue:
            try:
                tasks = slurm.states(job.job_id, job.cluster)
            except SlurmError as error:
                queue = str(error)  # asked once: the others would wait as long
        values.append(_one_job(job, tasks))
    return queue or "asked", values


def _one_job(job: SubmittedJob, tasks: Sequence[TaskState]) -> dict[str, Any]:
    counts = Counter(task.state for task in tasks)
    reasons = [task.reason for task in tasks if task.reason and task.state != "COMPLETED"]
    return {
        "stage": job.stage,
        "job_id": job.job_id,
        "after": job.after,
        "array_tasks": job.array_tasks,
        "submitted_unix_seconds": job.unix_seconds,
        "states": dict(counts),
        "failed_tasks": [task.task for task in tasks if task.is_failed and task.task],
        "reason": reasons[0] if reasons else "",
        "nodes": next((task.nodes for task in tasks if task.nodes), ""),
        "start": next((task.start for task in tasks if task.start), ""),
    }


def _training_values(
    run: Path, state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Step, rate and time left, as the newest rows of metrics.jsonl give them."""
    max_steps = _number(_at(_read_object(run / "config.resolved.json"), *_MAX_STEPS))
    row = next((row for row in reversed(rows) if _number(row.get(_RATE))), {})
    step = max(_number(row.get("step")) or 0, _number(state.get("step")) or 0)
    seconds_a_step = _number(row.get(_STEP_SECONDS))
    left = None
    if seconds_a_step and max_steps and state.get("status") != "done":
        left = max(0.0, (max_steps - step) * seconds_a_step)
    return {
        "status": state.get("status"),
        "reason": state.get("reason", ""),
        "committed_step": int(_number(state.get("step")) or 0),
        "step": int(step),
        "max_steps": None if max_steps is None else int(max_steps),
        "tokens_per_second": _number(row.get(_RATE)),
        "seconds_per_step": seconds_a_step,
        "seconds_left": left,
        "seconds_since_row": _age_seconds(run / "metrics.jsonl"),
    }


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Write a status for people.

    Args:
        status: From `read_status`.

    Returns:
        Lines.
    """
    lines = [f"run {status['run']}"]
    if status["jobs"]:
        if status["queue"] != "asked":
            lines.append(f"queue: not asked: {status['queue']}")
        cells = [_job_cells(job, asked=status["queue"] == "asked") for job in status["jobs"]]
        lines += _table(("stage", "job", "state", "nodes", ""), cells)
    lines += _training_lines(status["training"])
    decisions = status["restarts"]
    if decisions:
        starts = sum(row.get("decision") == "start" for row in decisions)
        lines.append(f"restarts: {max(0, starts - 1)}; the last decisions of the batch script:")
        lines += [f"  {_restart_line(each)}" for each in decisions[-_SHOWN_DECISIONS:]]
    return lines


def _job_cells(job: Mapping[str, Any], *, asked: bool) -> tuple[str, ...]:
    states = job["states"]
    if len(states) == 1 and sum(states.values()) == 1:
        (state,) = states
    elif states:
        state = ", ".join(f"{count} {name}" for name, count in sorted(states.items()))
    else:
        state = "no longer known to SLURM" if asked else "unknown"
    words = [job["reason"]] if job["reason"] else []
    if job["failed_tasks"] and len(states) > 1:
        words.append(f"failed: tasks {', '.join(job['failed_tasks'])}")
    if job["after"] and "PENDING" in states:
        words.append(f"after {job['after']}")
    if job["start"] and "PENDING" in states:
        words.append(f"expected {job['start']}")
    return job["stage"], job["job_id"], state, job["nodes"], "; ".join(words)


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    if training["status"] is None:
        return ["training: not started"]
    total = training["max_steps"]
    of = f" of {total:,} ({training['step'] / total:.1%})" if total else ""
    why = f": {training['reason']}" if training["reason"] else ""
    lines = [
        f"training: {training['status']}{why}",
        f"step: {training['step']:,}{of}, committed {training['committed_step']:,}",
    ]
    if training["tokens_per_second"]:
        age = training["seconds_since_row"]
        lines.append(
            f"rate: {training['tokens_per_second']:,.0f} tokens/s,"
            f" {training['seconds_per_step'] or 0:.3g} s a step, as of {_duration(age or 0)} ago"
        )
    if training["seconds_left"] is not None:
        lines.append(f"left: {_duration(training['seconds_left'])} of training at this rate")
    return lines


def _restart_line(row: Mapping[str, Any]) -> str:
    """One decision of requeue.sh."""
    seconds = _number(row.get("unix_seconds"))
    when = "" if seconds is None else time.strftime("%F %T", time.localtime(seconds))
    step = row.get("step", "?")
    return (
        f"{when} job {row.get('job_id')}, step {step}: {row.get('decision')}: {row.get('reason')}"
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they must be: a pipe and a terminal get the same."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _duration(seconds: float) -> str:
    """A time for people, in its two largest units."""
    for unit, name, smaller, small_name in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // smaller)} {small_name}"
    return f"{seconds:.0f} s"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _at(value: Any, *keys: str) -> Any:
    """What lies at the end of keys, if all of them are there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a .jsonl file."""
    try:
        return _rows(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of metrics.jsonl, which may be long."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            return _rows(file.read().decode("utf-8", errors="replace"))
    except OSError:
        return []


def _rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # a line that is being written, or was cut
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _age_seconds(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
