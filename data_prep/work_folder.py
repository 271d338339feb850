"""The folder of an unfinished build: what is in it, and who may start there.

    OUTPUT/.work/plan.json             what is being built; whoever comes later must agree
    OUTPUT/.work/tokenizer/            the model that all workers read
    OUTPUT/.work/unit-000012/          a finished unit (`unit_work`); it is there, or it is not
    OUTPUT/.work/*.partial             what processes are working on (`partial_folders`)
    OUTPUT/.work/shares/               how SLURM array tasks stand (`array_tasks`)
    OUTPUT/.work/lock, holder          keeps two people's builds apart

The lock is a courtesy: without it two builds would do the work twice, and right. It is `flock`,
which the kernel frees after a kill; where a file system has none, or keeps it from other hosts,
nothing but that courtesy is lost.
"""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_prep.build_plan import BuildPlan
from data_prep.errors import UserError
from data_prep.hf_tokenizer import write_hf_tokenizer
from data_prep.manifest import TOKENIZER_FOLDER, is_complete, sync_folder, write_atomically
from data_prep.partial_folders import disk_errors, partial_folder, write_once
from data_prep.tokenizer import MODEL_FILE

WORK_FOLDER = ".work"
PLAN_NAME = "plan.json"
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def open_work_folder(output: Path) -> Path:
    """Find or make the work folder of a dataset.

    Args:
        output: the dataset folder.

    Returns:
        Its work folder.

    Raises:
        UserError: the output is something else, or cannot be written.
    """
    work = output / WORK_FOLDER
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output")
    is_foreign = output.is_dir() and not work.is_dir() and any(output.iterdir())
    # Looked at last: another process may finish the dataset, and remove its work, at any time.
    if is_foreign and not is_complete(output):
        raise UserError(
            f"{output} is neither empty nor an unfinished build; choose another --output"
        )
    with disk_errors(output):
        work.mkdir(parents=True, exist_ok=True)
    return work


class BusyError(UserError):
    """Somebody else is at work in the folder."""


@contextmanager
def build_lock(work: Path, output: Path) -> Iterator[None]:
    """Keep a second build out of the folder while this one is at work.

    Args:
        work: the work folder.
        output: the dataset folder, for the message.

    Raises:
        BusyError: somebody else builds here; the message says who.
    """
    # Where flock is missing, a lock file that stays behind after a crash would keep all out.
    lock = FileLock(work / "lock", fallback_to_soft=False)
    holder = work / "holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text() if holder.is_file() else "another process"
        raise BusyError(
            f"{output} is being built by {who}; wait for it, stop it, or choose another --output"
        ) from error
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise UserError(
                f"{work / 'lock'}: cannot be locked ({error.strerror}); mend the file system, or "
                f"choose another --output"
            ) from error
    try:
        with disk_errors(work):
            write_atomically(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        lock.release()


def store_plan(plan: BuildPlan, work: Path, output: Path) -> None:
    """Write down what is being built, or compare with what was written.

    Args:
        plan: what this process wants to build.
        work: the work folder.
        output: the dataset folder, for the message.

    Raises:
        UserError: something else is being built here; the message says in what it differs.
    """
    path = work / PLAN_NAME
    if not path.is_file():
        with disk_errors(work):
            write_once(path, json.dumps(plan.to_dict(), indent=1).encode())
    plan.refuse_other(json.loads(path.read_bytes()), output, "is being built")


def store_tokenizer(source: Path, work: Path) -> Path:
    """Keep the model beside the work, so that no worker sees another one.

    The Hugging Face files are derived from it anew, not copied: everything in the folder then
    depends on the model alone, whose fingerprint is in the plan. Each start writes the same bytes
    over those of the start before, one whole file at a time, while others may be reading them.

    Args:
        source: tokenizer folder or model file.
        work: the work folder.

    Returns:
        The tokenizer folder in the work folder.

    Raises:
        UserError: the disk is full.
    """
    folder = work / TOKENIZER_FOLDER
    with disk_errors(work), partial_folder(work, TOKENIZER_FOLDER) as partial:
        folder.mkdir(exist_ok=True)
        model_file = partial / MODEL_FILE
        shutil.copyfile(source / MODEL_FILE if source.is_dir() else source, model_file)
        write_hf_tokenizer(model_file, partial)
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(folder / path.name)
        sync_folder(folder)
    return folder
