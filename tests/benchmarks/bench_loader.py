"""Random sequences of 512 tokens from a warm disk to batches of 64, in CPU-seconds.

The same work on both sides: sequences at places that are given, in memory, become batches, each let
go before the next.

sequences       our stream, the places of a step at a time; each token has been checked before, and
                lies in its cache
IndexedDataset  megatron-core's reader (or, where it is missing, its format read the same way) and
                np.stack; no checks
memmap          a loop over slices of a plain array, the fastest that needs no library
arrow           Hugging Face `datasets`, a list of indices at a time, in torch and in numpy format

More work on our side than on theirs:

batches         what training calls, step after step: order, skip list, reading, micro batches; in a
                set of 8 windows and with a cache for one, so that pages are fetched and compared
                again, as they are in any large set; a round is a window
batches, first  the same on the first way through, which hashes every block

Input of a step of large at 64 ranks, of which this is rank 0: milliseconds of the reading thread in
the first and in a later pass, and what the training thread has to do with it.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shards import Dataset
from pipeline.data import TrainBatches
from pipeline.phases import Phase, TrainSchedule
from pipeline.prefetch import Prefetcher
from pipeline.sample_order import SampleOrder
from pipeline.sequences import CLS_ID, SEP_ID, SequenceStream
from tests.benchmarks.loader_peers import (
    CONTENT,
    LENGTH,
    open_indexed,
    parts,
    write_arrow,
    write_dataset,
    write_indexed,
)
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, exhaust, main, measure, require

SEQUENCES, BATCHES, STEPS = 64, 64, 8  # of 4096 sequences: a window
STORED = 96 * 1024  # 196 MB, as much as fits into our cache
STORED_IN_LARGE = 256 * 1024  # 535 MB in 8 windows of the order
SMALL_CACHE_BYTES = 144 << 20  # one window and its edges: in a terabyte no more would be of use
BLOCK_SEQUENCES, WINDOW_BLOCKS = 512, 64  # the defaults of [data]
ROUNDS = 7
LARGE_TOKENS, LARGE_RANKS, LARGE_MICRO_BATCH = 8192 * LENGTH, 64, 16
MODELLED_TOKENS_PER_SECOND = 118_000
"""Of large on one H100, from the model of bytes and FLOPs: not measured. A slower device waits
less."""


def training(dataset: Dataset, batch: int, micro_batch: int, ranks: int = 1) -> TrainBatches:
    """Rank 0's batches over a dataset in the default order."""
    stream = SequenceStream(dataset, "train", LENGTH)
    order = SampleOrder(stream.num_sequences, 0, LENGTH, BLOCK_SEQUENCES, WINDOW_BLOCKS)
    schedule = TrainSchedule((Phase(0, 1_000_000, LENGTH, batch),))
    return TrainBatches({LENGTH: stream}, {LENGTH: order}, schedule, micro_batch, ranks, 0)


class Steps:
    """Takes the next steps whenever it is called."""

    def __init__(self, dataset: Dataset, passes: int) -> None:
        self._batches = training(dataset, SEQUENCES * BATCHES, SEQUENCES)
        self._step = 0
        while self._step < passes * STORED_IN_LARGE // (SEQUENCES * BATCHES):
            self()

    def __call__(self) -> None:
        for _ in range(STEPS):
            self._batches.at_step(self._step)
            self._step += 1


def step_of_large(dataset: Dataset) -> dict[str, float]:
    """What one rank's input of a step costs, in the first and in a later pass over the data."""
    batch, facts = LARGE_TOKENS // LENGTH, {}
    batches = training(dataset, batch, LARGE_MICRO_BATCH, LARGE_RANKS)
    a_pass = STORED_IN_LARGE // batch
    step_ms = LARGE_TOKENS / LARGE_RANKS / MODELLED_TOKENS_PER_SECOND * 1e3
    for name, first in (("first pass", 0), ("later pass", a_pass)):
        start = cpu_seconds()
        for step in range(first, first + a_pass):
            batches.at_step(step)
        facts[f"CPU ms of the thread for a step of large at 64 ranks, {name}"] = (
            (cpu_seconds() - start) / a_pass * 1e3
        )
    cpu = torch.device("cpu")
    prefetcher = Prefetcher(batches, a_pass, 3 * a_pass, depth=a_pass)
    try:
        taken = []
        for step in range(a_pass):
            if step == 0:
                prefetcher.next()
                time.sleep(1.0)  # as a step would take
            start = time.thread_time()
            for each in prefetcher.next():
                each.to(cpu)
            taken.append(time.thread_time() - start)
    finally:
        prefetcher.close()
    taken_ms = float(np.median(taken)) * 1e3
    facts["CPU ms of the training thread to fetch it"] = taken_ms
    facts["% of a step of 8192 x 512 at 64 x 118k tokens/s (modelled)"] = taken_ms / step_ms * 100
    return facts


