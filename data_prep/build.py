"""`deberta-prep build`: sources -> dataset, the same bytes for any number of workers and kills.

    1 plan       sources -> units; a function of the input alone           OUTPUT/.work/plan.json
    2 units      workers make the shards of each unit, then a mark         OUTPUT/.work/unit-000012
    3 assembly   shards are numbered in unit order; the manifest is last    OUTPUT/

Run again after any interruption, a build repeats the plan, refuses to go on if it differs from the
stored one, skips the units whose mark fits, and assembles. The work folder is removed at the end.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from data_prep.assembly import (
    JOIN_BELOW_TOKENS,
    copy_folder,
    group_shards,
    join_drop_logs,
    place_shard,
    remove_partials,
)
from data_prep.build_plan import BuildOptions, BuildPlan
from data_prep.documents import ReadReport, Unit, plan_units
from data_prep.errors import UserError
from data_prep.executors import Executor
from data_prep.hf_tokenizer import write_hf_tokenizer
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, is_complete, write_atomically
from data_prep.tokenizer import MODEL_FILE, Tokenizer
from data_prep.unit_work import UnitJob, UnitMark, build_unit, disk_errors

WORK_FOLDER = ".work"
MAX_MALFORMED = 0.1
"""Share of malformed inputs above which a build stops unless more is allowed."""
PLAN_NAME = "plan.json"

OnUnits = Callable[[list[Unit]], None]
OnUnitDone = Callable[[UnitMark], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        folder: the dataset folder.
        fingerprint: fingerprint of the dataset.
        manifest: its manifest.
        reading: what was read and dropped; None if the dataset was complete before.
        resumed_units: units that an earlier run had finished.
        seconds: time that this run took.
    """

    folder: Path
    fingerprint: str
    manifest: Manifest
    reading: ReadReport | None
    resumed_units: int
    seconds: float


