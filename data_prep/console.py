"""What the commands print: progress while they work, tables when they are done.

Progress goes to stderr, results to stdout. On a terminal progress is a bar; elsewhere (a SLURM log,
a file) it is a plain line now and then. rich is imported when something is printed, so that
`--help` is quick.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from data_prep.array_build import ShareReport
from data_prep.build_steps import BuildReport
from data_prep.documents import ReadReport, Unit
from data_prep.stats import GroupStats
from data_prep.unit_work import DROPPED_NAME, UnitDone
from data_prep.verify import VerifyReport

EXIT_INTERRUPTED = 130
_LINE_SECONDS = 10.0
_TINY_SHARD_TOKENS = 2**18
_MANY_SHARDS = 100
_MAX_EXAMPLES = 20


class BuildProgress:
    """Progress of a build in input bytes; a bar on a terminal, else lines.

    Use as a context manager around the build.
    """

    def __init__(self) -> None:
        self._began = self._last_line = time.monotonic()
        self._num_units = self._done_units = self._total_bytes = self._done_bytes = 0
        self._tokens = 0
        self._bar: Any = None

    def start(self, units: list[Unit]) -> None:
        """Learn what there is to do."""
        self._num_units = len(units)
        self._total_bytes = sum(unit.num_bytes for unit in units)
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("build", total=self._total_bytes, tokens="")
            self._bar.start()

    def advance(self, done: UnitDone) -> None:
        """Count a finished unit."""
        self._done_units += 1
        self._done_bytes += done.input_bytes
        self._tokens += done.num_tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done_bytes, tokens=f"{self._tokens:,} tokens"
            )
        elif now - self._last_line >= _LINE_SECONDS or self._done_units == self._num_units:
            self._last_line = now
            rate = self._done_bytes / max(1e-9, now - self._began) / 1e6
            line = (
                f"build: {self._done_units} of {self._num_units} units, "
                f"{self._done_bytes / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB, "
                f"{self._tokens:,} tokens, {rate:.1f} MB/s"
            )
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]}"),
        console=Console(stderr=True),
    )


@contextmanager
def until_interrupted(output: Path) -> Iterator[None]:
    """End in one line after Ctrl-C, for the body of a `with` that can be continued.

    Args:
        output: what the same command goes on with.

    Raises:
        typer.Exit: with exit code 130, in the place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; run the same command to go on with {output}\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def write_line(text: str = "") -> None:
    """One line of a result, never wrapped or coloured."""
    sys.stdout.write(text + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; the first column is text, the others are aligned to the right.

    Args:
        title: line above the table.
        header: names of the columns.
        rows: the cells; integers get thousands separators, floats two digits.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        justify = "right" if index else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=bool(index))
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def build_values(report: BuildReport) -> dict[str, Any]:
    """A build's report as values that JSON can hold."""
    manifest, reading = report.manifest, report.reading
    splits: dict[str, Any] = {
        split: {
            "documents": manifest.num_documents(split),
            "tokens": manifest.num_tokens(split),
            "text_bytes": manifest.text_bytes(split),
        }
        for split in ("train", "heldout")
    }
    return {
        "dataset": str(report.folder),
        "fingerprint": report.fingerprint,
        "already_complete": reading is None,
        "shards": len(manifest.shards),
        "splits": splits,
        "documents": manifest.num_documents(),
        "tokens": manifest.num_tokens(),
        "text_bytes": manifest.text_bytes(),
        "bytes_per_token": manifest.text_bytes() / manifest.num_tokens(),
        "input_bytes": sum(source.input_bytes for source in manifest.sources),
        "dropped": dict(manifest.dropped),
        "notes": dict(manifest.notes),
        "examples": reading.examples if reading is not None else {},
        "resumed_units": report.resumed_units,
        "units_of_worker": report.units_of_worker,
        "seconds": report.seconds,
    }


def share_values(report: ShareReport) -> dict[str, Any]:
    """A share's report as values that JSON can hold."""
    return {**asdict(report), "folder": str(report.folder)}


def print_share(report: ShareReport) -> None:
    """The end report of an array task that others have still something to do after."""
    write_line(
        f"{report.task}: made {report.made_units} units, found {report.resumed_units} finished, "
        f"in {report.seconds:.1f} s"
    )
    write_line(
        f"{report.folder} is not complete: {report.finished_units} of {report.num_units} units "
        f"are finished"
    )
    for line in report.unfinished[:_MAX_EXAMPLES]:
        write_line(f"  {line}")
    if len(report.unfinished) > _MAX_EXAMPLES:
        write_line(f"  ... and {len(report.unfinished) - _MAX_EXAMPLES} more tasks")
    write_line(
        "the last task to finish does what remains; submit those that have failed once more, or "
        "run the same command with --executor processes to do the rest"
    )


