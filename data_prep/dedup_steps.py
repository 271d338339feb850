"""The steps of a deduplication behind its plan.

    sketch      workers read the units: digests, MinHash bands, shingles, overlaps   dedup_sketch
    copies      workers compare digests, range by range                            dedup_matching
    pairs       workers compare bands, range by range
    edges       workers count the Jaccard index of each pair
    clusters    one process joins what belongs together                            dedup_clusters
    decisions   workers write down what becomes of the documents of their units
    then one process puts the folder together, the seal last                       dedup_decisions

Every step leaves folders that are functions of the input, so that the result is the same for any
number of workers, and the same command goes on after a kill at any time.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dedup_clusters import (
    CLUSTERS_FOLDER,
    FIRSTS_NAME,
    REMOVED_NAME,
    cluster_report,
    decide_unit,
    join_pairs,
)
from data_prep.dedup_decisions import (
    COLUMNS,
    DEDUP_NAME,
    FORMAT_VERSION,
    REASONS,
    SEAL_NAME,
    column_file,
    seal_of,
)
from data_prep.dedup_files import (
    COPIES_FILE,
    Parts,
    UnitSketch,
    decisions_name,
    load_array,
    new_array,
    step_folder,
)
from data_prep.dedup_matching import (
    MatchJob,
    copies_name,
    edges_name,
    load_pairs,
    match_bands,
    match_copies,
    num_ranges,
    verify_part,
)
from data_prep.dedup_sketch import SketchJob, sketch_unit
from data_prep.documents import ReadReport, Unit
from data_prep.errors import UserError
from data_prep.executors import Executor
from data_prep.manifest import write_atomically
from data_prep.npy_files import NpyStream, hash_blocks
from data_prep.partial_folders import disk_errors

_ROWS = 2**20

OnStep = Callable[[str, int, int], None]


class DedupSteps:
    """The steps behind the plan, in order.

    Args:
        job: how documents are read and compared, and the work folder.
        units: what is read.
        executor: where workers run.
        on_step: told the name of a step, how many of its items are done, and how many there are.
    """

    def __init__(
        self, job: SketchJob, units: Sequence[Unit], executor: Executor, on_step: OnStep
    ) -> None:
        self._job, self._work, self._units = job, job.work, units
        self._executor, self._on_step = executor, on_step

    def run(self, output: Path, plan: dict[str, Any]) -> ReadReport:
        """Do what is not done yet, and put the folder together.

        Args:
            output: the folder of decisions.
            plan: what is being decided.

        Returns:
            What reading the units dropped and found odd.
        """
        self._run("sketch", partial(sketch_unit, self._job), self._units)
        sketches = [UnitSketch.load(self._work, unit.index) for unit in self._units]
        reading = sum((sketch.report for sketch in sketches), ReadReport())
        parts = Parts.of_units(self._work, sketches)
        if not parts.num_documents:
            raise UserError(
                f"no document is left of {reading.files} files; check the sources, --text-field "
                f"and --min-characters"
            )
        job = self._match(parts, sum(bands for s in sketches for _, bands in s.parts))
        clusters = self._cluster(job)
        indices = [unit.index for unit in self._units]
        self._run("decisions", partial(decide_unit, job.parts), indices)
        with disk_errors(output):
            self._put_together(output, plan, sketches, clusters)
        return reading

    def _run(self, step: str, task: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._on_step(step, 0, len(items))
        # For one item it is not worth starting workers.
        results = map(task, items) if len(items) == 1 else self._executor.run(task, items)
        for done, _ in enumerate(results, start=1):
            self._on_step(step, done, len(items))

    def _match(self, parts: Parts, num_bands: int) -> MatchJob:
        minhash = self._job.minhash
        job = MatchJob(
            parts=parts,
            digest_ranges=num_ranges(parts.num_documents),
            band_ranges=num_ranges(num_bands) if minhash is not None else 0,
            threshold=minhash.threshold if minhash is not None else 1.0,
        )
        self._run("copies", partial(match_copies, job), range(job.digest_ranges))
        if not (self._work / COPIES_FILE).is_file():
            with step_folder(self._work, Path(COPIES_FILE).parent.name) as folder:
                is_copy = new_array(folder / Path(COPIES_FILE).name, "?", parts.num_documents)
                for number in range(job.digest_ranges):
                    pairs = load_pairs(job, copies_name(number))
                    for start in range(0, pairs.size, _ROWS):
                        is_copy[pairs[start : start + _ROWS] // parts.num_documents] = True
                is_copy.flush()
        self._run("pairs", partial(match_bands, job), range(job.band_ranges))
        if job.band_ranges:
            self._run("edges", partial(verify_part, job), range(len(parts)))
        return job

    def _cluster(self, job: MatchJob) -> dict[str, Any]:
        total = job.parts.num_documents
        self._on_step("clusters", 0, 1)
        target = self._work / CLUSTERS_FOLDER
        if not target.is_dir():
            with step_folder(self._work, CLUSTERS_FOLDER) as folder:
                firsts = new_array(folder / FIRSTS_NAME, "<i8", total)
                for start in range(0, total, _ROWS):
                    firsts[start : start + _ROWS] = np.arange(start, min(start + _ROWS, total))
                join_pairs(firsts, total, partial(_all_pairs, job))
                firsts.flush()
                sizes = new_array(folder / "sizes.npy", "<u4", total)
                report = cluster_report(job.parts, firsts, sizes)
                (folder / "report.json").write_text(json.dumps(report), encoding="ascii")
        self._on_step("clusters", 1, 1)
        return json.loads((target / "report.json").read_bytes())

    def _put_together(
        self,
        output: Path,
        plan: dict[str, Any],
        sketches: Sequence[UnitSketch],
        clusters: dict[str, Any],
    ) -> None:
        folders = [self._work / decisions_name(unit.index) for unit in self._units]
        counts, units = dict.fromkeys(REASONS.values(), 0), []
        for folder, sketch in zip(folders, sketches, strict=True):
            actions = load_array(folder / column_file("action"))
            for action, reason in REASONS.items():
                counts[reason] += int((actions == action).sum())
            unit = {"documents": sketch.documents, "decisions": actions.size}
            units.append({**unit, "content": sketch.content})
        files = {
            column_file(column): _join_column(folders, output, column, kind)
            for column, kind in COLUMNS.items()
        }
        files[REMOVED_NAME] = _join_removed(folders, output)
        values = {
            "format_version": FORMAT_VERSION,
            **plan,
            "documents": sum(sketch.documents for sketch in sketches),
            "removed": counts,
            "clusters": clusters,
            "files": files,
            "units": units,
        }
        content = json.dumps(values, indent=1).encode()
        write_atomically(output / DEDUP_NAME, content)
        seal = seal_of(hashlib.sha256(content).hexdigest())
        write_atomically(output / SEAL_NAME, seal)


def _all_pairs(job: MatchJob) -> Iterator[Any]:
    for number in range(job.digest_ranges):
        yield load_pairs(job, copies_name(number))
    for part in range(len(job.parts)) if job.band_ranges else ():
        yield load_pairs(job, edges_name(part))


def _join_column(folders: Iterable[Path], output: Path, column: str, kind: str) -> str:
    stream = NpyStream(output / column_file(column), np.dtype(kind))
    try:
        for folder in folders:
            stream.append(load_array(folder / column_file(column)))
        return stream.finish()[0]
    finally:
        stream.abort()


def _join_removed(folders: Iterable[Path], output: Path) -> str:
    target = output / REMOVED_NAME
    partial_file = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with partial_file.open("w+b") as joined:
        for folder in folders:
            with (folder / REMOVED_NAME).open("rb") as removed:
                shutil.copyfileobj(removed, joined)
        joined.flush()
        os.fsync(joined.fileno())
        sha256, _ = hash_blocks(joined)
    partial_file.replace(target)
    return sha256
