"""Cells of a GPU benchmark: in the order of their value, each on disk as soon as it is done.

What a CPU writes that tries the programs begins with "smoke-" instead of "gpu-", in the file's name
and in its head: whoever collects measurements of GPUs does not find it.

A cell is one comparison. `run_cells` runs them until the time is over: the next cell begins only
if what the last one took is still left. A cell that raises is a result ("failed", with the reason);
one that takes the process with it is found by the next process of the same run, which goes on
behind it.
"""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.rounds import device_name, slug, versions

BROKEN_DEVICE = "CUDA error"
"""Behind such an error every later call of the process fails too."""
MARGIN = 1.25
"""The next cell may take this much longer than the last one."""
EXIT_BROKEN = 70
"""Of a process whose device answers no longer; the next one goes on behind the cell."""
MEASURED, FAILED, LEFT_OUT, RUNNING = "measured", "failed", "left out", "running"


@dataclass(frozen=True)
class Cell:
    """One comparison; `run` returns figures, JSON-ready."""

    name: str
    run: Callable[[], dict[str, Any]]


class ResultFile:
    """gpu-PART-SIZE-DEVICE.json, or smoke-...: replaced as a whole whenever a cell changes."""

    def __init__(self, folder: Path, part: str, size: str, device: str, run_id: str) -> None:
        """Open it, or begin it anew.

        Args:
            folder: Where results are.
            part: "tests", "attention", "layer" or "step".
            size: Of the networks.
            device: "cuda" or "cpu".
            run_id: Of the run; the cells of another run stay until they are measured again, unless
                versions have changed.
        """
        name = device_name(device)
        benchmark = f"{'gpu' if device == 'cuda' else 'smoke'}-{part}"
        self.path = folder / f"{benchmark}-{size}-{slug(name)}.json"
        self.run_id = run_id
        head = {"benchmark": benchmark, "size": size, "device": name, "versions": versions()}
        self.document: dict[str, Any] = {**head, "shape": {}, "cells": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if all(found[key] == value for key, value in head.items()):
                self.document = found
        for cell in self.document["cells"].values():
            if cell["status"] == RUNNING:
                cell |= {"status": FAILED, "reason": "the process ended in it"}

    def is_done(self, name: str) -> bool:
        """Whether this run has a result of the cell, a failure being one."""
        cell = self.document["cells"].get(name, {})
        return cell.get("run") == self.run_id and cell["status"] in (MEASURED, FAILED)

    def put(self, name: str, status: str, **figures: Any) -> None:
        """Write a cell."""
        date = datetime.now(UTC).date().isoformat()
        cell = {"status": status, "run": self.run_id, "date": date, **figures}
        self.document["cells"][name] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".partial")
        draft.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def leave_out(self, name: str) -> None:
        """Note that there was no time; a result of an earlier run stays."""
        if self.document["cells"].get(name, {}).get("status") != MEASURED:
            self.put(name, LEFT_OUT, reason="no time was left")


def run_cells(
    cells: Sequence[Cell],
    results: ResultFile,
    deadline_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> None:
    """Run cells in their order until the time is over.

    Args:
        cells: The most valuable first.
        results: Where they go; what it has of this run is not run again.
        deadline_seconds: On the clock.
        clock: Seconds.
        say: Told what happens.

    Raises:
        SystemExit: A cell has left the device broken.
    """
    took_seconds = 0.0
    for cell in cells:
        if results.is_done(cell.name):
            continue
        begun_seconds = clock()
        if begun_seconds + MARGIN * took_seconds >= deadline_seconds:
            results.leave_out(cell.name)
            say(f"{cell.name}: left out, no time")
            continue
        results.put(cell.name, RUNNING)
        try:
            figures = cell.run()
            status = MEASURED
        except Exception as error:
            if not isinstance(error, ImportError):  # a peer that is not there
                traceback.print_exc()
            figures, status = {"reason": f"{type(error).__name__}: {error}"[:400]}, FAILED
        took_seconds = clock() - begun_seconds
        results.put(cell.name, status, took_seconds=round(took_seconds, 2), **figures)
        say(f"{cell.name}: {status} in {took_seconds:.1f} s{_brief(figures)}")
        if BROKEN_DEVICE in figures.get("reason", ""):
            raise SystemExit(EXIT_BROKEN)


def _brief(figures: dict[str, Any]) -> str:
    """The first figures of a cell, for a line."""
    shown = [
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
        if isinstance(value, float | int | str)
    ]
    return f": {', '.join(shown)}" if shown else ""
