"""`deberta-prep dedup`: which documents of a corpus are duplicates or hold evaluation text."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep import console
from data_prep.array_build import ShareReport
from data_prep.array_tasks import ArrayTask
from data_prep.build_plan import BuildOptions
from data_prep.cleaning import CleaningOptions
from data_prep.commands_recipe import RecipeOption, sources_and_options
from data_prep.decontamination import NGRAM_WORDS
from data_prep.dedup import DedupOptions, DedupReport, deduplicate
from data_prep.dedup_clusters import REMOVED_NAME
from data_prep.dedup_share import deduplicate_share
from data_prep.documents import ACCEPTED, ReadOptions
from data_prep.executor_choice import ExecutorName, open_executor
from data_prep.minhash import MinHashOptions
from data_prep.source_units import TARGET_BYTES

_LINE_SECONDS = 10.0
_SHOWN_CLUSTERS = 5
_READ = ReadOptions()
_MINHASH = MinHashOptions()
_NgramOption = Annotated[
    int, typer.Option(help="Words in a row that must not occur in an evaluation file.")
]
_SourcesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="SOURCE", help=f"Files, folders or quoted globs: {ACCEPTED}."),
]
_AsForBuild = Annotated[int, typer.Option(help="As for build.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_CleanOption = Annotated[
    list[str] | None, typer.Option(metavar="WORD", help="As for build; may be repeated.")
]


def dedup_command(
    context: typer.Context,
    sources: _SourcesArgument = None,
    recipe: RecipeOption = None,
    *,
    output: Annotated[Path, typer.Option(help="Folder of decisions to make, or to go on with.")],
    workers: Annotated[
        int | None, typer.Option(help="Processes here, or in each array task. 1 if not given.")
    ] = None,
    executor: Annotated[
        ExecutorName, typer.Option(help="Where the work runs: as for build.")
    ] = "processes",
    threshold: Annotated[
        float, typer.Option(help="Jaccard index of shingles from which two are near-duplicates.")
    ] = _MINHASH.threshold,
    shingle_words: Annotated[
        int, typer.Option(help="Words of a shingle; shorter documents are compared exactly only.")
    ] = _MINHASH.shingle_words,
    bands: Annotated[
        int, typer.Option(help="Chances of two documents to be compared.")
    ] = _MINHASH.bands,
    rows: Annotated[
        int, typer.Option(help="Minima that must agree in a band; more find fewer pairs.")
    ] = _MINHASH.rows,
    exact_only: Annotated[
        bool, typer.Option("--exact-only", help="Look for exact duplicates alone.")
    ] = False,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Evaluation file, folder or glob; may be repeated."),
    ] = None,
    decontaminate_field: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Field of it that holds text; may be repeated. [text]"),
    ] = None,
    ngram_words: _NgramOption = NGRAM_WORDS,
    text_field: Annotated[str, typer.Option(help="As for build.")] = _READ.text_field,
    txt_document: Annotated[
        Literal["file", "line"], typer.Option(help="As for build.")
    ] = _READ.txt_document,
    max_document_bytes: _AsForBuild = _READ.max_document_bytes,
    min_characters: _AsForBuild = 1,
    clean: _CleanOption = None,
    unit_bytes: _AsForBuild = TARGET_BYTES,
    as_json: _JsonOption = False,
) -> None:
    """Find duplicates, near-duplicates and evaluation text; run again to continue.

    Nothing is changed but the folder of decisions, which `build --dedup` applies to the same
    sources. Of each cluster the first document is kept. The list of all that goes is removed.jsonl
    in the folder. The result depends on the input alone: the same bytes for any --workers and after
    any kill.

    Example: deberta-prep dedup corpus --output decisions --workers 8 --decontaminate 'glue/*.jsonl'
    """
    build = BuildOptions(
        read=ReadOptions(text_field, txt_document, max_document_bytes),
        cleaning=CleaningOptions.parse(clean or (), min_characters),
        unit_bytes=unit_bytes,
    )
    named, build = sources_and_options(context, sources, recipe, build)
    options = DedupOptions(
        build=build,
        minhash=None if exact_only else MinHashOptions(threshold, shingle_words, bands, rows),
        evaluation_files=tuple(decontaminate or ()),
        evaluation_fields=tuple(decontaminate_field or ("text",)),
        ngram_words=ngram_words,
    )
    task = ArrayTask.from_environment(os.environ) if executor == "slurm-array" else None
    with open_executor(executor, workers) as pool:
        if pool is None:
            return
        tell = _Progress().tell
        with console.until_interrupted(output):
            if task is None:
                report = deduplicate(named, output, options, pool, tell)
            else:
                report = deduplicate_share(named, output, options, pool, task, tell)
        _print(report, as_json)


def _print(report: DedupReport | ShareReport, as_json: bool) -> None:
    is_share = isinstance(report, ShareReport)
    if as_json:
        values = console.share_values(report) if is_share else dedup_values(report)
        console.write_line(json.dumps(values, indent=2))
    elif is_share:
        console.print_share(report)
    else:
        print_dedup(report)


class _Progress:
    """One line for each step on stderr, and one now and then while it takes long."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def tell(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            sys.stderr.write(f"dedup: {step}: {done} of {total}\n")
            sys.stderr.flush()


def dedup_values(report: DedupReport) -> dict[str, Any]:
    """A report as values that JSON can hold."""
    decisions, reading = report.decisions, report.reading
    kept = ("documents", "removed", "clusters", "command")
    return {
        "decisions": str(decisions.folder),
        "fingerprint": decisions.fingerprint,
        "already_complete": reading is None,
        **{key: decisions.values[key] for key in kept},
        "dropped": dict(reading.dropped) if reading is not None else {},
        "seconds": report.seconds,
    }


def print_dedup(report: DedupReport) -> None:
    """What was found, the largest clusters with some of their documents."""
    decisions, values = report.decisions, report.decisions.values
    if report.reading is None:
        console.write_line(f"{decisions.folder} is already complete; nothing was done.")
    clusters = values["clusters"]
    removed = sum(values["removed"].values())
    rows = [
        ("documents", values["documents"]),
        *values["removed"].items(),
        ("left", values["documents"] - removed),
        ("clusters", clusters["count"]),
        *((f"clusters of {sizes}", count) for sizes, count in clusters["sizes"].items()),
    ]
    console.print_table(f"decisions {decisions.folder}", ("what", "number"), rows)
    for sample in clusters["samples"][:_SHOWN_CLUSTERS]:
        members = ", ".join(f"{m['file']} {m['place']}".strip() for m in sample["members"])
        more = ", ..." if sample["documents"] > len(sample["members"]) else ""
        console.write_line(f"  {sample['documents']:,} documents: {members}{more}")
    if report.reading is not None:
        console.print_reading(report.reading)
        console.write_line(f"{report.seconds:.1f} s")
    if removed:
        console.write_line(f"every one that goes: {decisions.folder / REMOVED_NAME}")
    console.write_line(f"fingerprint {decisions.fingerprint}")
