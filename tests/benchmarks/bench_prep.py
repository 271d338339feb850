"""From JSON lines to token files: our build, its ceiling, and what `datasets` users write.

    build          read, clean, hold out, encode, write, hash, sync: the whole command
    sentencepiece  encode alone, text in memory: no pipeline around this encoder is faster
    datasets       load_dataset, map with a fast tokenizer, group by 512, save_to_disk

One process each, one vocabulary, started before the clock.
"""

import os
import shutil
import tempfile
from itertools import chain
from pathlib import Path

from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure, require

TEXT_BYTES = 5_000_000
LENGTH = 512
ROUNDS = 4


def grouped(batch: dict[str, list]) -> dict[str, list]:
    """Join the ids of a batch and cut them into sequences, as in transformers' run_mlm."""
    ids = list(chain.from_iterable(batch["input_ids"]))
    whole = len(ids) // LENGTH * LENGTH
    return {"input_ids": [ids[i : i + LENGTH] for i in range(0, whole, LENGTH)]}


def benchmark(_device: str) -> Outcome:
    require("sentencepiece", "zstandard", "datasets", "transformers")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    from tests.benchmarks.salted_text import PIECES, build_dataset, train_tokenizer, write_jsonl

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, tokenizer = folder / "text.jsonl", folder / "tokenizer"
        texts = write_jsonl(source, TEXT_BYTES)
        train_tokenizer(tokenizer)
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spm.model"))
        fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)

        def clean():
            for output in ("build", "datasets", "cache"):
                shutil.rmtree(folder / output, ignore_errors=True)

        def map_and_save():
            rows = datasets.Dataset.from_json(str(source), cache_dir=str(folder / "cache"))
            rows = rows.map(
                lambda batch: {"input_ids": fast(batch["text"])["input_ids"]},
                batched=True,
                remove_columns=rows.column_names,
                load_from_cache_file=False,
            )
            rows = rows.map(grouped, batched=True, load_from_cache_file=False)
            rows.save_to_disk(folder / "datasets")

        cases = [
            Case("build", lambda: build_dataset(source, tokenizer, folder / "build"), clean),
            Case(
                "sentencepiece alone",
                lambda: processor.encode(texts, out_type=int, num_threads=1),
            ),
            Case("datasets.map", map_and_save, clean),
        ]
        seconds, notes = measure(cases, ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="prep",
        unit="MB of text",
        work=sum(len(text.encode()) for text in texts) / 1e6,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[("build", "datasets.map"), ("build", "sentencepiece alone")],
        shape={"text_bytes": TEXT_BYTES, "documents": len(texts), "pieces": PIECES},
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
