"""The run folder: who uses it, how the run stands, and every number it has printed.

    runs/NAME/config.resolved.json   the whole configuration; repeats the run
    runs/NAME/environment.json       versions and hardware of the last start
    runs/NAME/state.json             how the run stands: status, step, reason
    runs/NAME/restarts.jsonl         one line a start: when, from which commit
    runs/NAME/metrics.jsonl          one object a logged step, floats in full precision
    runs/NAME/tensorboard/           the same numbers
    runs/NAME/logs/rank-00000.log    one log a rank
    runs/NAME/heartbeats/            one file a rank, while it lives (`pipeline.watchdog`)
    runs/NAME/checkpoints/           commits (`pipeline.checkpoint`)

Files that others read are replaced atomically; `metrics.jsonl` is append-only between resumes.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from data_prep.errors import CorruptError, UserError
from pipeline.run_lock import RunLock


def write_durably(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a power cut, finds the old text or the new.

    Args:
        path: File to replace.
        text: Its new contents.
    """
    # A name of its own: ranks, and threads of a rank, may write state.json at the same time.
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f"{path.name}.{writer}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # left only where writing failed
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable.

    Args:
        folder: The folder whose entries changed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make a file's contents durable.

    Args:
        path: A file that has been written and closed.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def to_json(value: Any) -> str:
    """Serialise with sorted keys, two spaces and a newline at the end.

    Args:
        value: JSON-ready data.

    Returns:
        The text.
    """
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


class RunFolder:
    """One run's folder; only rank 0 writes through it."""

    def __init__(self, path: Path) -> None:
        """Name the folder without touching it.

        Args:
            path: `run.folder` of the configuration.
        """
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.lock = RunLock(path)

    def acquire(self, job_id: str = "") -> str:
        """Create the folder and keep others out for as long as this process lives.

        Args:
            job_id: Of the batch system: a requeued job takes over its own folder at once.

        Returns:
            Whom it was taken over from and why; empty where nobody held it.

        Raises:
            UserError: Another process trains in this folder; the message says which.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            return self.lock.acquire(job_id)
        except OSError as error:
            raise UserError(
                f"run.folder {self.path}: cannot be written ({error.strerror}); choose another "
                "run.folder"
            ) from error

    def release(self) -> None:
        """Let others in."""
        self.lock.release()

    def write_status(self, status: str, step: int | None, reason: str = "") -> None:
        """Replace state.json, which job scripts decide by.

        Args:
            status: running, stopped, done, hang, diverged or corrupt.
            step: Completed optimizer steps that are safe in a commit; None keeps the last one.
            reason: One sentence for people.
        """
        if step is None:
            try:
                step = self.committed_step()
            except CorruptError:  # what is written now replaces it
                step = 0
        value = {"status": status, "step": step, "reason": reason}
        write_durably(self.path / "state.json", to_json(value))

    def committed_step(self) -> int:
        """Read which step was last said to be safe.

        Returns:
            The step in state.json; 0 where nothing was committed yet.

        Raises:
            CorruptError: state.json cannot be read.
        """
        state = self.path / "state.json"
        try:
            return int(json.loads(state.read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptError(
                f"{state}: cannot be read ({error}); remove it, and the newest checkpoint in "
                f"{self.checkpoints} is used"
            ) from error

    def note_restart(self, step: int, world_size: int, notes: list[str]) -> None:
        """Append a line to restarts.jsonl.

        Args:
            step: Step of the commit that is continued; 0 for a new run.
            world_size: Number of ranks.
            notes: What is different from the previous start.
        """
        value = {
            "unix_seconds": time.time(),
            "step": step,
            "world_size": world_size,
            "notes": notes,
        }
        with (self.path / "restarts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def cut_metrics(self, step: int, *, owes_evaluation: bool = False) -> int:
        """Drop the rows that a resumed run will write again.

        Args:
            step: Step of the commit that is continued.
            owes_evaluation: The commit owes the held-out row of its step.

        Returns:
            How many rows were dropped, a torn last line included.
        """
        if not self.metrics.exists():
            return 0
        text = self.metrics.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        kept = [line for line in lines if _is_safe_row(line, step, owes_evaluation)]
        # Compared as a whole: a row that was torn before its newline would swallow the next one.
        if (cut := "".join(line + "\n" for line in kept)) != text:
            write_durably(self.metrics, cut)
        return len(lines) - len(kept)


def _is_safe_row(line: str, step: int, owes_evaluation: bool) -> bool:
    """Whether a line is a whole row that a run continued at this step will not write again."""
    try:
        row = json.loads(line)
        is_owed = owes_evaluation and any(name.startswith("eval/") for name in row)
        return row["step"] < step or (row["step"] == step and not is_owed)
    except (ValueError, KeyError, TypeError):
        return False
