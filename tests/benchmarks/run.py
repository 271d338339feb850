"""The benchmarks of a CPU and the counts: ratios against peers measured in the same run.

    python tests/benchmarks/run.py [NAME...] [--tables]

A benchmark is a process of its own (`bench_NAME.py`), one after the other, with one thread. Each
writes results/NAME-DEVICE.json; the tables here and in results/README.md are made from those files
and from what `gpu.py` wrote on a GPU. Nothing needs to be installed beside what training needs; a
benchmark whose peer is missing says so and is left out.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXIT_SKIPPED = 77  # as in rounds.py, which a file started by its path cannot import
NAMES = sorted(
    path.stem.removeprefix("bench_").replace("_", "-") for path in HERE.glob("bench_*.py")
)
GPU_FILES = "gpu-*.json"
README = """\
# Results

Written by `python tests/benchmarks/run.py` and, on a GPU, `python tests/benchmarks/gpu.py`; edit
nothing here by hand. A ratio says how many times
the peer's rate a case reaches, both measured in the same rounds: its median, and in brackets the
lowest and the highest round. Rates belong to the device, its load and its day; ratios travel
better. The JSON files hold every round, the shapes and the versions.
"""


def environment() -> dict[str, str]:
    """The environment of a benchmark: one thread, no network, our packages importable."""
    added = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    added |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **added, "PYTHONPATH": path}


def run(name: str, console: Console) -> tuple[bool, dict[str, Any] | None]:
    """Run one benchmark; (whether nothing went wrong, its result if it has one)."""
    console.print(f"{name} ...", style="dim")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.bench_{name.replace('-', '_')}"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode == EXIT_SKIPPED:
        console.print(f"{name}: left out, {last[0]}", style="yellow")
        return True, None
    if done.returncode:
        console.print(f"{name} failed with exit code {done.returncode}", style="red")
        return False, None
    return True, json.loads(Path(last[0]).read_text(encoding="utf-8"))


def ratio_text(row: dict[str, Any]) -> str:
    """Median and range of a ratio."""
    return f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def figure(value: float) -> str:
    """Three digits at least, all of them before the point, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate_text(result: dict[str, Any], case: str) -> str:
    """A rate with its unit."""
    return f"{figure(result['rates'][case])} {result['unit']} a {result['clock'].removesuffix('s')}"


def ratio_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Benchmark, device, case, peer, ratio, rate, date and load of every pair."""
    return [
        (
            result["benchmark"],
            result["device"],
            row["case"],
            row["peer"],
            ratio_text(row),
            rate_text(result, row["case"]),
            result["date"],
            f"{result['load_average']['before']:.1f} on {result['cores']}",
        )
        for result in results
        for row in result["ratios"]
    ]


COLUMNS = ("benchmark", "device", "case", "peer", "ratio", "the case's rate", "date", "load, cores")


def fact_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Exact counts and figures beside the ratios."""
    return [
        (result["benchmark"], result["device"], name, figure(value))
        for result in results
        for name, value in result["facts"].items()
    ]


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


GPU_COLUMNS = (
    *("part", "size", "device", "cell", "against", "ratio"),
    *("tokens/s", "ours", "MFU", "peak GiB", "beyond state", "date"),
)


def gpu_row(result: dict[str, Any], name: str, cell: dict[str, Any]) -> tuple[str, ...]:
    """A cell of a GPU benchmark; a ratio says how many times its rate ours reaches."""
    head = (result["benchmark"].removeprefix("gpu-"), result["size"], result["device"], name)
    if cell["status"] != "measured":
        return (*head, "", f"{cell['status']}: {cell.get('reason', '')}", *6 * ("",))
    if "passed" in cell:
        counts = (
            f"{cell['passed']} passed, {cell['failed_tests']} failed, {cell['skipped']} skipped"
        )
        return (*head, "", counts, *5 * ("",), cell["date"])

    def shown(key: str) -> str:
        return figure(cell[key]) if key in cell else ""

    rates = (f"{cell['ratio']:.2f}", shown("tokens_per_second"), shown("ours_tokens_per_second"))
    memory = (shown("peak_gib"), shown("beyond_state_gib"))
    return (*head, cell["against"], *rates, shown("mfu"), *memory, cell["date"])


def gpu_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Every cell of every GPU benchmark."""
    return [
        gpu_row(result, name, cell) for result in results for name, cell in result["cells"].items()
    ]


def load(folder: Path, pattern: str, without: str = "") -> list[dict[str, Any]]:
    """Read result files."""
    left_out = set(folder.glob(without)) if without else set()
    files = sorted(path for path in folder.glob(pattern) if path not in left_out)
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def write_readme(folder: Path) -> None:
    """Make results/README.md from all result files."""
    results = load(folder, "*.json", without=GPU_FILES)
    notes = [f"- {r['benchmark']}, {r['device']}: {note}" for r in results for note in r["notes"]]
    parts = [README, markdown(COLUMNS, ratio_rows(results))]
    parts.append(markdown(("benchmark", "device", "figure", "value"), fact_rows(results)))
    parts += ["\n".join(notes) + "\n"] if notes else []
    cells = gpu_rows(load(folder, GPU_FILES))
    parts += [markdown(GPU_COLUMNS, cells)] if cells else []
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    """Run what was asked for; the exit code is 1 if a benchmark failed.

    Args:
        words: The command line, without the program; None for this process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--tables", action="store_true", help="only make the tables again")
    options = parser.parse_args(words)
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    console = Console()
    wanted = [] if options.tables else options.names or NAMES
    outcomes = [run(name, console) for name in wanted]
    results = [result for _, result in outcomes if result]
    table = Table(*COLUMNS[:6], title="ratios, the peer = 1")
    for row in ratio_rows(results):
        table.add_row(*row[:6])
    console.print(table)
    facts = Table("benchmark", "device", "figure", "value")
    for row in fact_rows(results):
        facts.add_row(*row)
    console.print(facts)
    write_readme(HERE / "results")
    return 0 if all(worked for worked, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
