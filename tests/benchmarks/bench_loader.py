"""Random sequences of 512 tokens from a warm disk to int64 batches.

batches  TrainBatches: order, hash-checked shards, padding, identities of the samples
memmap   a loop over np.load(mmap_mode="r") slices: no order, no checks
arrow    a `datasets` folder of whole sequences, a list of indices at a time, torch format
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from data_prep.shards import Dataset
from pipeline.data import CLS_ID, SEP_ID, SequenceStream, TrainBatches
from pipeline.phases import Phase, TrainSchedule
from pipeline.sample_order import SampleOrder
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure, require

TEXT_BYTES = 6_000_000
LENGTH, SEQUENCES, BATCHES = 512, 64, 64
ROUNDS = 7


def arrow_rows(stream: SequenceStream, folder: Path):
    """The same sequences in a folder of `datasets`, opened from disk."""
    import datasets

    datasets.disable_progress_bars()
    everything = np.arange(stream.num_sequences - 1)
    ids = stream.batch(everything, np.zeros_like(everything)).input_ids_BL.numpy()
    datasets.Dataset.from_dict({"input_ids": list(ids)}).save_to_disk(folder)
    return datasets.load_from_disk(folder).with_format("torch")


def benchmark(_device: str) -> Outcome:
    require("sentencepiece", "zstandard", "datasets")
    from tests.benchmarks.salted_text import build_dataset, train_tokenizer, write_jsonl

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "text.jsonl", TEXT_BYTES)
        train_tokenizer(folder / "tokenizer")
        build_dataset(folder / "text.jsonl", folder / "tokenizer", folder / "dataset")
        dataset = Dataset.open(folder / "dataset")
        stream = SequenceStream(dataset, "train", LENGTH)
        order = SampleOrder(stream.num_sequences, 0, LENGTH, 64, 8)
        schedule = TrainSchedule((Phase(0, 1, LENGTH, SEQUENCES * BATCHES),))
        batches = TrainBatches({LENGTH: stream}, {LENGTH: order}, schedule, SEQUENCES, 1, 0)
        (shard,) = dataset.manifest.shards
        tokens = np.load(folder / "dataset" / shard.tokens_file, mmap_mode="r")
        rows = arrow_rows(stream, folder / "arrow")
        # The same places for both peers, whole sequences only.
        places = np.random.default_rng(0).integers(
            stream.num_sequences - 1, size=(BATCHES, SEQUENCES)
        )

        def memmap_batch(samples: list[int]) -> torch.Tensor:
            ids = np.empty((SEQUENCES, LENGTH), np.int64)
            ids[:, 0], ids[:, -1] = CLS_ID, SEP_ID
            for row, sample in enumerate(samples):
                start = sample * (LENGTH - 2)
                ids[row, 1:-1] = tokens[start : start + LENGTH - 2]
            return torch.from_numpy(ids)

        indices = places.tolist()
        assert torch.equal(memmap_batch(indices[0]), rows[indices[0]]["input_ids"])
        cases = [
            Case("batches", lambda: batches.at_step(0)),
            Case("memmap loop", lambda: [memmap_batch(samples) for samples in indices]),
            Case("arrow", lambda: [rows[samples]["input_ids"] for samples in indices]),
        ]
        seconds, notes = measure(cases, ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="loader",
        unit="tokens",
        work=BATCHES * SEQUENCES * LENGTH,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[("batches", "memmap loop"), ("batches", "arrow")],
        shape={"length": LENGTH, "sequences": SEQUENCES, "stream_tokens": stream.num_tokens},
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
