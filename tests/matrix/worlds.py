"""Start worlds for cells, and read what they find.

One world has as many processes as its cells have ranks, and trains them all. When it dies or hangs,
the cell that it was at has failed, and another world goes on behind it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.matrix.cells import Cell
from tests.worlds import ROOT, environment

HANG_SECONDS = 1800
"""Without a finished cell; a busy machine may need minutes for the largest."""
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
TAIL_LINES = 20

Listener = Callable[[Cell, dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What worlds are asked for."""

    folder: Path
    """For references and for what the worlds write."""
    listener: Listener
    """Called with a cell and its line: "measured", or "failure"."""
    cpu_adam_stands_in: bool = False
    """Torch's AdamW in the place of DeepSpeed's CPU Adam, which takes a minute to compile."""


def train_cells(cells: list[Cell], ranks: int, request: Request, name: str) -> None:
    """Train cells of one number of ranks, in as many worlds as it takes."""
    left, number = list(cells), 0
    while left:
        done = _one_world(left, ranks, request, f"{name}-{number}")
        left, number = left[done:], number + 1


def _one_world(cells: list[Cell], ranks: int, request: Request, name: str) -> int:
    """Train cells until the world ends; how many have a line now."""
    results, output = request.folder / f"{name}.jsonl", request.folder / f"{name}.log"
    results.write_text("")
    asked = request.folder / f"{name}.json"
    asked.write_text(
        json.dumps(
            {
                "cells": [cell.to_json() for cell in cells],
                "cpu_adam_stands_in": request.cpu_adam_stands_in,
            }
        )
    )
    references = request.folder / "references"
    references.mkdir(exist_ok=True)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    words = ["tests.matrix.world", str(asked), str(references), str(results)]
    # Without it DeepSpeed starts a process for every bucket, to count the machine's nodes.
    surroundings = {**environment(), "LOCAL_SIZE": str(ranks), "OMP_WAIT_POLICY": "PASSIVE"}
    seen, heard_seconds = 0, time.monotonic()
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *(launcher if ranks > 1 else []), *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=surroundings,
            cwd=ROOT,
            preexec_fn=_end_with_parent,
        )
        try:
            while True:
                has_ended = process.poll() is not None
                lines = results.read_text().splitlines(keepends=True)
                whole = [json.loads(line) for line in lines if line.endswith("\n")]
                for line in whole[seen:]:
                    request.listener(Cell(**line["cell"]), line)
                    if "failure" in line:
                        return seen + 1
                    seen, heard_seconds = seen + 1, time.monotonic()
                if has_ended or time.monotonic() - heard_seconds > HANG_SECONDS:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            _end(process)
    if seen < len(cells):
        tail = "".join(output.read_text().splitlines(keepends=True)[-TAIL_LINES:])
        why = f"the world ended with code {process.returncode}" if has_ended else "the world hangs"
        request.listener(cells[seen], {"failure": f"{why}\n{tail}"})
        seen += 1
    return seen


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a launcher with all its ranks."""
    if process.poll() is None:
        process.terminate()  # torchrun ends its ranks, and kills them if they do not listen
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
