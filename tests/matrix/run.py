"""Train every cell of the matrix and write the table.

    python -m tests.matrix.run [--ranks 1 2 4] [--only WORDS] [--keep] [--output MATRIX.json]

Worlds of one rank run side by side, one a core; larger ones one after another. The exit code is 1
if any cell is wrong. `--only "stage 3 bf16"` trains the cells whose names have all of these words;
`--keep` keeps what the output file says about the others.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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


def chosen(ranks, words) -> list[Cell]:
    """Cells that were asked for."""
    return [
        cell
        for cell in every_cell()
        if cell.ranks in ranks and all(word in str(cell).split() for word in words)
    ]


def run(cells, folder, on_line) -> dict:
    """Train what trains; the lines of all cells, judged."""
    lines = {cell: table.judged(cell, {}) for cell in cells}
    lock = threading.Lock()

    def listener(cell, line):
        with lock:
            line = {key: line[key] for key in ("measured", "failure") if key in line}
            lines[cell] = table.judged(cell, line)
            on_line(cell, lines[cell])

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
    return lines


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
    arguments = parser.parse_args(argv)
    cells = chosen(arguments.ranks, arguments.only.split())
    started, console = time.monotonic(), Console()
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
            progress.update(task, advance=1, description=str(cell))
            if "failure" in line:
                progress.console.print(f"{cell}: {line['failure']}", markup=False)

        lines = run(cells, folder, on_line)
        references = folder / "references"
        references.mkdir(exist_ok=True)
        found = table.document(lines, noise(references), time.monotonic() - started)
    if arguments.keep and arguments.output.exists():
        found = table.with_cells_of(found, json.loads(arguments.output.read_text()))
    table.write(found, arguments.output)
    wrong = table.failures(found)
    console.print(
        f"{len(cells)} cells, {len(wrong)} wrong; {arguments.output.with_suffix('.md')}",
        markup=False,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
