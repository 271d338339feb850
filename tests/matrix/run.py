"""Train every cell of the matrix and write the table.

    python -m tests.matrix.run [--ranks 1 2 4] [--only WORDS] [--keep] [--missing] [--output FILE]

Worlds of one rank run side by side, one a core; larger ones one after another. The exit code is 1
if any cell is wrong. `--only "stage 3 bf16"` trains the cells whose names have all of these words;
`--keep` keeps what the output file says about the others, `--missing` trains only those that are
not in it or are wrong there. The file is written now and then: a run that was ended goes on.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.matrix import table
from tests.matrix.cells import RANKS, Cell, every_cell
from tests.matrix.oracle import load_or_train
from tests.matrix.truth import TruthKey, distance
from tests.matrix.worlds import Request, cores, train_cells

RESULTS = Path(__file__).parent / "results" / "matrix.json"
NOISE_OF = ("bf16", "autocast", "fp16")
CELLS_BETWEEN_WRITES = 20


def chosen(ranks, words) -> list[Cell]:
    """Cells that were asked for."""
    return [
        cell
        for cell in every_cell()
        if cell.ranks in ranks and all(word in str(cell).split() for word in words)
    ]


def run(cells, folder, on_line) -> None:
    """Train what trains; `on_line` is called with a cell and its judged line, one at a time."""
    lock = threading.Lock()

    def listener(cell, line):
        with lock:
            line = {key: line[key] for key in ("measured", "failure") if key in line}
            on_line(cell, table.judged(cell, line))

    request = Request(folder, listener)
    for ranks in RANKS:
        trained = [cell for cell in cells if cell.ranks == ranks and cell.trains()]
        worlds = max(1, cores() // ranks)
        shares = [share for share in (trained[n::worlds] for n in range(worlds)) if share]
        with ThreadPoolExecutor(worlds) as pool:
            started = [
                pool.submit(train_cells, share, ranks, request, f"{ranks}-ranks-{number}")
                for number, share in enumerate(shares)
            ]
        for one in started:
            one.result()


@dataclass
class Report:
    """The output file, which grows while cells are trained."""

    path: Path
    older: dict | None
    """What the file said before, where that is kept."""
    lines: dict
    """Cell -> judged line, of all cells that have an answer."""
    started_seconds: float

    def write(self, figures=None) -> dict:
        """Write the file, with the noise that is known; its content."""
        seconds = time.monotonic() - self.started_seconds
        found = table.document(self.lines, figures or {}, seconds)
        if self.older is not None:
            found = table.with_cells_of(found, self.older)
        table.write(found, self.path)
        return found


def noise(folder) -> dict:
    """How far the reference is from itself, with one and with four micro batches a step."""
    found = {}
    for precision in NOISE_OF:
        for update in ("decoupled", "joint"):
            one, four = (
                load_or_train(TruthKey(precision, update, count), folder) for count in (1, 4)
            )
            found[f"{precision} {update}"] = distance(one, four, update).to_json()
    return found


def main(argv=None) -> int:
    """Run as a command; the exit code."""
    parser = argparse.ArgumentParser(
        description="Train every cell of the matrix and write the table."
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), choices=RANKS)
    parser.add_argument("--only", default="", help="words that a cell's name must have")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="keep the file's other cells")
    parser.add_argument("--missing", action="store_true", help="only what the file lacks")
    arguments = parser.parse_args(argv)
    cells, older = chosen(arguments.ranks, arguments.only.split()), None
    if (arguments.keep or arguments.missing) and arguments.output.exists():
        older = json.loads(arguments.output.read_text())
    if arguments.missing and older is not None:
        known = table.answered(older)
        cells = [cell for cell in cells if cell not in known]
    refused = {cell: table.judged(cell, {}) for cell in cells if not cell.trains()}
    report = Report(arguments.output, older, refused, time.monotonic())
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="matrix-") as name,
        Progress(*columns, console=console) as progress,
    ):
        folder = Path(name)
        task = progress.add_task("cells", total=sum(cell.trains() for cell in cells))

        def on_line(cell, line):
            report.lines[cell] = line
            progress.update(task, advance=1, description=str(cell))
            if "failure" in line:
                progress.console.print(f"{cell}: {line['failure']}", markup=False)
            if len(report.lines) % CELLS_BETWEEN_WRITES == 0:
                report.write()

        run(cells, folder, on_line)
        references = folder / "references"
        references.mkdir(exist_ok=True)
        found = report.write(noise(references))
    wrong = table.failures(found)
    console.print(
        f"{len(found['cells'])} cells, {len(wrong)} wrong; {report.path.with_suffix('.md')}",
        markup=False,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