def build(
    sources: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: BuildOptions,
    executor: Executor,
    on_units: OnUnits = lambda units: None,
    on_unit_done: OnUnitDone = lambda mark: None,
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
    began = time.monotonic()
    if not 0 <= max_malformed <= 1:
        raise UserError(f"--max-malformed {max_malformed}: must lie between 0 and 1")
    _check_apart(sources, output)
    plan_report = ReadReport()
    units = plan_units(sources, options.read, options.unit_bytes, plan_report)
    model = Tokenizer.load(tokenizer)
    plan = BuildPlan.make(sources, tokenizer, model, options, units)
    if is_complete(output) and not (output / WORK_FOLDER).exists():
        return _already_complete(output, plan, began)
    work = _open_work_folder(output)
    job = UnitJob(
        work=work,
        tokenizer=work / TOKENIZER_FOLDER,
        read_options=options.read,
        cleaning_options=options.cleaning,
        heldout_fraction=options.heldout_fraction,
        shard_tokens=options.shard_tokens,
    )
    report = None
    with _lock(work, output):
        if not is_complete(output):
            _store_plan(plan, work, output)
            with disk_errors(work):
                _store_tokenizer(tokenizer, job.tokenizer)
            resumed = sum(UnitMark.load(job.folder(unit.index)) is not None for unit in units)
            on_units(units)
            for mark in executor.run(partial(build_unit, job), units):
                on_unit_done(mark)
            _refuse_malformed(job, units, max_malformed)
            with disk_errors(output):
                manifest, fingerprint, reading = _assemble(job, units, plan, model, output)
            reading = plan_report + reading
            seconds = time.monotonic() - began
            report = BuildReport(output, fingerprint, manifest, reading, resumed, seconds)
    # Only now: NFS keeps a folder alive in which a file, such as our lock, is open.
    shutil.rmtree(work, ignore_errors=True)
    return report or _already_complete(output, plan, began)


def _already_complete(output: Path, plan: BuildPlan, began: float) -> BuildReport:
    manifest, fingerprint = Manifest.load(output)
    plan.refuse_other(json.loads(json.dumps(asdict(manifest))), output, "was built")
    seconds = time.monotonic() - began
    return BuildReport(output, fingerprint, manifest, None, 0, seconds)


def _check_apart(sources: Sequence[str], output: Path) -> None:
    target = output.resolve()
    for source in sources:
        folder = Path(source).resolve()
        if folder.is_dir() and target.is_relative_to(folder):
            raise UserError(
                f"--output {output} lies inside the source {source}, so that the dataset would "
                f"become its own input; choose an --output outside"
            )


def _open_work_folder(output: Path) -> Path:
    work = output / WORK_FOLDER
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output")
    if output.is_dir() and not work.is_dir() and any(output.iterdir()):
        raise UserError(
            f"{output} is neither empty nor an unfinished build; choose another --output"
        )
    with disk_errors(output):
        work.mkdir(parents=True, exist_ok=True)
    return work


@contextmanager
def _lock(work: Path, output: Path) -> Iterator[None]:
    """Keep a second build out of the folder; the operating system frees a lock after a kill."""
    lock = FileLock(work / "lock")
    holder = work / "holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text() if holder.is_file() else "another process"
        raise UserError(
            f"{output} is being built by {who}; wait for it, stop it, or choose another --output"
        ) from error
    try:
        write_atomically(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        lock.release()


def _store_plan(plan: BuildPlan, work: Path, output: Path) -> None:
    path = work / PLAN_NAME
    if path.is_file():
        plan.refuse_other(json.loads(path.read_bytes()), output, "is being built")
    else:
        write_atomically(path, json.dumps(plan.to_dict(), indent=1).encode())


def _store_tokenizer(source: Path, folder: Path) -> None:
    """Keep the model beside the work, so that no worker sees another one.

    The Hugging Face files are derived from it anew, not copied: everything in the folder then
    depends on the model alone, whose fingerprint is in the plan.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model_file = folder / MODEL_FILE
    shutil.copyfile(source / MODEL_FILE if source.is_dir() else source, model_file)
    write_hf_tokenizer(model_file, folder)


def _assemble(
    job: UnitJob, units: Sequence[Unit], plan: BuildPlan, tokenizer: Tokenizer, output: Path
) -> tuple[Manifest, str, ReadReport]:
    """Number the shards and write everything that stands beside them, the manifest last."""
    marks = [(job.folder(unit.index), _finished_mark(job, unit)) for unit in units]
    reading = sum((mark.report for _, mark in marks), ReadReport())
    groups = group_shards(marks, JOIN_BELOW_TOKENS)
    if not groups:
        shutil.rmtree(job.work, ignore_errors=True)
        reasons = ", ".join(f"{reason} {count}" for reason, count in reading.dropped.items())
        raise UserError(
            f"no document is left of {reading.files} files (dropped: {reasons or 'nothing'}); "
            f"check the sources, --text-field and --min-characters"
        )
    remove_partials(output)
    shards = tuple(place_shard(parts, output, index) for index, parts in enumerate(groups))
    drop_log = join_drop_logs([folder for folder, _ in marks], output)
    tokenizer_files = copy_folder(job.tokenizer, output / TOKENIZER_FOLDER)
    manifest = Manifest(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=plan.tokenizer_fingerprint,
        command=plan.command,
        software=plan.software,
        sources=plan.sources,
        plan_sha256=plan.plan_sha256,
        dropped=dict(sorted(reading.dropped.items())),
        notes=dict(sorted(reading.notes.items())),
        files=(drop_log, *tokenizer_files),
        shards=shards,
    )
    return manifest, manifest.save(output), reading


def _refuse_malformed(job: UnitJob, units: Sequence[Unit], limit: float) -> None:
    """Stop before a dataset is published that lacks more than its maker may expect."""
    reading = sum((_finished_mark(job, unit).report for unit in units), ReadReport())
    malformed = sum(reading.malformed.values())
    if reading.documents and malformed > limit * (reading.documents + malformed):
        counts = ", ".join(f"{reason} {count:,}" for reason, count in reading.malformed.items())
        file, cases = next(iter(reading.examples[next(iter(reading.malformed))].items()))
        raise UserError(
            f"{malformed:,} of {reading.documents + malformed:,} inputs are malformed ({counts}), "
            f"more than --max-malformed {limit:g} allows; for example {file}: {cases[0]}. Check "
            f"the sources and --text-field, and start with another --output; or allow more: "
            f"finished units are kept, and the same command continues"
        )


def _finished_mark(job: UnitJob, unit: Unit) -> UnitMark:
    mark = UnitMark.load(job.folder(unit.index))
    assert mark is not None, f"unit {unit.index} has no mark, although it was run"
    return mark
