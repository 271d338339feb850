"""The same JSON lines made into token files, by us and by others, one process and thread each.

    build            the whole command: read, clean, hold out, encode, write, hash, sync
    start            the same of 100 words: what a dataset costs whatever its size
    encoder          our encoder alone, text in memory, its cache empty at the start
    sentencepiece    its encoder alone, text in memory, whole documents
    Megatron         the loop of tools/preprocess_data.py with sentencepiece: a line parsed, encoded
                     and added to megatron-core's own IndexedDatasetBuilder
    Megatron, pool   the same as the script does it: the lines go to a pool of one worker, which
                     sends back the ids
    datasets         Dataset.from_json, map with a fast tokenizer, group by 512, save_to_disk

    python -m tests.benchmarks.prep_cases CASE SOURCE TOKENIZER OUTPUT     one of them alone

prints the peak of its memory. Beside ours, none hashes, syncs or holds out anything; models are
loaded before the clock starts, but ours, which loads its own.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LENGTH = 512


def read_texts(source: Path) -> list[str]:
    """The texts of a JSON lines file."""
    with source.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def build_case(source: Path, tokenizer: Path, output: Path) -> Callable[[], object]:
    """Ours; the encoder of another output is forgotten,
    so that every cache starts empty."""
    from data_prep import tokenizer as tokenizer_module
    from data_prep import unit_work
    from tests.benchmarks.salted_text import build_dataset

    def run() -> None:
        unit_work._load_encoder.cache_clear()
        tokenizer_module._processor_of.cache_clear()
        build_dataset(source, tokenizer, output, heldout_fraction=0.01)

    return run


def start_case(_source: Path, tokenizer: Path, output: Path) -> Callable[[], object]:
    """Ours with hardly any text: models, the Hugging Face form of the tokenizer, the manifest."""
    words = output.with_name("words.jsonl")
    words.write_text('{"text": "one two"}\n' * 50)
    return build_case(words, tokenizer, output)


def encoder_case(source: Path, tokenizer: Path, _output: Path) -> Callable[[], object]:
    """Our encoder alone, in the batches that a build makes."""
    from data_prep.tokenizer import Tokenizer
    from data_prep.word_encoding import BATCH_CHARACTERS, BulkEncoder

    texts, model = read_texts(source), Tokenizer.load(tokenizer)

    def run() -> None:
        encoder = BulkEncoder(model)
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                encoder.encode(batch)
                batch, size = [], 0
        encoder.encode(batch)

    return run


def sentencepiece_case(source: Path, tokenizer: Path, _output: Path) -> Callable[[], object]:
    """The encoder alone."""
    import sentencepiece

    texts = read_texts(source)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spm.model"))
    return lambda: processor.encode(texts, out_type=int, num_threads=1)


def megatron_case(source: Path, tokenizer: Path, output: Path) -> Callable[[], object]:
    """The loop of Megatron-LM's preprocess_data.py (2025), `--json-keys text`."""
    import numpy
    import sentencepiece
    from megatron.core.datasets.indexed_dataset import (  # pyright: ignore[reportMissingImports]
        IndexedDatasetBuilder,
    )

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spm.model"))

    def run() -> None:
        output.mkdir()
        builder: Any = IndexedDatasetBuilder(str(output / "text.bin"), dtype=numpy.int32)
        with source.open(encoding="utf-8") as lines:
            for line in lines:
                ids = processor.encode(json.loads(line)["text"], out_type=int)
                builder.add_document(ids, [len(ids)] if ids else [])
        builder.finalize(str(output / "text.idx"))

    return run


class PoolEncoder:
    """What the script's workers do."""

    processor: Any = None

    @classmethod
    def start(cls, model: str) -> None:
        """Load the model, once a worker."""
        import sentencepiece

        cls.processor = sentencepiece.SentencePieceProcessor(model_file=model)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        """The ids of a line."""
        return cls.processor.encode(json.loads(line)["text"], out_type=int)


def megatron_pool_case(source: Path, tokenizer: Path, output: Path) -> Callable[[], object]:
    """The loop with its pool, `--workers 1`; that worker's memory is not in the peak."""
    import numpy
    from megatron.core.datasets.indexed_dataset import (  # pyright: ignore[reportMissingImports]
        IndexedDatasetBuilder,
    )

    def run() -> None:
        output.mkdir()
        builder: Any = IndexedDatasetBuilder(str(output / "text.bin"), dtype=numpy.int32)
        # The script leaves the choice of forking to Linux; so must a fair copy of it.
        pool = get_context("fork").Pool(1, PoolEncoder.start, (str(tokenizer / "spm.model"),))
        with source.open(encoding="utf-8") as lines:
            for ids in pool.imap(PoolEncoder.encode, lines, 32):
                builder.add_document(ids, [len(ids)] if ids else [])
        builder.finalize(str(output / "text.idx"))
        pool.close()
        pool.join()

    return run


def grouped(batch: dict[str, list]) -> dict[str, list]:
    """Join the ids of a batch and cut them into sequences, as in transformers' run_mlm."""
    ids = list(chain.from_iterable(batch["input_ids"]))
    whole = len(ids) // LENGTH * LENGTH
    return {"input_ids": [ids[i : i + LENGTH] for i in range(0, whole, LENGTH)]}


def datasets_case(source: Path, tokenizer: Path, output: Path) -> Callable[[], object]:
    """What users of `datasets` write."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def run() -> None:
        rows = datasets.Dataset.from_json(str(source), cache_dir=str(output / "cache"))
        rows = rows.map(
            lambda batch: {"input_ids": fast(batch["text"])["input_ids"]},
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )
        rows = rows.map(grouped, batched=True, load_from_cache_file=False)
        rows.save_to_disk(output / "saved")

    return run


CASES: dict[str, Callable[[Path, Path, Path], Callable[[], object]]] = {
    "build": build_case,
    "start": start_case,
    "encoder": encoder_case,
    "sentencepiece": sentencepiece_case,
    "Megatron": megatron_case,
    "Megatron, pool": megatron_pool_case,
    "datasets": datasets_case,
}


def peak_mib() -> float:
    """The most memory that this process held, in MiB; not its parent's, as `ru_maxrss` may be."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "the system does not tell the peak of a process's memory"
    return int(found[1]) / 1024


def main() -> None:
    """Run one case."""
    name, source, tokenizer, output = sys.argv[1:]
    run = CASES[name](Path(source), Path(tokenizer), Path(output))
    run()
    print(peak_mib())
    shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
