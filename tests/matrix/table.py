"""The matrix as a JSON file and as Markdown.

A cell of the table is "loss / weights": its largest relative difference of a loss, and of a final
weight; `refused [n]` where the program refuses it, with its words below; FAILED where it is wrong.
"""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product

from tests.matrix.bounds import BOUNDS
from tests.matrix.cells import (
    ACCUMULATIONS,
    OFFLOADS,
    PRECISIONS,
    RANKS,
    RECOMPUTATIONS,
    STAGES,
    UPDATES,
    Cell,
    every_cell,
)
from tests.matrix.shared_run import STEPS

INTRODUCTION = """# Every way to compute a run, against plain torch

Written by `python -m tests.matrix.run`; edit nothing here by hand. {steps} steps of two small
networks without dropout; DeepSpeed {deepspeed}, torch {torch}, {date}, {minutes:.0f} minutes.
{trained:,} cells trained, {refused} refused by name, {failed} failed.

A cell is *loss / weights*: the largest relative difference of a loss in any step, and of a final
weight (against the largest of its parameter), from a single process without any engine: in fp64
for fp32 cells, with fp32 masters and low precision passes for the others. `matrix.json` has all
figures: gradient norms, the first steps alone, flipped draws.
(p) trained under a test's patch only, because the program refuses it on a CPU.
"""


def document(lines, noise, seconds):
    """The JSON file: `lines` has, for each cell, "measured", "refused" or "failure"."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
        "python": platform.python_version(),
        "steps": STEPS,
        "seconds": round(seconds),
        "bounds": {precision: asdict(bounds) for precision, bounds in BOUNDS.items()},
        "noise": noise,
        "cells": [cell.to_json() | line for cell, line in lines.items()],
    }


def with_cells_of(found, older):
    """The newer file, with the cells and the seconds of an older one that it lacks."""
    rows = {Cell(**axes(row)): row for row in found["cells"]}
    for row in older["cells"]:
        cell = Cell(**axes(row))
        # Judged by today's bounds and refusals; a world that failed has no figures to judge.
        known = {"measured": row["measured"]} if "measured" in row else {}
        if not known and "failure" in row:
            known = {"failure": row["failure"]}
        rows.setdefault(cell, cell.to_json() | judged(cell, known))
    return found | {
        "seconds": found["seconds"] + older["seconds"],
        "cells": [rows[cell] for cell in every_cell() if cell in rows],
    }


def answered(found):
    """Cells of a JSON file that are refused, or trained and, by today's bounds, right."""
    rows = {Cell(**axes(row)): row for row in found["cells"]}
    return {
        cell
        for cell, row in rows.items()
        if not cell.trains()
        or ("measured" in row and not BOUNDS[cell.precision].exceeded(row["measured"]))
    }


def failures(found):
    """Cells of the JSON file that are wrong, in words."""
    return [
        f"{Cell(**axes(row))}: {row['failure'].strip().splitlines()[-1]}"
        for row in found["cells"]
        if "failure" in row
    ]


def axes(row):
    """The axes of a row of the JSON file."""
    return {name: row[name] for name in Cell.__dataclass_fields__}


def judged(cell: Cell, line):
    """A world's line, with a failure where a figure is out of bounds, and the refusal if any."""
    refusal = cell.refusal()
    if refusal:
        line = {"refused": refusal, **line}
    if "measured" in line:
        exceeded = BOUNDS[cell.precision].exceeded(line["measured"])
        if exceeded:
            line = {**line, "failure": f"out of bounds: {', '.join(exceeded)}"}
    return line


def markdown(found):
    """The Markdown file."""
    rows = {Cell(**axes(row)): row for row in found["cells"]}
    reasons = sorted({row["refused"] for row in rows.values() if "refused" in row})
    parts = [
        INTRODUCTION.format(
            steps=found["steps"],
            deepspeed=found["versions"]["deepspeed"],
            torch=found["versions"]["torch"],
            date=found["date"][:10],
            minutes=found["seconds"] / 60,
            trained=sum("measured" in row for row in rows.values()),
            refused=sum("refused" in row for row in rows.values()),
            failed=len(failures(found)),
        )
    ]
    parts += [_world(rows, reasons, ranks) for ranks in RANKS]
    parts.append("## Refused\n\n" + "\n".join(f"[{n}] {why}\n" for n, why in enumerate(reasons, 1)))
    parts.append(_limits(found))
    wrong = failures(found)
    if wrong:
        parts.append("## Failed\n\n" + "\n".join(f"- {line}" for line in wrong) + "\n")
    return "\n".join(parts)


def _world(rows, reasons, ranks):
    """The table of one number of ranks."""
    columns = list(product(UPDATES, ACCUMULATIONS, RECOMPUTATIONS))
    names = [f"{u}, {a} micro, {'recomputed' if r == 'full' else 'kept'}" for u, a, r in columns]
    lines = [
        f"## {ranks} rank{'s' * (ranks > 1)}\n",
        f"| stage | precision | offload | {' | '.join(names)} |",
        "| --- " * (3 + len(columns)) + "|",
    ]
    for stage, precision, offload in product(STAGES, PRECISIONS, OFFLOADS):
        cells = [
            _words(
                rows.get(Cell(stage, precision, accumulation, again, offload, ranks, update)),
                reasons,
            )
            for update, accumulation, again in columns
        ]
        lines.append(f"| {stage} | {precision} | {offload} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _words(row, reasons):
    """One cell of the table."""
    if row is None:
        return "not run"
    refused = f"refused [{reasons.index(row['refused']) + 1}]" if "refused" in row else ""
    if "failure" in row:
        return "FAILED"
    if "measured" not in row:
        return refused
    figures = f"{row['measured']['loss']:.0e} / {row['measured']['weight']:.0e}"
    return f"{refused}, (p) {figures}" if refused else figures


def _limits(found):
    """Bounds, and how far two runs of the reference are apart."""
    columns = list(found["bounds"]["fp32"])
    lines = ["## Bounds and noise\n", f"| | {' | '.join(columns)} |"]
    lines.append("| --- " * (1 + len(columns)) + "|")
    for precision, bounds in found["bounds"].items():
        cells = " | ".join(f"{bounds[name]:.1e}" for name in columns)
        lines.append(f"| {precision}, bound | {cells} |")
    for name, figures in found["noise"].items():
        cells = " | ".join(f"{figures[column]:.1e}" for column in columns)
        lines.append(f"| {name}, noise | {cells} |")
    lines.append(
        "\nNoise: the reference against itself with another number of micro batches, which is the"
        " same training with other roundings.\n"
    )
    return "\n".join(lines)


def write(found, path):
    """Write the JSON file, and the Markdown file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found))
