"""What a build costs beside encoding: reading, cleaning, splits, writing, hashes; on real text.

Calls of the encoder are timed inside the build, and what a build of 100 words costs is taken off.
A difference between a build and the encoder alone would be of two runs, and say more of the
machine's load than of either.
"""

import shutil
import tempfile
from pathlib import Path
from statistics import median
from unittest.mock import patch

from data_prep.word_encoding import BulkEncoder, EncodedTexts
from tests.benchmarks.bench_prep import TEXT_BYTES
from tests.benchmarks.prep_cases import build_case, start_case
from tests.benchmarks.real_text import PIECES, NoText, sample_with_tokenizer
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure, require, skip

ROUNDS = 5


def benchmark(_device: str) -> Outcome:
    require("sentencepiece", "zstandard")
    try:
        sample = sample_with_tokenizer(TEXT_BYTES)
    except NoText as reason:
        skip(str(reason))
    encoding, encode = [0.0], BulkEncoder.encode

    def timed(self: BulkEncoder, texts: list[str]) -> EncodedTexts:
        start = cpu_seconds()
        found = encode(self, texts)
        encoding[0] += cpu_seconds() - start
        return found

    def clock() -> float:
        """CPU-seconds so far, those of the encoder left out."""
        return cpu_seconds() - encoding[0]

    with tempfile.TemporaryDirectory() as name, patch.object(BulkEncoder, "encode", timed):
        output = Path(name) / "d"
        made = {"build": build_case, "start": start_case}
        cases = [
            Case(
                case,
                make(sample.source, sample.tokenizer, output),
                lambda: shutil.rmtree(output, ignore_errors=True),
            )
            for case, make in made.items()
        ]
        seconds, notes = measure(cases, ROUNDS, clock)
    megabytes = sum(len(text.encode()) for text in sample.texts) / 1e6
    rounds = zip(seconds["build"], seconds["start"], strict=True)
    beside = [(build - start) / megabytes * 1000 for build, start in rounds]
    return Outcome(
        benchmark="prep-beside",
        unit="MB of text",
        work=megabytes,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[],
        shape={"text_bytes": TEXT_BYTES, "documents": len(sample.texts), "pieces": PIECES},
        facts={
            "CPU-ms a MB": median(beside),
            "CPU-ms a MB, lowest round": min(beside),
            "CPU-ms a MB, highest round": max(beside),
        },
        notes=notes,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
