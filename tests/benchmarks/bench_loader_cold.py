"""Sequences of 512 tokens from a disk whose pages the system does not hold, in wall time.

Before every round the files leave the page cache (posix_fadvise DONTNEED), and everything is opened
anew, so that nothing is known of any block. Each side reads as its training does:

whole pass      our batches over all of the data, in the default order: each block is read and
                hashed once, in threads before it is needed; its pages are fetched and compared
nothing ahead   the same step by step, each of which hashes what it needs when it needs it
first window    the first 32,768 sequences only, which touch a quarter of the bytes of the blocks
                that they hash: the dearest that a run ever reads
IndexedDataset  megatron-core's reader (or its format read the same way) in random order, as its
                shuffled index asks for it, no checks: a page fault or two for a sequence
memmap          the same with slices of a plain array
disk alone      our files read end to end into a buffer and nothing done with them, in one stream
four streams    the same by four threads: what this disk gives

A system reads far around the first hundred faults of a map (8 MiB each where that is its
read-ahead) and then stops: peers fault 256 times before their clock runs, which leaves up to a
third of their file in memory, to their advantage. A case reads as many sequences as take about a
second; its seconds are scaled to the same count.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import BLOCK_BYTES
from data_prep.shards import Dataset
from pipeline.data import TrainBatches
from tests.benchmarks.bench_loader import BLOCK_SEQUENCES, WINDOW_BLOCKS, training
from tests.benchmarks.loader_peers import (
    CONTENT,
    LENGTH,
    open_indexed,
    write_dataset,
    write_indexed,
)
from tests.benchmarks.rounds import Case, Outcome, exhaust, main, measure

STORED = 1024 * 1024  # 2.1 GB in 32 windows
RANDOM, BEFORE = 4_096, 256
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
    exhaust(opened(folder).in_order(0, count // STEP))


def alone(folder: Path, count: int) -> None:
    """The same steps, each asked for by itself."""
    batches = opened(folder)
    exhaust(batches.at_step(step) for step in range(count // STEP))


def opened(folder: Path) -> TrainBatches:
    """The batches of our dataset, of which nothing is known yet."""
    return training(Dataset.open(folder / "dataset"), STEP, SEQUENCES)


class Peer:
    """A reader of one sequence at a time, opened anew and asked at random for every round."""

    def __init__(self, folder: Path, opened: Callable[[], Callable[[int], Any]]) -> None:
        self._folder = folder
        self._opened = opened
        self._get: Callable[[int], Any] | None = None
        rng = np.random.default_rng(0)
        self._first = rng.integers(STORED, size=BEFORE).tolist()
        self._places = rng.integers(STORED, size=(RANDOM // SEQUENCES, SEQUENCES)).tolist()

    def prepare(self) -> None:
        """Forget everything, then fault until the system no longer reads around."""
        drop(self._folder)
        self._get = self._opened()
        for sample in self._first:
            self._get(sample).sum()

    def __call__(self) -> None:
        assert self._get is not None, "prepared"
        for samples in self._places:
            np.stack([self._get(sample) for sample in samples])
        self._get = None  # what is mapped cannot leave the page cache


def slices(folder: Path) -> Callable[[int], Any]:
    """Slices of a plain array; our shard serves, because plain NumPy opens it."""
    tokens = np.load(folder / "dataset" / "shard-00000.tokens.npy", mmap_mode="r")
    return lambda sample: tokens[sample * CONTENT : (sample + 1) * CONTENT]


def end_to_end(folder: Path, streams: int) -> None:
    """Every byte of our token files, in blocks, of which each stream takes the next one."""

    def read(path: Path, first: int) -> None:
        into = np.empty(BLOCK_BYTES, np.uint8).data
        descriptor = os.open(path, os.O_RDONLY)
        for start in range(first * BLOCK_BYTES, path.stat().st_size, streams * BLOCK_BYTES):
            os.preadv(descriptor, [into], start)
        os.close(descriptor)

    with ThreadPoolExecutor(streams) as pool:
        for path in sorted((folder / "dataset").glob("*.tokens.npy")):
            list(pool.map(lambda first, path=path: read(path, first), range(streams)))


def benchmark(_device: str) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_dataset(folder / "dataset", STORED)
        write_indexed(folder / "megatron", STORED)
        _, what = open_indexed(folder / "megatron")
        indexed = Peer(folder, lambda: open_indexed(folder / "megatron")[0].get)
        memmap = Peer(folder, lambda: slices(folder))

        def forget() -> None:
            drop(folder)

        cases = [
            Case("whole pass", lambda: ours(folder, STORED), forget),
            Case("nothing ahead", lambda: alone(folder, STORED), forget),
            Case("first window", lambda: ours(folder, WINDOW), forget),
            Case("disk alone", lambda: end_to_end(folder, 1), forget),
            Case("four streams", lambda: end_to_end(folder, 4), forget),
            Case("IndexedDataset", indexed, indexed.prepare),
            Case("memmap", memmap, memmap.prepare),
        ]
        counts = dict.fromkeys([case.name for case in cases], STORED)
        counts |= {"first window": WINDOW, "IndexedDataset": RANDOM, "memmap": RANDOM}
        seconds, notes = measure(cases, ROUNDS, time.perf_counter)
        blocks = sum(len(shard.block_sha256s) for shard in dataset.manifest.shards)
    for case, count in counts.items():
        seconds[case] = [took * STORED / count for took in seconds[case]]
    return Outcome(
        benchmark="loader-cold",
        unit="samples",
        work=STORED,
        clock="seconds",
        seconds=seconds,
        pairs=[
            *(
                (case, peer)
                for case in ("whole pass", "first window", "disk alone", "four streams")
                for peer in ("IndexedDataset", "memmap")
            ),
            *(("whole pass", limit) for limit in ("disk alone", "four streams", "nothing ahead")),
        ],
        shape={
            "length": LENGTH,
            "stored sequences": STORED,
            "blocks": blocks,
            "sequences read": counts,
        },
        notes=[*notes, f"IndexedDataset is {what}"],
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
