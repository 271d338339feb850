"""A dataset of a terabyte: how long until it is open, and until a resumed run takes its first step.

open           Dataset.open: manifest parsed and checked, tokenizer hashed, all files looked at
json + memmap  json.load of the manifest and np.load(mmap_mode="r") of every token file: no check
first reads    512 tokens at 64 random places, each in a block that must be hashed first
resume         `python -m pipeline.train` continues a commit, up to the row of its first step; less
               what a process takes that only imports the same modules

256 shards of 4 GiB, zeros in files with holes, their 262,144 block hashes true. Opening is measured
in processes of its own, which did nothing before: the memory is what it adds at its highest.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.errors import EXIT_STOPPED
from tests.benchmarks.rounds import Outcome, main, require

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS, SHARD_BYTES = 256, 4 << 30
ROUNDS = 5
RESUMES = 2
OPEN = """
import sys, time
from tests.benchmarks.bench_open import memory_bytes
{imports}
folder, before = sys.argv[1], memory_bytes("VmRSS")
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(seconds, memory_bytes("VmHWM") - before, memory_bytes("VmRSS") - before, {extra})
"""
CASES = {
    "open": OPEN.format(
        imports="import random\nfrom data_prep.shards import Dataset",
        work="dataset = Dataset.open(folder)",
        extra="first_reads(dataset)",
    ).replace("import memory_bytes", "import first_reads, memory_bytes"),
    "json + memmap": OPEN.format(
        imports="import json\nimport numpy as np",
        work="""\
manifest = json.load(open(folder + "/manifest.json", "rb"))
names = [shard["name"] for shard in manifest["shards"]]
maps = [np.load(f"{folder}/{name}.tokens.npy", mmap_mode="r") for name in names]""",
        extra="0",
    ),
}
# As `pipeline.train` imports them before it reads its data.
IMPORTS = """
import deepspeed, pipeline.train, pipeline.assemble, pipeline.banner
from torch.utils.tensorboard import SummaryWriter
"""
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
}


def memory_bytes(field: str) -> int:
    """A figure of /proc/self/status: VmRSS is what is resident, VmHWM the most that ever was."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def first_reads(dataset: Any) -> float:
    """Median seconds of a first read at a random place of the training split."""
    import random

    tokens, rng, seconds = dataset.split_tokens("train"), random.Random(0), []
    for _ in range(64):
        place = rng.randrange(tokens - 512)
        start = time.perf_counter()
        assert len(dataset.read("train", place, place + 512)) == 512
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def python(*words: object) -> str:
    """Run Python with our packages; what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def measure_opening(folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Open in interleaved rounds of fresh processes; the first round warms the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    facts: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for name, code in CASES.items():
            took, highest, kept, read = map(float, python("-c", code, folder).split())
            if number:
                seconds[name].append(took)
                facts.setdefault(f"MB at the highest, {name}", []).append(highest / 1e6)
                facts.setdefault(f"MB kept, {name}", []).append(kept / 1e6)
                if read:
                    facts.setdefault("ms of a first read", []).append(read * 1e3)
    return seconds, {name: statistics.median(values) for name, values in facts.items()}


def seconds_until(condition: Callable[[], bool], command: list[str]) -> float:
    """Start training; the seconds until something is true. It is then asked to stop."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    took = None
    while took is None and process.poll() is None:
        took = time.perf_counter() - start if condition() else None
        time.sleep(0.005)
    process.terminate()
    _, said = process.communicate()
    assert took is not None, said
    assert process.returncode == EXIT_STOPPED, said
    return took


def measure_resuming(dataset: Path, vocab_size: int, folder: Path) -> list[float]:
    """Resume a run of a tiny model; seconds to the row of the first step, less the imports."""
    from tests.conftest import TINY_RUN

    (folder / "tiny.toml").write_text(TINY_RUN.format(vocab_size=vocab_size, dropout=0.1))
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    run, rows = folder / "run", folder / "run" / "metrics.jsonl"
    command = [
        *(sys.executable, "-m", "pipeline.train", "--config", str(folder / "tiny.toml")),
        *("--deepspeed_config", str(folder / "deepspeed.json"), f"data.path={dataset}"),
        *(f"run.folder={run}", "logging.interval_steps=1", "schedule.max_steps=100_000"),
        *("checkpoint.interval_steps=100_000", "evaluation.interval_steps=100_000"),
    ]

    def last_step() -> int:
        lines = rows.read_text().rpartition("\n")[0].splitlines() if rows.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    found = []
    for number in range(RESUMES + 1):
        begun = last_step()
        took = seconds_until(lambda begun=begun: last_step() > begun, command)
        if number:
            start = time.perf_counter()
            python("-c", IMPORTS)
            found.append(took - (time.perf_counter() - start))
    return found


def benchmark(_device: str) -> Outcome:
    require("deepspeed", "sentencepiece", "tensorboard")
    from tests.benchmarks.salted_text import train_tokenizer
    from tests.sparse_dataset import write_sparse_dataset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer")
        dataset = folder / "dataset"
        manifest = write_sparse_dataset(dataset, folder / "tokenizer", NUM_SHARDS, SHARD_BYTES)
        on_disk = sum(path.stat().st_blocks * 512 for path in dataset.rglob("*"))
        seconds, facts = measure_opening(dataset)
        resumes = measure_resuming(dataset, manifest.vocab_size, folder)
    facts |= {f"s of resume {n}, beyond imports": took for n, took in enumerate(resumes, start=1)}
    return Outcome(
        benchmark="open",
        unit="terabytes opened",
        work=NUM_SHARDS * SHARD_BYTES / 2**40,
        clock="seconds",
        seconds=seconds,
        pairs=[("open", "json + memmap")],
        shape={
            "shards": NUM_SHARDS,
            "bytes": NUM_SHARDS * SHARD_BYTES,
            "blocks": sum(len(shard.block_sha256s) for shard in manifest.shards),
            "bytes on disk": on_disk,
        },
        facts=facts,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