def print_build(report: BuildReport) -> None:
    """The end report of a build."""
    manifest = report.manifest
    if report.reading is None:
        write_line(f"{report.folder} is complete already; nothing is left to do.")
    rows = [
        (split, documents, tokens, text_bytes, text_bytes / tokens)
        for split in ("train", "heldout")
        if (tokens := manifest.num_tokens(split))
        for documents in [manifest.num_documents(split)]
        for text_bytes in [manifest.text_bytes(split)]
    ]
    header = ("split", "documents", "tokens", "text bytes", "bytes a token")
    print_table(f"{report.folder}: {len(manifest.shards)} shards", header, rows)
    counts = ReadReport(dropped=dict(manifest.dropped), notes=dict(manifest.notes))
    print_reading(report.reading or counts)
    if manifest.dropped:
        write_line(f"every drop, one a line: {report.folder / DROPPED_NAME}")
    for warning in build_warnings(report):
        write_line(f"warning: {warning}")
    if report.resumed_units:
        write_line(f"{report.resumed_units} units were finished by an earlier run")
    if len(report.units_of_worker) > 1:
        made = sorted(report.units_of_worker.values())
        write_line(f"{len(made)} workers made {made[0]} to {made[-1]} units each")
    if report.reading is not None:
        rate = sum(source.input_bytes for source in manifest.sources) / report.seconds / 1e6
        write_line(f"{report.seconds:.1f} s, {rate:.1f} MB of input a second")
    write_line(f"fingerprint {report.fingerprint}")


def print_reading(reading: ReadReport) -> None:
    """What reading dropped or found odd, with examples."""
    for title, counts in (("dropped", reading.dropped), ("noted", reading.notes)):
        if counts:
            print_table(title, ("reason", "times"), list(counts.items()))
    lines = list(reading.lines())
    for line in lines[:_MAX_EXAMPLES]:
        write_line(f"  {line}")
    if len(lines) > _MAX_EXAMPLES:
        write_line("  ...")


def build_warnings(report: BuildReport) -> list[str]:
    """What is legal but seldom wanted in a new dataset."""
    manifest = report.manifest
    warnings = []
    for split in ("train", "heldout"):
        if not manifest.num_documents(split):
            warnings.append(
                f"no document went to the split {split}; add text or change --heldout-fraction"
            )
    tiny = sum(shard.num_tokens < _TINY_SHARD_TOKENS for shard in manifest.shards)
    if tiny > _MANY_SHARDS:
        warnings.append(
            f"{tiny} shards are smaller than 1 MiB, because every source has shards of its own; "
            f"name a folder, or quote the glob so that the shell does not expand it"
        )
    return warnings


def print_stats(groups: Sequence[GroupStats]) -> None:
    """Statistics of a dataset; lengths are in tokens."""
    header = ("source", "split", "documents", "tokens", "bytes/token", "mean", "p50", "p90", "p99")
    rows = [
        (g.source, g.split, g.documents, g.tokens, g.bytes_per_token, g.mean, g.p50, g.p90, g.p99)
        for g in groups
    ]
    print_table("lengths of documents in tokens", header, rows)


def print_verify(report: VerifyReport) -> None:
    """What was checked, and the rates that are not errors."""
    roundtrip = report.roundtrip
    write_line(f"all {report.files} files ({report.num_bytes:,} bytes) are what was written")
    write_line(
        f"{report.documents:,} documents, {report.tokens:,} tokens, "
        f"{report.unknown_tokens:,} of them unknown; ids and document ends are sound"
    )
    write_line(
        f"decoded and encoded again: {roundtrip.documents_changed:,} of {roundtrip.documents:,} "
        f"documents ({roundtrip.document_rate:.2%}) and {roundtrip.tokens_changed:,} of "
        f"{roundtrip.tokens:,} tokens ({roundtrip.token_rate:.4%}) changed"
    )
    parity = report.parity
    write_line(
        f"tokenizer.json against spm.model: {parity.mismatches:,} of {parity.texts:,} texts differ "
        f"(ties {parity.ties}, marks {parity.marks}, literals {parity.literals}, "
        f"other {parity.other})"
    )
    for name in report.unlisted:
        write_line(f"note: {name} is not part of the dataset")
    write_line(f"fingerprint {report.fingerprint}")


def stats_values(groups: Sequence[GroupStats]) -> list[dict[str, Any]]:
    """Statistics as values that JSON can hold."""
    return [asdict(group) for group in groups]
