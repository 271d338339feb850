"""`deberta-prep dedup`: decisions about the documents of a corpus, for `build --dedup`.

    deduplicate(sources, output, DedupOptions(), executor)

- `DedupOptions`: everything beside the text that determines the decisions.
- `deduplicate`: plan, lock, then the steps of `dedup_steps`; run again after any interruption, it
  goes on. The folder that it leaves is described in `dedup_decisions`.
- `plan_dedup`, `run_steps`: its two halves, between which `dedup_share` does its part.
"""

import json
import shlex
import shutil
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.build_plan import BuildOptions, describe_input, refuse_difference, version_of
from data_prep.decontamination import NGRAM_WORDS, Evaluation, read_evaluation
from data_prep.dedup_decisions import SEAL_NAME, Decisions
from data_prep.dedup_files import step_folder
from data_prep.dedup_sketch import EVALUATION_FOLDER, SketchJob
from data_prep.dedup_steps import DedupSteps, OnStep
from data_prep.documents import ReadReport, Unit, plan_units
from data_prep.errors import UserError
from data_prep.executors import Executor
from data_prep.minhash import MinHashOptions
from data_prep.partial_folders import disk_errors, remove_abandoned, write_once
from data_prep.work_folder import PLAN_NAME, WORK_FOLDER, build_lock


@dataclass(frozen=True)
class DedupOptions:
    """What decides about the documents of a corpus, beside its text.

    Args:
        build: options of the build to come; those of reading and cleaning count.
        minhash: how near-duplicates are found; None to find exact ones alone.
        evaluation_files: files, folders or globs of evaluation examples.
        evaluation_fields: their fields that hold text.
        ngram_words: words of a run that an overlap shares.
    """

    build: BuildOptions = field(default_factory=BuildOptions)
    minhash: MinHashOptions | None = field(default_factory=MinHashOptions)
    evaluation_files: tuple[str, ...] = ()
    evaluation_fields: tuple[str, ...] = ("text",)
    ngram_words: int = NGRAM_WORDS

    def words(self) -> list[str]:
        """The options as words of the command line, none left to its default."""
        words = self.build.reading_words()
        if self.minhash is None:
            words.append("--exact-only")
        else:
            words += ["--threshold", str(self.minhash.threshold)]
            words += ["--shingle-words", str(self.minhash.shingle_words)]
            words += ["--bands", str(self.minhash.bands), "--rows", str(self.minhash.rows)]
        if self.evaluation_files:
            for file in self.evaluation_files:
                words += ["--decontaminate", file]
            for name in self.evaluation_fields:
                words += ["--decontaminate-field", name]
            words += ["--ngram-words", str(self.ngram_words)]
        return words


@dataclass(frozen=True)
class DedupReport:
    """What a deduplication decided.

    Args:
        decisions: the folder of decisions.
        reading: what was read and dropped; None if the decisions were complete before.
        seconds: time that this run took.
    """

    decisions: Decisions
    reading: ReadReport | None
    seconds: float


