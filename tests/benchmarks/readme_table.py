"""The performance table of the project's README, made from the result files.

    python tests/benchmarks/readme_table.py            prints it
    python tests/benchmarks/readme_table.py --write README.md

A row says what is asked for and what was found, and how: measured on which device and when, counted
exactly, or only modelled, by `deberta plan`. The newest result of a GPU counts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config_loading import load_run_config
from pipeline.plan.devices import Cluster, gpu_type
from pipeline.plan.search import default_deepspeed, fastest, propose

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN = "<!-- made by tests/benchmarks/readme_table.py from tests/benchmarks/results -->"
END = "<!-- end of the table -->"
ABSENT = "not measured"

Result = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A figure, and where it comes from."""

    figure: str
    how: str


Finder = Callable[[list[Result]], Found | None]


@dataclass(frozen=True)
class Row:
    """What is asked for."""

    what: str
    at_least: str
    aim: str
    find: Finder


def measured(result: Result, date: str) -> str:
    """Where and when."""
    return f"measured, {result['device']}, {date}"


def newest(results: list[Result], benchmark: str, size: str | None = None) -> list[Result]:
    """Results of a benchmark, the newest first."""
    found = [r for r in results if r["benchmark"] == benchmark and r.get("size") == size]

    def date(result: Result) -> str:
        return result.get("date") or max(c["date"] for c in result["cells"].values())

    return sorted(found, key=date, reverse=True)


def ratio(benchmark: str, case: str, peer: str) -> Finder:
    """A ratio of a CPU benchmark."""

    def find(results: list[Result]) -> Found | None:
        for result in newest(results, benchmark):
            for row in result["ratios"]:
                if (row["case"], row["peer"]) == (case, peer):
                    return Found(f"{row['median']:.2f}x", measured(result, result["date"]))
        return None

    return find


def fact(
    benchmark: str, name: str, unit: str, factor: float = 1.0, how: str = "measured"
) -> Finder:
    """A figure of a CPU benchmark beside its ratios."""

    def find(results: list[Result]) -> Found | None:
        for result in newest(results, benchmark):
            if name in result["facts"]:
                value = factor * result["facts"][name]
                text = f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
                return Found(f"{text} {unit}", f"{how}, {result['device']}, {result['date']}")
        return None

    return find


def traffic(ours: str) -> Finder:
    """Bytes of our layer, and of transformers' beside them."""

    def find(results: list[Result]) -> Found | None:
        for result in newest(results, "traffic"):
            facts = result["facts"]
            name = f"KiB a token, dropout 0, {ours}"
            if name in facts:
                theirs = facts["KiB a token, dropout 0, transformers"]
                text = f"{facts[name]:,.0f} KiB (transformers {theirs:,.0f})"
                return Found(text, f"counted, {result['date']}")
        return None

    return find


def cell(part: str, name: str, show: Callable[[dict[str, Any]], str | None]) -> Finder:
    """A figure of a cell on a GPU, at large."""

    def find(results: list[Result]) -> Found | None:
        for result in newest(results, f"gpu-{part}", "large"):
            found = result["cells"].get(name, {"status": "absent"})
            text = show(found) if found["status"] == "measured" else None
            if text is not None:
                return Found(text, measured(result, found["date"]))
        return None

    return find


def show_ratio(found: dict[str, Any]) -> str:
    """How many times the peer's rate."""
    return f"{found['ratio']:.2f}x"


def show_rate(found: dict[str, Any]) -> str:
    """Ours, with MFU where the peak is known."""
    mfu = f" ({found['ours_mfu']:.0%})" if "ours_mfu" in found else ""
    return f"{found['ours_tokens_per_second']:,.0f}{mfu}"


def show_memory(found: dict[str, Any]) -> str | None:
    """Ours as a share of the peer's, and both totals."""
    if "beyond_state_gib" not in found:
        return None
    share = found["ours_beyond_state_gib"] / found["beyond_state_gib"]
    return f"{share:.0%} (total {found['ours_peak_gib']:.1f} of {found['peak_gib']:.1f} GiB)"


def planned(_results: list[Result]) -> Found:
    """The plan of large on one H100: what stands here until somebody measures."""
    config, cluster = load_run_config("deberta_v3_large"), Cluster.of(gpu_type("h100"), 1, 1, 400.0)
    plan = fastest(propose(config, default_deepspeed(config, cluster), cluster))
    assert plan is not None, "large does not fit an H100"
    figure = f"{plan.tokens_per_second / 1000:,.0f}k ({plan.mfu:.0%})"
    return Found(figure, f"modelled by `deberta plan` (a roofline): {plan.settings}")


def first(*finders: Finder) -> Finder:
    """What the first finder finds that finds anything."""
    return lambda results: next(filter(None, (find(results) for find in finders)), None)


