"""From JSON lines to token files: ours against Megatron's loop and `datasets`, 64 MB of real text.

The cases are those of `prep_cases.py`, the text that of `real_text.py`, fetched when it is missing;
the vocabulary has 128,000 pieces, trained on the same text. "build" counts everything; "build,
started" leaves out what a build of 100 words costs (models, tokenizer files, the manifest), as the
peers' models are loaded before the clock starts. All cases run in one process, one after the
other in every round; then each alone in a process of its own, for the peak of its memory. Last, the
ids that were built are compared with sentencepiece's, encoding every word of the text alone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from tests.benchmarks.prep_cases import CASES
from tests.benchmarks.real_text import PIECES, NoText, Sample, sample_with_tokenizer
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure, require, skip

TEXT_BYTES = 64_000_000
ROUNDS = 3
WRITING = ("build", "Megatron", "datasets")


def peaks(sample: Sample, folder: Path) -> dict[str, float]:
    """Peak memory of the cases that write files, each in a fresh process."""
    found = {}
    for name in WRITING:
        words = [name, str(sample.source), str(sample.tokenizer), str(folder / "alone")]
        command = [sys.executable, "-m", "tests.benchmarks.prep_cases", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[f"peak memory in MiB, {name}"] = float(done.stdout.split()[-1])
    return found


def built_documents(dataset: Path, texts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Texts, cleaned as a build cleans them, and the ids that it wrote for them."""
    from data_prep.cleaning import repair_text
    from data_prep.shards import Dataset
    from data_prep.splits import split_digest, split_of

    opened = Dataset.open(dataset)
    places = {"train": 0, "heldout": 0}
    for text in texts:
        text = repair_text(text).text
        split = split_of(split_digest(text.encode()), 0.01)
        ids, _ = opened.document(split, places[split])
        places[split] += 1
        yield text, ids.tolist()


def parity(dataset: Path, sample: Sample) -> dict[str, float]:
    """Compare what was built with sentencepiece, by words and by whole documents."""
    import sentencepiece

    model = str(sample.tokenizer / "spm.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    words = differ_by_words = differ_whole = no_ties = 0

    def score(ids: list[int]) -> float:
        return sum(map(processor.get_score, ids))

    for text, ids in built_documents(dataset, sample.texts):
        parts = text.replace("\t", " ").replace("\n", " ").split(" ")
        words += sum(map(bool, parts))
        by_words = processor.encode(parts, out_type=int, num_threads=1)
        differ_by_words += ids != [value for part in by_words for value in part]
        whole = processor.encode(text, out_type=int)
        if ids != whole:
            differ_whole += 1
            no_ties += abs(score(ids) - score(whole)) > 1e-5 * abs(score(whole))
    return {
        "documents compared": len(sample.texts),
        "words compared": words,
        "documents unlike sentencepiece, word by word": differ_by_words,
        "documents unlike sentencepiece, as a whole": differ_whole,
        "of these no ties of scores": no_ties,
    }


def benchmark(_device: str) -> Outcome:
    require("sentencepiece", "zstandard", "datasets", "transformers", "megatron")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        sample = sample_with_tokenizer(TEXT_BYTES)
    except NoText as reason:
        skip(str(reason))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def clean() -> None:
            for case in CASES:
                shutil.rmtree(folder / case, ignore_errors=True)

        made = {
            case: make(sample.source, sample.tokenizer, folder / case)
            for case, make in CASES.items()
        }
        seconds, notes = measure(
            [Case(case, run, clean) for case, run in made.items()], ROUNDS, cpu_seconds
        )
        clean()
        megabytes = sum(len(text.encode()) for text in sample.texts) / 1e6
        rounds = zip(seconds["build"], seconds["start"], strict=True)
        seconds["build, started"] = [build - start for build, start in rounds]
        facts = {
            "CPU-seconds of a build of 100 words": median(seconds.pop("start")),
            **peaks(sample, folder),
        }
        made["build"]()
        facts |= parity(folder / "build", sample)
    peers = ("Megatron", "Megatron, pool", "datasets", "sentencepiece", "encoder")
    pairs = [(ours, peer) for ours in ("build", "build, started") for peer in peers]
    return Outcome(
        benchmark="prep",
        unit="MB of text",
        work=megabytes,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[*pairs, ("encoder", "sentencepiece")],
        shape={"text_bytes": TEXT_BYTES, "documents": len(sample.texts), "pieces": PIECES},
        facts=facts,
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
