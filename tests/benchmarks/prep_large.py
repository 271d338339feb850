"""A gigabyte of text to shards by two workers: memory and time, with deduplication and without.

    python -m tests.benchmarks.prep_large        minutes; not part of `make bench`

The text is 207 MB of `real_text.py` five times, each but the first with a tenth of its words
replaced by others of it, seeded: too far apart to be duplicates. The commands are `deberta-prep
build`, `deberta-prep dedup` and `build --dedup`, from start to end.

What 160 GB would take on 64 ranks is calculated from the CPU-seconds a MB: a core like this one for
each rank, files that are read as fast as they are used, and the master's part left out.
"""

import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.real_text import (
    CORPUS,
    PIECES,
    NoText,
    sample_with_tokenizer,
    take,
)
from tests.benchmarks.rounds import Outcome, main, require, skip

TEXT_BYTES = 207_000_000
TOKENIZER_BYTES = 64_000_000
"""As in bench_prep.py, whose vocabulary this is."""
COPIES = 5
REPLACED_SHARE = 0.1
WORKERS = 2
TARGET_BYTES, TARGET_RANKS = 160e9, 64
_POOL_WORDS = 200_000
_WATCH_SECONDS = 0.1


def respelled(texts: list[str], seed: int) -> Iterator[str]:
    """The texts with some words replaced by other words of theirs; as they are for seed 0."""
    rng = random.Random(seed)
    pool = rng.choices([word for text in texts[::20] for word in text.split()], k=_POOL_WORDS)
    for text in texts:
        words = text.split(" ")
        if seed:
            for place in rng.sample(range(len(words)), int(REPLACED_SHARE * len(words))):
                words[place] = pool[rng.randrange(_POOL_WORDS)]
        yield " ".join(words)


def write_corpus(folder: Path) -> int:
    """Write a file for each copy, unless they are there; returns their bytes of text."""
    sizes = folder / "sizes.json"
    if not sizes.exists():
        folder.mkdir(exist_ok=True)
        texts, total = take(TEXT_BYTES), 0
        for seed in range(COPIES):
            with (folder / f"copy-{seed}.jsonl").open("w", encoding="utf-8") as file:
                for text in respelled(texts, seed):
                    total += len(text.encode())
                    file.write(json.dumps({"text": text}) + "\n")
        sizes.write_text(json.dumps(total))
    return json.loads(sizes.read_text())


class Usage(NamedTuple):
    """What a command took."""

    cpu_seconds: float
    """Of all its processes."""
    wall_seconds: float
    peak_mib: float
    """Of the largest of its processes."""


def _status(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def _descendants_peak(root: int) -> float:
    """The largest peak so far, in MiB, of a process and all that it started."""
    found = {
        path.name: _status(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()
    }
    parents = {pid: re.search(r"PPid:\s+(\d+)", text) for pid, text in found.items()}

    def belongs(pid: str) -> bool:
        while pid != str(root):
            parent = parents.get(pid)
            if parent is None or parent[1] == "0":
                return False
            pid = parent[1]
        return True

    peaks = (re.search(r"VmHWM:\s+(\d+)", text) for pid, text in found.items() if belongs(pid))
    return max((int(peak[1]) / 1024 for peak in peaks if peak), default=0.0)


def watched(*words: str) -> Usage:
    """Run `deberta-prep` and watch its processes."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0.0
    command = [sys.executable, "-m", "data_prep", *words]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(_WATCH_SECONDS):
            peak = max(peak, _descendants_peak(process.pid))
    assert process.returncode == 0, f"deberta-prep {words[0]} failed"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(cpu, time.monotonic() - start, peak)


def benchmark(_device: str) -> Outcome:
    require("sentencepiece", "zstandard")
    try:
        tokenizer = sample_with_tokenizer(TOKENIZER_BYTES).tokenizer
        text_bytes = write_corpus(CORPUS / "large")
    except NoText as reason:
        skip(str(reason))
    sources, used = str(CORPUS / "large" / "*.jsonl"), {}
    with tempfile.TemporaryDirectory(dir=CORPUS) as name:
        common = ["--workers", str(WORKERS)]

        def build(*words: str) -> Usage:
            shutil.rmtree(Path(name) / "d", ignore_errors=True)
            output = ["--tokenizer", str(tokenizer), "--output", f"{name}/d"]
            return watched("build", sources, *output, *common, *words)

        used["build"] = build()
        used["dedup"] = watched("dedup", sources, "--output", f"{name}/decisions", *common)
        used["build --dedup"] = build("--dedup", f"{name}/decisions")
    facts: dict[str, float] = {}
    for case, usage in used.items():
        hours = usage.cpu_seconds / text_bytes * TARGET_BYTES / TARGET_RANKS / 3600
        facts |= {
            f"{case}: peak MiB of a process": usage.peak_mib,
            f"{case}: CPU-seconds": usage.cpu_seconds,
            f"{case}: wall seconds": usage.wall_seconds,
            f"{case}: hours for 160 GB on 64 ranks, calculated": hours,
        }
    return Outcome(
        benchmark="prep-large",
        unit="MB of text",
        work=text_bytes / 1e6,
        clock="CPU-seconds",
        seconds={case: [usage.cpu_seconds] for case, usage in used.items()},
        pairs=[],
        shape={"text_bytes": text_bytes, "copies": COPIES, "workers": WORKERS, "pieces": PIECES},
        facts=facts,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
