"""From hostile text to a verified dataset, by the commands that a user types, with real kills."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.documents import embedded_corpus

WORKER_BYTES = 1.5 * 2**30
UNIT_BYTES = "300000"


def deberta_prep(folder: Path, *words: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=folder, env=environment(), capture_output=True, text=True, **options
    )


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, words)]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def build_words(output: str, workers: int) -> list[str]:
    words = ["build", "corpus", "--tokenizer", "tokenizer", "--output", output]
    return [*words, "--workers", str(workers), "--unit-bytes", UNIT_BYTES]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def jsonl(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)
    ).encode()


def paragraphs() -> list[str]:
    files = sorted(embedded_corpus().glob("*.txt"))
    return [p for file in files for p in file.read_text().split("\n") if len(p) > 100]


def write_corpus(folder: Path) -> int:
    """A folder of every format, compression and kind of damage; returns its sound documents."""
    texts = paragraphs()[:2400]
    parts = [texts[n::8] for n in range(8)]
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "plain.jsonl").write_bytes(jsonl(parts[0]))
    (folder / "deep" / "squeezed.jsonl.gz").write_bytes(gzip.compress(jsonl(parts[1])))
    (folder / "deep" / "squeezed.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(jsonl(parts[2]))
    )
    (folder / "deep" / "deeper" / "squeezed.jsonl.xz").write_bytes(lzma.compress(jsonl(parts[3])))
    # Compressed, but the name does not tell.
    (folder / "deep" / "deeper" / "unnamed.jsonl").write_bytes(gzip.compress(jsonl(parts[4])))
    table = pyarrow.table({"text": parts[5], "year": list(range(len(parts[5])))})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=50)
    for number, text in enumerate(parts[6][:20]):
        (folder / "deep" / f"letter-{number:02d}.txt").write_text(text)
    (folder / "deep" / "letter.txt.xz").write_bytes(lzma.compress(parts[6][20].encode()))
    sound = sum(map(len, parts[:6])) + 21
    return sound + write_damage(folder / "damage", parts[7])


def write_damage(folder: Path, texts: list[str]) -> int:
    """Files that cannot be read as they are; returns the documents that can still be had."""
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").touch()
    (folder / "latin1.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    (folder / "huge-line.jsonl").write_bytes(
        jsonl(texts[:1])
        + b'{"text": "'
        + b"lorem ipsum " * (50 * 2**20 // 12)
        + b'"}\n'
        + jsonl(texts[1:2])
    )
    lines = [
        jsonl(texts[2:3]),
        b'{"text": "cut off\n',
        b'{"text": "\xff\xfe"}\n',
        b'{"body": "no such field"}\n',
        b'{"text": 17}\n',
        b'["text"]\n',
        b'{"text": ""}\n',
        b'{"text": "nul \\u0000, surrogate \\ud800, bell \\u0007"}\n',
        b"\n",
        jsonl(texts[3:4]),
    ]
    (folder / "lines.jsonl").write_bytes(b"".join(lines))
    broken = gzip.compress(random.Random(0).randbytes(50_000).hex().encode())
    (folder / "broken.txt.gz").write_bytes(broken[: len(broken) // 2])
    (folder / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (folder / "unknown.bz2").write_bytes(bz2.compress(b"ignored"))
    return 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a corpus, a tokenizer, and the dataset that one undisturbed worker made."""
    folder = tmp_path_factory.mktemp("prepared")
    sound = write_corpus(folder / "corpus")
    words = ["train-tokenizer", "corpus", "--output", "tokenizer", "--vocab-size", "2000"]
    trained = deberta_prep(folder, *words)
    assert trained.returncode == 0, trained.stderr
    built = deberta_prep(folder, *build_words("one", 1), "--json")
    assert built.returncode == 0, built.stderr
    return folder, sound, json.loads(built.stdout)


def test_what_can_be_read_is_in_the_dataset(prepared):
    folder, sound, report = prepared
    # A gzip that breaks in the middle still gives the text before the damage.
    assert report["documents"] in (sound, sound + 1)
    tokens = 0
    for shard in json.loads((folder / "one" / "manifest.json").read_text())["shards"]:
        tokens += len(np.load(folder / "one" / f"{shard['name']}.tokens.npy", mmap_mode="r"))
    assert tokens == report["tokens"]