def peers(folder: Path, places: list[list[int]]) -> tuple[list[Case], str, torch.Tensor]:
    """What others do at the same places, what Megatron's reader is, and the first batch."""
    write_indexed(folder / "megatron", STORED)
    indexed, what = open_indexed(folder / "megatron")
    np.save(folder / "plain.npy", np.concatenate([part.ravel() for part in parts(STORED)]))
    tokens = np.load(folder / "plain.npy", mmap_mode="r")
    rows = write_arrow(folder / "arrow", STORED)
    as_torch, as_numpy = rows.with_format("torch"), rows.with_format("numpy")

    def stacked(samples: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([indexed.get(sample) for sample in samples]))

    def looped(samples: list[int]) -> torch.Tensor:
        ids = np.empty((len(samples), LENGTH), np.int32)
        ids[:, 0], ids[:, -1] = CLS_ID, SEP_ID
        for row, sample in enumerate(samples):
            ids[row, 1:-1] = tokens[sample * CONTENT : (sample + 1) * CONTENT]
        return torch.from_numpy(ids)

    reading: dict[str, Any] = {
        "IndexedDataset": stacked,
        "memmap": looped,
        "arrow, torch": lambda samples: as_torch[samples]["input_ids"],
        "arrow, numpy": lambda samples: torch.from_numpy(as_numpy[samples]["input_ids"]),
    }
    expected = looped(places[0]).long()
    for name, read in reading.items():
        assert torch.equal(read(places[0]).long(), expected), f"{name} reads something else"
    cases = [
        Case(name, lambda read=read: exhaust(read(samples) for samples in places))
        for name, read in reading.items()
    ]
    return cases, what, expected


def benchmark(_device: str) -> Outcome:
    require("datasets")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = write_dataset(folder / "dataset", STORED)
        stream = SequenceStream(dataset, "train", LENGTH)
        places = np.random.default_rng(0).integers(STORED, size=(STEPS * BATCHES, SEQUENCES))
        theirs, what, expected = peers(folder, places.tolist())
        zeros = np.zeros(SEQUENCES, np.int64)
        ours = stream.micro_batches(places[0], zeros, SEQUENCES)[0].input_ids_BL
        assert torch.equal(ours.long(), expected), "ours reads something else"
        steps = places.reshape(STEPS, -1)
        no_epochs = np.zeros(BATCHES * SEQUENCES, np.int64)
        large = folder / "large"
        write_dataset(large, STORED_IN_LARGE, shards=4)
        first, later = (Steps(Dataset.open(large, SMALL_CACHE_BYTES), n) for n in range(2))
        cases = [
            Case(
                "sequences",
                lambda: exhaust(stream.micro_batches(each, no_epochs, SEQUENCES) for each in steps),
            ),
            Case("batches", later),
            Case("batches, first", first),
            *theirs,
        ]
        seconds, notes = measure(cases, ROUNDS, cpu_seconds)
        wall, _ = measure(cases, 3, time.perf_counter)
        facts = step_of_large(Dataset.open(large, SMALL_CACHE_BYTES))
    work = places.size
    for case in ("sequences", "batches", "IndexedDataset"):
        facts[f"samples a second of wall time, {case}"] = work / float(np.median(wall[case]))
    return Outcome(
        benchmark="loader",
        unit="samples",
        work=work,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[
            *(("sequences", case.name) for case in theirs),
            *(("batches", case.name) for case in theirs),
            ("batches, first", "IndexedDataset"),
        ],
        shape={
            "length": LENGTH,
            "sequences": SEQUENCES,
            "stored sequences": STORED,
            "stored sequences of batches": STORED_IN_LARGE,
            "cache bytes of batches": SMALL_CACHE_BYTES,
        },
        facts=facts,
        notes=[*notes, f"IndexedDataset is {what}"],
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
