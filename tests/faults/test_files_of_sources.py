"""Text that is hostile, broken or packed to do harm, and builds that are killed.

The parts have tests of their own in tests/unit/data_prep (documents, byte streams, tables,
cleaning), and the commands with worker processes in tests/integration/test_prepare_corpus.py; here
the whole way is gone, from files to a dataset that `verify` accepts.
"""

import gzip
import hashlib
import itertools
import json
import lzma
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.build import build
from data_prep.build_plan import BuildOptions
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
from data_prep.errors import UserError
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from tests.worlds import ROOT, environment

SOUND = "The people of this union have work to do, and we will do it together."
HOSTILE = {
    "NUL": "before\x00after",
    "lone surrogates": "high \ud800 low \udfff end",
    "line separators": "one\u2028two\u2029three\x85four\x0bfive\x0csix",
    "byte order marks": "\ufeffat the start and \ufeff inside",
    "carriage returns": "one\r\ntwo\rthree",
    "control characters": "bell \x07 escape \x1b[31m delete \x7f c1 \x9b",
    "noncharacters": "\ufffe \uffff \U0010ffff \ufdd0",
    "combining marks": "a" + "\u0301" * 5000,
    "right to left": "\u202eabc\u202c \u200f\u200e",
    "joiners": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 50,
    "special tokens": "[CLS] [MASK] [SEP] [PAD] [UNK] <s> </s> <0x0A> \u2581",
    "a long word": "x" * 600_000,
    "a long line": "word and word " * 100_000,
    "white space": " \t\u00a0\u3000 ",
    "nothing": "",
}
DROPPED_WHOLE = ("white space", "nothing")


class Inline:
    """Runs the units in this process."""

    def run(self, task, items):
        for item in items:
            yield task(item)


def build_here(sources, tokenizer, output, unit_bytes=64 << 20, **options):
    words = BuildOptions(read=ReadOptions(), heldout_fraction=0, unit_bytes=unit_bytes)
    return build([str(s) for s in sources], tokenizer, output, words, Inline(), **options)


def stream_hash(folder):
    """sha256 of all training tokens, however they lie in shards."""
    dataset = Dataset.open(folder)
    return hashlib.sha256(dataset.read("train", 0, dataset.split_tokens("train"))).hexdigest()


@pytest.mark.row(24)
def test_hostile_text(tokenizer_folder, tmp_path, note):
    rng = random.Random(24)
    texts = [SOUND, *HOSTILE.values()]
    texts += [rng.choice("abcdef ") * rng.randint(1, 3) for _ in range(20_000)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    streams, reports = [], []
    for number, unit_bytes in enumerate((64 << 20, 100_000, 30_011)):
        output = tmp_path / str(number)
        sources = [tmp_path / "a.jsonl"]
        reports.append(build_here(sources, tokenizer_folder, output, unit_bytes))
        streams.append(stream_hash(output))
    assert len(set(streams)) == 1
    report = reports[0].reading
    blank = sum(not text.strip() for text in texts)
    assert report.malformed == {}
    assert report.total_dropped == blank
    assert report.notes["NUL character removed"] == 1
    assert report.notes["lone surrogate removed"] == 2
    assert report.notes["control character removed"] == 4
    assert verify(tmp_path / "0", 200).documents == len(texts) - blank
    marked = build_here([tmp_path / "b.jsonl"], tokenizer_folder, tmp_path / "marked")
    assert stream_hash(tmp_path / "marked") == streams[0]
    assert marked.reading.notes["byte order mark removed"] == 1
    note(
        f"{', '.join(HOSTILE)}; 20,000 tiny documents",
        f"counted; the same {reports[0].manifest.num_tokens():,} tokens for any cut into units",
    )


@pytest.mark.row(24)
def test_every_hostile_text_is_text_again(tokenizer_folder, tmp_path):
    """Each alone: what comes back is what was there, but for what has no place in a text."""
    model = Tokenizer.load(tokenizer_folder)
    for number, (name, text) in enumerate(HOSTILE.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"text": f"{SOUND}"}) + "\n" + json.dumps({"text": text}))
        report = build_here([path], tokenizer_folder, tmp_path / str(number))
        kept = report.manifest.num_documents() - 1
        assert kept == (name not in DROPPED_WHOLE), name
        dataset = Dataset.open(tmp_path / str(number))
        assert model.decode(dataset.document("train", 0)[0]) == SOUND
        if kept:
            ids = dataset.document("train", 1)[0]
            assert ids.size
            assert {0, 1, 2}.isdisjoint(ids.tolist()), name