@pytest.mark.parametrize(
    ("file", "place", "reason"),
    [
        ("empty.txt", "", "empty file"),
        ("latin1.txt", "", "invalid UTF-8"),
        ("huge-line.jsonl", "line 2", "too long"),
        ("lines.jsonl", "line 2", "invalid JSON"),
        ("lines.jsonl", "line 3", "invalid UTF-8"),
        ("lines.jsonl", "line 4", "missing field"),
        ("lines.jsonl", "line 5", "text is not a string"),
        ("lines.jsonl", "line 6", "JSON value is not an object"),
        ("lines.jsonl", "line 7", "empty text"),
        ("broken.txt.gz", None, "damaged file"),
        ("broken.parquet", None, "damaged file"),
    ],
)
def test_what_is_dropped_is_named_by_file_and_line(prepared, file, place, reason):
    folder, _, report = prepared
    entries = [
        json.loads(line) for line in (folder / "one" / "dropped.jsonl").read_text().splitlines()
    ]
    path = f"corpus/damage/{file}"
    found = {
        entry["place"] for entry in entries if (entry["file"], entry["reason"]) == (path, reason)
    }
    assert found
    assert place is None or place in found
    assert path in report["examples"][reason]
    assert len(entries) <= sum(report["dropped"].values())


def test_the_number_of_workers_does_not_matter(prepared):
    folder, _, _ = prepared
    built = deberta_prep(folder, *build_words("three", 3))
    assert built.returncode == 0, built.stderr
    assert hashes(folder / "three") == hashes(folder / "one")


@pytest.fixture(scope="module")
def long_build(prepared):
    """The words and the hashes of a build so long that a kill meets it at work on any machine."""
    folder, _, _ = prepared
    for number in range(8):
        text = [f"{number}: {paragraph}" for paragraph in paragraphs()]
        (folder / "long" / f"{number}").mkdir(parents=True)
        (folder / "long" / f"{number}" / "speeches.jsonl").write_bytes(jsonl(text))
    write_damage(folder / "long" / "damage", paragraphs()[-4:])
    words = ["long" if word == "corpus" else word for word in build_words("undisturbed", 2)]
    built = deberta_prep(folder, *words)
    assert built.returncode == 0, built.stderr
    return folder, words, hashes(folder / "undisturbed")


@pytest.mark.parametrize("whom", ["the group", "the parent"])
def test_kills_do_not_matter(long_build, whom):
    folder, words, expected = long_build
    output = folder / f"killed-{whom[-5:]}"
    words = [output.name if word == "undisturbed" else word for word in words]
    rng = random.Random(whom)
    for kill in range(3):
        # Workers of the killed build must not disturb the next one, so their end is not awaited.
        process = subprocess.Popen(
            command(*words),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_progress(process, output, rng.randint(5 * kill + 1, 5 * kill + 5))
        assert process.poll() is None
        if whom == "the group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    assert deberta_prep(folder, *words).returncode == 0
    assert hashes(output) == expected


def wait_for_progress(process: subprocess.Popen, output: Path, units: int) -> None:
    """Wait until so many units are finished, or for the end."""
    while process.poll() is None:
        if len(list(output.glob(".work/unit-*/done.json"))) >= units:
            return
        time.sleep(0.003)


def test_a_killed_worker_is_told_and_the_build_goes_on(long_build):
    folder, words, expected = long_build
    words = ["lamed" if word == "undisturbed" else word for word in words]
    process = subprocess.Popen(
        command(*words),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_progress(process, folder / "lamed", 2)
    for child in psutil.Process(process.pid).children():
        # The other child is multiprocessing's resource tracker.
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "run the same command again to continue" in err
    assert "Traceback" not in err
    assert deberta_prep(folder, *words).returncode == 0
    assert hashes(folder / "lamed") == expected


MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, code)
"""


def test_a_worker_stays_below_its_memory(prepared):
    folder, _, _ = prepared
    words = command(*build_words("measured", 1))
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    kibibytes, code = map(int, found.stdout.split())
    assert code == 0, found.stderr
    assert kibibytes * 1024 < WORKER_BYTES


def test_verify_show_and_stats_read_it(prepared):
    folder, _, report = prepared
    verified = deberta_prep(folder, "verify", "one", "--json")
    assert verified.returncode == 0, verified.stderr
    values = json.loads(verified.stdout)
    assert values["tokens"] == report["tokens"]
    assert values["unknown_tokens"] == 0
    assert values["roundtrip"]["token_rate"] < 0.02
    assert values["parity"]["other"] == 0
    stats = json.loads(deberta_prep(folder, "stats", "one", "--json").stdout)
    assert sum(group["documents"] for group in stats) == report["documents"]
    shown = deberta_prep(folder, "show", "one", "--document", 0)
    assert shown.returncode == 0
    assert shown.stdout.startswith("document 0 of train: ")


def test_one_flipped_byte_in_any_file_is_refused_by_name(prepared):
    folder, _, _ = prepared
    rng = random.Random(7)
    files = sorted(path for path in (folder / "one").rglob("*") if path.is_file())
    assert len(files) >= 9
    for path in files:
        content = path.read_bytes()
        position = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            verified = deberta_prep(folder, "verify", "one")
        finally:
            path.write_bytes(content)
        assert verified.returncode == 88, (path.name, position)
        assert path.name in verified.stderr
        assert "Traceback" not in verified.stderr
