"""The steps that every build takes, wherever its units are worked on.

    plan_build          sources -> units; a function of the input alone
    PlannedBuild.start  the work folder knows the plan and has the tokenizer
    ...                 workers make units (`unit_work.build_unit`)
    PlannedBuild.finish all units are there -> a dataset (`assembly`)

`build.build` takes them in one go; `array_build.build_share` with others.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.assembly import (
    JOIN_BELOW_TOKENS,
    FinishedUnit,
    copy_folder,
    group_shards,
    join_drop_logs,
    place_shard,
    publish_dataset,
)
from data_prep.build_plan import BuildOptions, BuildPlan
from data_prep.documents import ReadReport, Unit, plan_units
from data_prep.errors import UserError
from data_prep.manifest import TOKENIZER_FOLDER, Manifest, is_complete
from data_prep.partial_folders import disk_errors, partial_folder
from data_prep.tokenizer import Tokenizer
from data_prep.unit_work import UnitJob, UnitMark, unit_folder_name
from data_prep.work_folder import WORK_FOLDER, store_plan, store_tokenizer


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        folder: the dataset folder.
        fingerprint: fingerprint of the dataset.
        manifest: its manifest.
        reading: what was read and dropped; None if another run or process has made the dataset.
        resumed_units: units that an earlier run, or another process, had finished.
        seconds: time that this run took.
        units_of_worker: process and host -> units that it made in this run.
    """

    folder: Path
    fingerprint: str
    manifest: Manifest
    reading: ReadReport | None
    resumed_units: int
    seconds: float
    units_of_worker: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedBuild:
    """A build of which everything is known and nothing is done.

    Args:
        output: the dataset folder.
        tokenizer_path: as the user named it.
        tokenizer: what was found there.
        options: everything else that determines the bytes.
        units: what the sources were divided into.
        reading: what was noted while they were.
        plan: all of it in one comparable value.
        max_malformed: share of malformed inputs above which nothing is published, in [0, 1].
        began: when this run began, by the monotonic clock, in seconds.
    """

    output: Path
    tokenizer_path: Path
    tokenizer: Tokenizer
    options: BuildOptions
    units: list[Unit]
    reading: ReadReport
    plan: BuildPlan
    max_malformed: float
    began: float

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do, not even to clear away."""
        return is_complete(self.output) and not (self.output / WORK_FOLDER).exists()

    def start(self, work: Path) -> UnitJob:
        """Let the work folder know what is built there.

        Args:
            work: the work folder.

        Returns:
            What all units have in common.

        Raises:
            UserError: something else is being built there, or the disk is full.
        """
        store_plan(self.plan, work, self.output)
        dedup = self.options.dedup
        return UnitJob(
            work=work,
            tokenizer=store_tokenizer(self.tokenizer_path, work),
            handling=self.options.handling,
            heldout_fraction=self.options.heldout_fraction,
            shard_tokens=self.options.shard_tokens,
            dedup=None if dedup is None else dedup.folder.resolve(),
            dedup_fingerprint="" if dedup is None else dedup.fingerprint,
            duplicates=self.options.duplicates,
        )

    def unfinished(self, work: Path) -> list[Unit]:
        """Units that nobody has finished so far.

        Args:
            work: the work folder; it is listed once, which file servers answer without a cache.

        Returns:
            The units, in order.
        """
        finished = {path.name for path in work.iterdir()}
        return [unit for unit in self.units if unit_folder_name(unit.index) not in finished]

    def finish(self, job: UnitJob, units_of_worker: Mapping[str, int]) -> BuildReport:
        """Make the dataset of finished units.

        Args:
            job: what `start` gave.
            units_of_worker: who made how many units in this run, for the report; nobody ("")
                made those that were there before.

        Returns:
            The report.

        Raises:
            UserError: too much is malformed, nothing is left, a unit is gone, the disk is full.
        """
        shards, found = self._collect(job)
        self._refuse_malformed(found)
        with disk_errors(self.output):
            manifest, fingerprint = self._assemble(job, shards, found)
        reading = self.reading + found
        return self._report(manifest, fingerprint, reading, units_of_worker)

    def complete_report(self, units_of_worker: Mapping[str, int]) -> BuildReport:
        """Describe the dataset that is there already.

        Args:
            units_of_worker: as in `finish`; another process may have made a dataset of them.

        Returns:
            The report.

        Raises:
            UserError: it was built from something else.
            CorruptError: its manifest was changed.
        """
        manifest, fingerprint = Manifest.load(self.output)
        stored = json.loads(json.dumps(asdict(manifest)))
        self.plan.refuse_other(stored, self.output, "was built")
        return self._report(manifest, fingerprint, None, units_of_worker)

    def _report(
        self,
        manifest: Manifest,
        fingerprint: str,
        reading: ReadReport | None,
        units_of_worker: Mapping[str, int],
    ) -> BuildReport:
        return BuildReport(
            folder=self.output,
            fingerprint=fingerprint,
            manifest=manifest,
            reading=reading,
            resumed_units=units_of_worker.get("", 0),
            seconds=time.monotonic() - self.began,
            units_of_worker={name: count for name, count in units_of_worker.items() if name},
        )

    def _collect(self, job: UnitJob) -> tuple[list[FinishedUnit], ReadReport]:
        """Read the marks, one at a time: only what the manifest needs stays in memory."""
        shards: list[FinishedUnit] = []
        reading = ReadReport()
        for unit in self.units:
            folder = job.folder(unit.index)
            mark = UnitMark.load(folder)
            if mark is None:
                raise UserError(
                    f"{folder}: the unit was finished and is gone or damaged; run the same "
                    f"command again to make it once more"
                )
            shards.append((folder, mark.shards))
            reading.add(mark.report)
        return shards, reading

    def _refuse_malformed(self, reading: ReadReport) -> None:
        """Stop before a dataset is published that lacks more than its maker may expect."""
        malformed, limit = sum(reading.malformed.values()), self.max_malformed
        if reading.documents and malformed > limit * (reading.documents + malformed):
            counts = ", ".join(f"{reason} {count:,}" for reason, count in reading.malformed.items())
            file, cases = next(iter(reading.examples[next(iter(reading.malformed))].items()))
            raise UserError(
                f"{malformed:,} of {reading.documents + malformed:,} inputs are malformed "
                f"({counts}), more than --max-malformed {limit:g} allows; for example {file}: "
                f"{cases[0]}. Check the sources and --text-field, and start with another "
                f"--output; or allow more: finished units are kept, and the same command continues"
            )

    def _assemble(
        self, job: UnitJob, units: list[FinishedUnit], reading: ReadReport
    ) -> tuple[Manifest, str]:
        """Number the shards and write everything that stands beside them, the manifest last."""
        groups = group_shards(units, JOIN_BELOW_TOKENS)
        if not groups:
            shutil.rmtree(job.work, ignore_errors=True)
            reasons = ", ".join(f"{reason} {count}" for reason, count in reading.dropped.items())
            raise UserError(
                f"no document is left of {reading.files} files (dropped: {reasons or 'nothing'}); "
                f"check the sources, --text-field and --min-characters"
            )
        with partial_folder(job.work, "dataset") as partial:
            shards = tuple(place_shard(parts, partial, n) for n, parts in enumerate(groups))
            drop_log = join_drop_logs([folder for folder, _ in units], partial)
            tokenizer_files = copy_folder(job.tokenizer, partial / TOKENIZER_FOLDER)
            manifest = Manifest(
                vocab_size=self.tokenizer.vocab_size,
                tokenizer_fingerprint=self.plan.tokenizer_fingerprint,
                command=self.plan.command,
                software=self.plan.software,
                sources=self.plan.sources,
                plan_sha256=self.plan.plan_sha256,
                dropped=dict(sorted(reading.dropped.items())),
                notes=dict(sorted(reading.notes.items())),
                files=(drop_log, *tokenizer_files),
                shards=shards,
            )
            fingerprint = manifest.save(partial)
            publish_dataset(partial, self.output)
        return manifest, fingerprint


def plan_build(
    sources: Sequence[str],
    tokenizer: Path,
    output: Path,
    options: BuildOptions,
    max_malformed: float,
) -> PlannedBuild:
    """Find out what there is to do; nothing is written.

    Args:
        sources: files, folders or globs, as the user named them; these names go into the manifest.
        tokenizer: tokenizer folder or model file.
        output: the dataset folder.
        options: everything else that determines the bytes.
        max_malformed: share of malformed inputs above which nothing is published, in [0, 1].

    Returns:
        The plan.

    Raises:
        UserError: the sources, the tokenizer or the output cannot be what they are.
    """
    began = time.monotonic()
    if not 0 <= max_malformed <= 1:
        raise UserError(f"--max-malformed {max_malformed}: must lie between 0 and 1")
    _check_apart(sources, output)
    reading = ReadReport()
    handling = options.handling
    units = plan_units(
        sources, options.read, options.unit_bytes, reading, lambda name: handling.of(name).read
    )
    model = Tokenizer.load(tokenizer)
    plan = BuildPlan.make(sources, tokenizer, model, options, units)
    return PlannedBuild(
        output, tokenizer, model, options, units, reading, plan, max_malformed, began
    )


def _check_apart(sources: Sequence[str], output: Path) -> None:
    target = output.resolve()
    for source in sources:
        folder = Path(source).resolve()
        if folder.is_dir() and target.is_relative_to(folder):
            raise UserError(
                f"--output {output} lies inside the source {source}, so that the dataset would "
                f"become its own input; choose an --output outside"
            )