GOOD_LINES = [json.dumps({"text": f"{n}: {SOUND}"}) for n in range(200)]
BROKEN = {
    "cut off": ('{"text": "cut off', "invalid JSON"),
    "no JSON": ("nonsense", "invalid JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "invalid JSON"),
    "deep": ("[" * 100_000, "invalid JSON"),
    "another field": ('{"body": "x"}', "missing field"),
    "null": ('{"text": null}', "text is not a string"),
    "a number": ('{"text": 17}', "text is not a string"),
    "a list": ('["text"]', "JSON value is not an object"),
    "a field twice": ('{"text": "a", "text": "b"}', "field given twice"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
}


def as_bytes(line):
    return line if isinstance(line, bytes) else line.encode()


@pytest.mark.row(25)
def test_broken_records_are_counted_with_file_and_line(tokenizer_folder, tmp_path, note):
    path = tmp_path / "lines.jsonl"
    lines = [GOOD_LINES[0], *(line for line, _ in BROKEN.values()), *GOOD_LINES[1:]]
    path.write_bytes(b"\n".join(map(as_bytes, lines)))
    report = build_here([path], tokenizer_folder, tmp_path / "d")
    assert report.manifest.num_documents() == len(GOOD_LINES)
    log = (tmp_path / "d" / "dropped.jsonl").read_text()
    logged = [json.loads(line) for line in log.splitlines()]
    found = [(entry["file"], entry["place"], entry["reason"]) for entry in logged]
    wanted = [reason for _, reason in BROKEN.values()]
    assert found == [(str(path), f"line {n}", reason) for n, reason in enumerate(wanted, start=2)]
    note(f"lines: {', '.join(BROKEN)}", "each in dropped.jsonl with file, line and reason")


def packers():
    return {
        "gz": gzip.compress,
        "xz": lzma.compress,
        "zst": zstandard.ZstdCompressor().compress,
    }


@pytest.mark.row(25)
@pytest.mark.parametrize("suffix", packers())
def test_cut_archives_keep_what_is_before(tokenizer_folder, tmp_path, suffix, note):
    rng = random.Random(25)
    lines = [json.dumps({"text": f"{SOUND} {rng.random()}"}) for _ in range(4000)]
    content = packers()[suffix]("\n".join(lines).encode())
    (tmp_path / f"cut.jsonl.{suffix}").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "good.jsonl").write_text("\n".join(GOOD_LINES))
    sources = [tmp_path / "good.jsonl", tmp_path / f"cut.jsonl.{suffix}"]
    report = build_here(sources, tokenizer_folder, tmp_path / "d")
    kept = report.manifest.num_documents() - len(GOOD_LINES)
    assert 0 <= kept < len(lines)
    assert suffix == "zst" or kept > 1000  # a small zstd file is one block
    assert report.manifest.dropped["damaged file"] == 1
    if suffix == "gz":
        note("gz, xz, zst cut at two thirds", f"counted with the line; {kept} documents kept")


def bomb(path, suffix):
    """Sound lines in front of half a gigabyte of the same line, in less than a megabyte."""
    line = (json.dumps({"text": SOUND * 100}) + "\n").encode()
    head = "".join(line + "\n" for line in GOOD_LINES).encode()
    if suffix == "gz":
        packer = zlib.compressobj(wbits=31)
    elif suffix == "xz":
        packer = lzma.LZMACompressor(preset=0)
    else:
        packer = zstandard.ZstdCompressor().compressobj()
    body = line * 100
    with path.open("wb") as file:
        file.write(packer.compress(head))
        for _ in range(600):
            file.write(packer.compress(body))
        file.write(packer.flush())
    return 600 * len(body)


@pytest.mark.row(25)
@pytest.mark.parametrize("suffix", packers())
def test_bombs_are_defused(tokenizer_folder, tmp_path, suffix, note):
    """Lines that are short and sound by themselves: only their number does harm."""
    path = tmp_path / f"bomb.jsonl.{suffix}"
    size = bomb(path, suffix)
    packed = path.stat().st_size
    assert size > 200 * packed
    report = ReadReport()
    (unit,) = plan_units([str(path)], ReadOptions())
    documents = read_unit(unit, ReadOptions(), report)
    first = [document.text for document in itertools.islice(documents, len(GOOD_LINES))]
    assert first == [json.loads(line)["text"] for line in GOOD_LINES]
    report = ReadReport()
    documents = sum(1 for _ in read_unit(unit, ReadOptions(), report))
    assert report.dropped == {"damaged file": 1}
    (case,) = report.examples["damaged file"][str(path)]
    assert "unpacks to more than 200 times its size" in case
    assert documents * len(SOUND) * 100 < max(64 << 20, 200 * packed)
    if suffix == "zst":
        note(f"{size >> 20} MB in {packed >> 10} kB of {suffix}", "stopped at 64 MiB, file named")


@pytest.mark.row(25)
def test_a_bomb_of_a_table_is_defused(tmp_path, note):
    """A column of one value, a million times: Parquet stores it once."""
    column = pyarrow.array([SOUND * 10]).dictionary_encode()
    indices = pyarrow.array([0] * 1_000_000, pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, column.dictionary)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    report = ReadReport()
    for unit in plan_units([str(tmp_path / "a.parquet")], ReadOptions()):
        for _ in read_unit(unit, ReadOptions(), report):
            pass
    assert report.dropped == {"damaged file": 1}
    assert report.text_bytes <= 65 << 20
    kilobytes = (tmp_path / "a.parquet").stat().st_size >> 10
    note(f"700 MB of one value in a Parquet file of {kilobytes} kB", "stopped at 64 MiB")


@pytest.mark.row(25)
def test_too_many_broken_records_stop_the_build(tokenizer_folder, tmp_path, note):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join([*GOOD_LINES, *["nonsense"] * 50, *['{"body": "x"}'] * 50]))
    arguments = ([path], tokenizer_folder, tmp_path / "d")
    with pytest.raises(UserError) as caught:
        build_here(*arguments)
    message = str(caught.value)
    assert "100 of 300 inputs are malformed (invalid JSON 50, missing field 50)" in message
    assert "more than --max-malformed 0.1 allows" in message
    assert f"for example {path}: line 201: invalid JSON" in message
    assert not (tmp_path / "d" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"0\.3 allows"):
        build_here(*arguments, max_malformed=0.3)
    report = build_here(*arguments, max_malformed=0.34)
    assert report.resumed_units == 1
    assert report.manifest.num_documents() == 200
    other = build_here([path], tokenizer_folder, tmp_path / "other", max_malformed=1)
    assert other.fingerprint == report.fingerprint, "what is allowed must not change a byte"
    with pytest.raises(UserError, match=r"--max-malformed 1\.5: must lie between 0 and 1"):
        build_here(*arguments, max_malformed=1.5)
    note("a third of the lines broken", "stopped with counts and a line; nothing published")


