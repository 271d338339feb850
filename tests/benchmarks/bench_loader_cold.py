"""Sequences of 512 tokens from a disk whose pages the system does not hold, in wall time.

Before every round the files leave the page cache (posix_fadvise DONTNEED), and everything is opened
anew, so that nothing is known of any block.

whole pass      our batches over all of the data, in the default order: each block is hashed once
first window    the first 32,768 sequences only, which touch more than half of the blocks: the
                dearest that a run ever reads
IndexedDataset  megatron-core's reader (or its format read the same way) in random order, as its
                shuffled index asks for it
memmap          the same with slices of a plain array

A case reads as many sequences as take about a second; its seconds are scaled to the same count.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.shards import Dataset
from tests.benchmarks.bench_loader import BLOCK_SEQUENCES, WINDOW_BLOCKS, training
from tests.benchmarks.loader_peers import (
    CONTENT,
    LENGTH,
    open_indexed,
    write_dataset,
    write_indexed,
)
from tests.benchmarks.rounds import Case, Outcome, main, measure

STORED = 256 * 1024  # 535 MB in 8 windows
RANDOM = 8_192
SEQUENCES, STEP = 64, 4_096
WINDOW = BLOCK_SEQUENCES * WINDOW_BLOCKS
ROUNDS = 5


def drop(folder: Path) -> None:
    """Let the page cache forget every file of a folder, mapped ones after they were closed."""
    gc.collect()
    for path in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def ours(folder: Path, count: int) -> None:
    """Steps of training until so many sequences were read."""
    batches = training(Dataset.open(folder / "dataset"), STEP, SEQUENCES)
    for step in range(count // STEP):
        batches.at_step(step)


def stacked(folder: Path, places: list[list[int]]) -> None:
    """Batches of Megatron's reader."""
    indexed, _ = open_indexed(folder / "megatron")
    for samples in places:
        np.stack([indexed.get(sample) for sample in samples])


def looped(folder: Path, places: list[list[int]]) -> None:
    """Batches of slices; our shard serves, because plain NumPy opens it."""
    tokens = np.load(folder / "dataset" / "shard-00000.tokens.npy", mmap_mode="r")
    for samples in places:
        np.stack([tokens[sample * CONTENT : (sample + 1) * CONTENT] for sample in samples])


def benchmark(_device: str) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_dataset(folder / "dataset", STORED)
        write_indexed(folder / "megatron", STORED)
        _, what = open_indexed(folder / "megatron")
        places = np.random.default_rng(0).integers(STORED, size=(RANDOM // SEQUENCES, SEQUENCES))
        works: dict[str, tuple[int, Callable[[], None]]] = {
            "whole pass": (STORED, lambda: ours(folder, STORED)),
            "first window": (WINDOW, lambda: ours(folder, WINDOW)),
            "IndexedDataset": (RANDOM, lambda: stacked(folder, places.tolist())),
            "memmap": (RANDOM, lambda: looped(folder, places.tolist())),
        }
        cases = [Case(case, run, lambda: drop(folder)) for case, (_, run) in works.items()]
        seconds, notes = measure(cases, ROUNDS, time.perf_counter)
        blocks = sum(len(shard.block_sha256s) for shard in dataset.manifest.shards)
    for case, (count, _) in works.items():
        seconds[case] = [took * STORED / count for took in seconds[case]]
    return Outcome(
        benchmark="loader-cold",
        unit="samples",
        work=STORED,
        clock="seconds",
        seconds=seconds,
        pairs=[
            (case, peer)
            for case in ("whole pass", "first window")
            for peer in ("IndexedDataset", "memmap")
        ],
        shape={
            "length": LENGTH,
            "stored sequences": STORED,
            "blocks": blocks,
            "sequences read": {case: count for case, (count, _) in works.items()},
        },
        notes=[*notes, f"IndexedDataset is {what}"],
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