@dataclass(frozen=True)
class PlannedDedup:
    """A deduplication of which everything is known and nothing is done.

    Args:
        output: the folder of decisions.
        options: what decides, beside the text.
        units: what the sources were divided into.
        evaluation: runs of words that must not occur; None if there are none.
        plan: all of it in one comparable value.
        reading: what was noted while the sources were listed.
        began: when this run began, by the monotonic clock, in seconds.
    """

    output: Path
    options: DedupOptions
    units: list[Unit]
    evaluation: Evaluation | None
    plan: dict[str, Any]
    reading: ReadReport
    began: float

    @property
    def work(self) -> Path:
        """The work folder."""
        return self.output / WORK_FOLDER

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do, not even to clear away."""
        return (self.output / SEAL_NAME).is_file() and not self.work.exists()

    def complete_report(self) -> DedupReport:
        """The report of decisions that were there before.

        Raises:
            UserError: they were made from something else.
            CorruptError: they were changed.
        """
        decisions = Decisions.open(self.output)
        refuse_difference(self.plan, decisions.values, self.output, "was made")
        return DedupReport(decisions, None, time.monotonic() - self.began)

    def start(self) -> SketchJob:
        """Let the work folder know what is decided there.

        Returns:
            What all units have in common.

        Raises:
            UserError: the output is something else, other decisions are being made there, or the
                disk is full.
        """
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output} is a file; choose another --output")
        if self.output.is_dir() and not self.work.is_dir() and any(self.output.iterdir()):
            raise UserError(
                f"{self.output} is neither empty nor a folder of unfinished decisions; choose "
                f"another --output"
            )
        with disk_errors(self.output):
            self.work.mkdir(parents=True, exist_ok=True)
            write_once(self.work / PLAN_NAME, json.dumps(self.plan, indent=1).encode())
        stored = json.loads((self.work / PLAN_NAME).read_bytes())
        refuse_difference(self.plan, stored, self.output, "is being made")
        if self.evaluation is not None and not (self.work / EVALUATION_FOLDER).is_dir():
            with step_folder(self.work, EVALUATION_FOLDER) as folder:
                self.evaluation.save(folder)
        return SketchJob(
            work=self.work,
            handling=self.options.build.handling,
            minhash=self.options.minhash,
            has_evaluation=self.evaluation is not None,
        )


def plan_dedup(sources: Sequence[str], output: Path, options: DedupOptions) -> PlannedDedup:
    """Plan a deduplication; nothing is written.

    Args:
        sources: files, folders or globs, as for `build`.
        output: the folder of decisions.
        options: everything else that determines the decisions.

    Returns:
        The plan.

    Raises:
        UserError: bad input.
    """
    began, reading, build = time.monotonic(), ReadReport(), options.build
    handling = build.handling
    units = plan_units(
        sources, build.read, build.unit_bytes, reading, lambda source: handling.of(source).read
    )
    evaluation = None
    if options.evaluation_files:
        fields = options.evaluation_fields
        evaluation = read_evaluation(options.evaluation_files, fields, options.ngram_words)
    infos, plan_sha256 = describe_input(sources, units, handling)
    plan = {
        "command": shlex.join(["deberta-prep", "dedup", *sources, *options.words()]),
        "software": {
            "deberta-pretrain": version_of("deberta-pretrain"),
            "unicode": unicodedata.unidata_version,
            **{name: version_of(name) for name in handling.packages()},
        },
        "sources": [[info.name, info.input_bytes, info.options] for info in infos],
        "reading": shlex.join(build.reading_words()),
        "plan_sha256": plan_sha256,
        "evaluation_sha256": "" if evaluation is None else evaluation.sha256,
    }
    return PlannedDedup(output, options, units, evaluation, plan, reading, began)


def deduplicate(
    sources: Sequence[str],
    output: Path,
    options: DedupOptions,
    executor: Executor,
    on_step: OnStep = lambda step, done, total: None,
) -> DedupReport:
    """Decide which documents of a corpus go, or go on with decisions that were interrupted.

    Args:
        sources: files, folders or globs, as for `build`.
        output: the folder of decisions.
        options: everything else that determines the decisions.
        executor: where the steps run.
        on_step: told the name of a step, how many of its items are done, and how many there are.

    Returns:
        The report. Decisions that are complete already, from the same input, are left as they are.

    Raises:
        UserError: bad input, another process in the folder, no document left, a full disk.
        CorruptError: the output holds decisions that were changed.
    """
    return run_steps(plan_dedup(sources, output, options), executor, on_step)


def run_steps(planned: PlannedDedup, executor: Executor, on_step: OnStep) -> DedupReport:
    """Do what is not done yet of a planned deduplication; see `deduplicate`."""
    if planned.is_complete:
        return planned.complete_report()
    job, reading = planned.start(), None
    with build_lock(planned.work, planned.output):
        if not (planned.output / SEAL_NAME).is_file():
            remove_abandoned(planned.work)
            steps = DedupSteps(job, planned.units, executor, on_step)
            reading = planned.reading + steps.run(planned.output, planned.plan)
    # Only now: NFS keeps a folder alive in which a file, such as our lock, is open.
    shutil.rmtree(planned.work, ignore_errors=True)
    if reading is None:
        return planned.complete_report()
    return DedupReport(Decisions.read(planned.output), reading, time.monotonic() - planned.began)