KILLS = 20
# One process imports, then forks builds and kills each at a random moment.
KILLER = f"""
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.faults.test_files_of_sources import build_here

source, tokenizer, folder = map(Path, sys.argv[1:])

def forked(output):
    pid = os.fork()
    if pid == 0:
        try:
            build_here([source], tokenizer, output, unit_bytes=30_000)
        finally:
            os._exit(0 if (output / "manifest.sha256").exists() else 1)
    return pid

start = time.monotonic()
os.waitpid(forked(folder / "undisturbed"), 0)
whole = time.monotonic() - start
rng, kills, outputs = random.Random(26), 0, 0
while kills < {KILLS}:
    output = folder / f"killed-{{outputs}}"
    pid = forked(output)
    time.sleep(rng.random() * whole)
    ended, _ = os.waitpid(pid, os.WNOHANG)
    if ended:
        outputs += 1
        continue
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
os.waitpid(forked(output), 0)
print(kills, outputs + 1)
"""


@pytest.mark.row(26)
def test_kills_leave_no_trace(tokenizer_folder, corpus, tmp_path, note):
    source = tmp_path / "lines.jsonl"
    texts = [line for path in sorted(corpus.glob("*.txt")) for line in path.read_text().split("\n")]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts if text))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, source, tokenizer_folder, tmp_path],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    kills, outputs = map(int, done.stdout.split())
    assert kills == KILLS
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) >= 6
    for number in range(outputs):
        assert contents(tmp_path / f"killed-{number}") == expected
    note(f"SIGKILL at {kills} random moments", f"{outputs} datasets equal byte for byte")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }
