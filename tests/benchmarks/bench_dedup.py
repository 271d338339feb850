"""Near-duplicates: the whole command and its kernel against datasketch, and what both find.

    dedup command    JSON lines on disk -> decisions on disk: reading, cleaning, copies, bands,
                     exact verification, clusters
    in memory        texts -> shingles -> signatures -> bands -> pairs of documents to compare
    datasketch       the same in memory by its own bulk functions: MinHash (SHA-1) and MinHashLSH
    with xxhash      the same, with the fastest hash function that can be given to it

All use 120 permutations in 20 bands of 6 rows over runs of 5 words. The facts are exact: 10,000
documents with 1,000 planted pairs at Jaccard indices of .70 to .95, and, where both packages can be
fetched by name, two collections of State of the Union addresses.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.dedup import DedupOptions, deduplicate
from data_prep.dedup_matching import bucket_pairs
from data_prep.minhash import MinHashOptions, band_hashes, shingles_of, signatures
from data_prep.word_hashes import hash_texts, ngram_hashes
from tests.benchmarks.planted_pairs import (
    Judgement,
    fetch_speeches,
    judge_planted,
    judge_speeches,
    plant,
)
from tests.benchmarks.rounds import Case, Outcome, cpu_seconds, main, measure, require
from tests.benchmarks.salted_text import InProcess, documents, write_jsonl

TEXT_BYTES = 4_000_000
MEMORY_BYTES = 80_000_000
ROUNDS = 4
OPTIONS = MinHashOptions()
PERMUTATIONS = OPTIONS.bands * OPTIONS.rows


def in_memory(texts: Sequence[str]) -> int:
    """Pairs of documents that our bands say to compare."""
    import numpy as np

    hashed = hash_texts(texts)
    ngrams, ends = ngram_hashes(hashed.words_W, hashed.ends_D, OPTIONS.shingle_words)
    bands = band_hashes(signatures(shingles_of(ngrams), ends, PERMUTATIONS), OPTIONS).ravel()
    order = np.argsort(bands, kind="stable")
    numbers = np.tile(np.arange(len(texts)), OPTIONS.bands)
    return bucket_pairs(bands[order], numbers[order], len(texts)).size


def by_datasketch(texts: Sequence[str], **options: Callable[[bytes], int]) -> int:
    """Pairs of documents that datasketch says to compare."""
    from datasketch import MinHash, MinHashLSH

    sets = []
    for text in texts:
        words = text.lower().split()
        sets.append({" ".join(words[n : n + 5]).encode() for n in range(len(words) - 4)})
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(OPTIONS.bands, OPTIONS.rows))
    pairs = 0
    for number, minhash in enumerate(MinHash.bulk(sets, num_perm=PERMUTATIONS, **options)):
        pairs += len(index.query(minhash))
        index.insert(number, minhash)
    return pairs


def peak_mebibytes(folder: Path) -> float:
    """Peak resident memory of a worker of the command, whose units are full."""
    source = folder / "large.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in documents(TEXT_BYTES)]
    with source.open("w", encoding="utf-8") as file:
        while file.tell() < MEMORY_BYTES:
            file.writelines(lines)
    words = ["dedup", str(source), "--output", str(folder / "large")]
    subprocess.run([sys.executable, "-m", "data_prep", *words], check=True, stdout=-3, stderr=-3)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def facts_of(name: str, judgement: Judgement) -> dict[str, float]:
    """The figures of a judgement."""
    return {
        f"{name}: pairs at .8 or above": judgement.expected,
        f"{name}: recall": judgement.recall,
        f"{name}: precision": judgement.precision,
    }


def benchmark(_device: str) -> Outcome:
    require("datasketch", "xxhash")
    import xxhash

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = {"peak MiB of a worker": peak_mebibytes(folder)}
        facts |= facts_of("10,000 documents", judge_planted(*plant(10_000, 1_000), folder / "p"))
        speeches, notes = fetch_speeches(folder / "speeches"), []
        if speeches is None:
            notes.append("the State of the Union packages could not be fetched")
        else:
            facts |= facts_of("speeches", judge_speeches(*speeches, folder / "s"))
        source = folder / "text.jsonl"
        texts = write_jsonl(source, TEXT_BYTES)

        def clean():
            shutil.rmtree(folder / "decisions", ignore_errors=True)

        def command():
            deduplicate([str(source)], folder / "decisions", DedupOptions(), InProcess())

        cases = [
            Case("dedup command", command, clean),
            Case("in memory", lambda: in_memory(texts)),
            Case("datasketch", lambda: by_datasketch(texts)),
            Case(
                "datasketch with xxhash",
                lambda: by_datasketch(texts, hashfunc=xxhash.xxh32_intdigest),
            ),
        ]
        seconds, failed = measure(cases, ROUNDS, cpu_seconds)
    return Outcome(
        benchmark="dedup",
        unit="MB of text",
        work=sum(len(text.encode()) for text in texts) / 1e6,
        clock="CPU-seconds",
        seconds=seconds,
        pairs=[
            (ours, peer)
            for ours in ("in memory", "dedup command")
            for peer in ("datasketch", "datasketch with xxhash")
        ],
        shape={"text_bytes": TEXT_BYTES, "documents": len(texts), "permutations": PERMUTATIONS},
        facts=facts,
        notes=notes + failed,
    )


if __name__ == "__main__":
    main(benchmark, devices=["cpu"])