OP = "32 x 512: "
ROWS = [
    Row(
        "aten bytes a token and layer, dropout 0, `torch`",
        *("1,060 KiB", "900"),
        traffic("ours, torch"),
    ),
    Row(
        "the same, compiled layer with `triton`, its inner traffic included",
        *("600 KiB", "400"),
        traffic("ours, triton, compiled layer"),
    ),
    Row(
        "scaled step, CPU, against naive transformers",
        *("1.4x", "1.5x"),
        ratio("step", "ours", "transformers"),
    ),
    Row(
        "scaled step, CPU, against the released algorithm",
        *("1.04x", "1.1x"),
        ratio("step", "ours", "released algorithm"),
    ),
    Row(
        "attention, both passes, B32 H16 S512 d64, against transformers eager",
        *("4x", "6x"),
        cell("attention", f"{OP}transformers", show_ratio),
    ),
    Row(
        "the same against disentangled-flash 1.1.1",
        *("2x", "3x"),
        cell("attention", f"{OP}disentangled-flash", show_ratio),
    ),
    Row(
        "step of large against transformers eager",
        *("2.5x", "3.3x"),
        cell("step", "transformers", show_ratio),
    ),
    Row(
        "against transformers compiled, masked logits",
        *("1.15x", "1.25x"),
        cell("step", "transformers, compiled, masked logits", show_ratio),
    ),
    Row(
        "against transformers with disentangled-flash",
        *("1.3x", "1.6x"),
        cell("step", "transformers, masked logits, disentangled-flash", show_ratio),
    ),
    Row(
        "large, tokens/s on one H100 (MFU)",
        *("110k (36 %)", "122k (40 %)"),
        first(cell("step", "transformers", show_rate), planned),
    ),
    Row(
        "peak memory less weights, gradients and optimizer state, of transformers'",
        *("40 %", "30 %"),
        cell("step", "transformers", show_memory),
    ),
    Row(
        "loader, warm, sequences at given places, against Megatron's IndexedDataset",
        *("4x", ""),
        ratio("loader", "sequences", "IndexedDataset"),
    ),
    Row(
        "against Hugging Face datasets, torch format",
        *("10x", ""),
        ratio("loader", "sequences", "arrow, torch"),
    ),
    Row(
        "with the order and comparing all again, against IndexedDataset without either",
        *("", ""),
        ratio("loader", "batches", "IndexedDataset"),
    ),
    Row(
        "loader, cold, against Megatron's IndexedDataset",
        *("50x", ""),
        ratio("loader-cold", "whole pass", "IndexedDataset"),
    ),
    Row(
        "the disk alone: our files read end to end by four threads, nothing else done",
        *("", ""),
        ratio("loader-cold", "four streams", "IndexedDataset"),
    ),
    Row(
        "loader, cold, against that",
        *("", ""),
        ratio("loader-cold", "whole pass", "four streams"),
    ),
    Row(
        "masking against DataCollatorForLanguageModeling",
        *("50x", ""),
        ratio("masking", "uniform", "collator"),
    ),
    Row(
        "masking against the original's generator",
        *("100x", ""),
        ratio("masking", "windowed", "original"),
    ),
    Row(
        "MinHash end to end in memory, against datasketch",
        *("3.5x", "8x"),
        ratio("dedup", "in memory", "datasketch"),
    ),
    Row(
        "`deberta-prep dedup`, files and exact verification included, against the same",
        *("", ""),
        ratio("dedup", "dedup command", "datasketch"),
    ),
    Row(
        "JSON lines to shards, 64 MB of real text, 128,000 pieces, against Megatron's loop with "
        "sentencepiece, start-up left out on both sides",
        *("1.2x", "2.5x"),
        ratio("prep", "build, started", "Megatron"),
    ),
    Row(
        "the same with our start-up counted: models, tokenizer files, manifest",
        *("", ""),
        ratio("prep", "build", "Megatron"),
    ),
    Row(
        "the same against the loop with its pool of one worker, as the script runs it",
        *("", ""),
        ratio("prep", "build", "Megatron, pool"),
    ),
    Row(
        "the same against datasets.map with the fast tokenizer",
        *("7x", "15x"),
        ratio("prep", "build", "datasets"),
    ),
    Row(
        "beside encoding: reading, cleaning, splits, writing, hashes",
        *("10 CPU-ms a MB", ""),
        fact("prep-beside", "CPU-ms a MB", "CPU-ms a MB"),
    ),
    Row(
        "memory of a worker, 1 GB of text, 128,000 pieces",
        *("1.5 GiB", ""),
        fact("prep-large", "build: peak MiB of a process", "MiB"),
    ),
    Row(
        "the same, finding duplicates",
        *("1.5 GiB", ""),
        fact("prep-large", "dedup: peak MiB of a process", "MiB"),
    ),
    Row(
        "160 GB on 64 ranks, from the CPU-seconds of that 1 GB: build",
        *("", ""),
        fact(
            "prep-large",
            "build: hours for 160 GB on 64 ranks, calculated",
            "minutes",
            60.0,
            "calculated",
        ),
    ),
    Row(
        "the same, finding duplicates",
        *("", ""),
        fact(
            "prep-large",
            "dedup: hours for 160 GB on 64 ranks, calculated",
            "minutes",
            60.0,
            "calculated",
        ),
    ),
]
COLUMNS = ("what", "at least", "aim", "found", "how")


def table(folder: Path) -> str:
    """Make the table.

    Args:
        folder: Of result files.

    Returns:
        Markdown.
    """
    files = sorted(folder.glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in ROWS:
        found = row.find(results) or Found("", ABSENT)
        lines.append((row.what, row.at_least, row.aim, found.figure, found.how))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def replaced(text: str, made: str, begin: str = BEGIN, end: str = END) -> str | None:
    """Put a table between the marks of a page; None where it has none."""
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        return None
    return f"{head}{begin}\n{made}{end}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or put it into a page.

    Args:
        argv: Words after the program's name; the process's own where None.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="a page with the marks of the table")
    options = parser.parse_args(argv)
    made = table(options.results)
    if options.write is None:
        print(made, end="")
        return 0
    page = replaced(options.write.read_text(encoding="utf-8"), made)
    if page is None:
        sys.exit(f"{options.write} lacks the lines {BEGIN!r} and {END!r}, between which it belongs")
    options.write.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
