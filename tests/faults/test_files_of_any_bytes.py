"""Any bytes at all as every format, plain and packed: read or counted, never a crash.

`test_files_of_sources.py` shows what becomes of faults that have names. Here hypothesis makes the
files: bytes out of nowhere, and sound files of each format with bytes changed, cut, doubled or
inserted, before or after they are packed. A last test runs many of them in one process, on its own,
whose memory is watched: Arrow's and the decoders' is none that Python would count.
"""

import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.byte_streams import compression_of
from data_prep.documents import ReadOptions, ReadReport, plan_units, read_unit
from data_prep.errors import UserError
from tests.worlds import ROOT, environment

TEXTS = [
    "The people of this union.",
    'A "quoted" word,\tand a tab',
    "l\u00e4nger \u4e2d\u6587 \U0001f600",
]


def _csv() -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return "\r\n".join(["id,text", *(f"{n},{text}" for n, text in enumerate(quoted))]).encode()


def _tsv() -> bytes:
    plain = [text.replace("\t", " ") for text in TEXTS]  # where nothing can be quoted
    return "\n".join(["id\ttext", *(f"{n}\t{text}" for n, text in enumerate(plain))]).encode()


def _table() -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def _parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(_table(), sink)
    return sink.getvalue()


def _arrow(writer: Callable) -> bytes:
    sink = io.BytesIO()
    with writer(sink, _table().schema) as stream:
        stream.write_table(_table())
    return sink.getvalue()


_OBJECTS = [
    json.dumps({"id": n, "text": text, "more": [{"text": None}]}) for n, text in enumerate(TEXTS)
]
SOUND = {
    "txt": "\n".join(TEXTS).encode(),
    "jsonl": "\n".join(_OBJECTS).encode(),
    "json": f"[{', '.join(_OBJECTS)}]".encode(),
    "csv": _csv(),
    "tsv": _tsv(),
    "parquet": _parquet(),
    "arrow": _arrow(pyarrow.ipc.new_stream),
    "arrow file": _arrow(pyarrow.ipc.new_file),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
}
OPTIONS = {
    "file": ReadOptions(max_document_bytes=1024),
    "line": ReadOptions(max_document_bytes=1024, txt_document="line"),
}
INTERESTING = [
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\n",
    b'"',
    b"{",
    b"]",
    b"\xff" * 4,
    b"\x00" * 8,
]

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=8),
    ),
    max_size=4,
)


def edited(data: bytes, changes) -> bytes:
    """The bytes after some changes, each at a share of their length."""
    for how, share, new in changes:
        at = int(share * len(data))
        if how == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        elif how == "delete":
            data = data[:at] + data[at + len(new) :]
        elif how == "repeat":
            data = data[:at] * 2 + data[at:]
        else:
            data = data[:at]
    return data


def read_all(data: bytes, kind: str, suffix: str = "", txt_document: str = "file") -> ReadReport:
    """Read bytes as a source; what comes back must add up."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind.split()[0]}{suffix}"
        path.write_bytes(data)
        report, options = ReadReport(), OPTIONS[txt_document]
        try:
            # Small units: a file of a few kilobytes is entered in its middle too.
            units = plan_units([str(path)], options, 100, report)
            documents = [doc for unit in units for doc in read_unit(unit, options, report)]
        except UserError as error:
            if str(path) not in str(error):
                raise
            return report
    assert report.documents == len(documents)
    assert all(type(document.text) is str and document.text for document in documents)
    assert report.text_bytes == sum(len(d.text.encode("utf-8", "surrogatepass")) for d in documents)
    counted = [report.documents, report.total_dropped, report.blank_lines]
    is_quiet = not data.strip() or compression_of(data) or kind in QUIET
    assert any(counted) or is_quiet, "what was in it is nowhere"
    return report


# A header, an empty array, an empty table: sound files of no rows; so is an archive of nothing.
QUIET = ("csv", "tsv", "json", "parquet", "arrow", "arrow file")


@pytest.mark.row(24, 25)
@pytest.mark.parametrize("kind", SOUND)
def test_sound_files_are_sound(kind):
    """Or their mutants would show nothing."""
    for suffix, pack in PACKERS.items():
        if kind.startswith(("parquet", "arrow")) and suffix:
            continue
        report = read_all(pack(SOUND[kind]), kind, suffix)
        assert (report.documents, report.dropped) == (1 if kind == "txt" else len(TEXTS), {})


@pytest.mark.row(25)
@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", SOUND)
def test_any_bytes_are_read_or_counted(kind, suffix, note):
    @settings(max_examples=25, deadline=None)
    @given(
        st.binary(max_size=600) | edits.map(lambda changes: edited(SOUND[kind], changes)),
        edits,
        st.booleans(),
        st.sampled_from(list(OPTIONS)),
    )
    @example(b"", [], True, "file")
    def check(data, changes, packs, txt_document):
        data = PACKERS[suffix](data) if packs else data
        read_all(edited(data, changes), kind, suffix, txt_document)

    check()
    if not suffix and kind == "jsonl":
        note(
            f"any bytes, and sound files changed, as {', '.join(SOUND)}, each plain, gz, zst, xz",
            "read or counted, no crash",
        )


WATCHED = f"""
import random, re, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.faults.test_files_of_any_bytes import PACKERS, SOUND, mutant, read_all

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for kind, data in SOUND.items():
    read_all(data, kind)
before, rng, read = peak(), random.Random(25), 0
for _ in range(int(sys.argv[1])):
    for kind in SOUND:
        suffix = rng.choice(list(PACKERS))
        read_all(mutant(rng, kind, suffix), kind, suffix, rng.choice(["file", "line"]))
        read += 1
print(read, (peak() - before) >> 10)
"""
ROUNDS = 300
MOST_MIB = 256


def mutant(rng: random.Random, kind: str, suffix: str) -> bytes:
    """A sound file with a few changes, packed, and perhaps changed again."""

    def changes(most):
        return [
            (
                rng.choice(["set", "insert", "delete"]),
                rng.random(),
                rng.choice([*INTERESTING, rng.randbytes(4)]),
            )
            for _ in range(rng.randint(0, most))
        ]

    return edited(PACKERS[suffix](edited(SOUND[kind], changes(3))), changes(1))


@pytest.mark.row(25)
def test_no_bytes_take_memory_without_bound(note):
    """Lengths in a file are what somebody wrote there: 2 GB claimed must not be 2 GB taken."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(ROUNDS)],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    read, mebibytes = map(int, done.stdout.split())
    assert read == ROUNDS * len(SOUND)
    assert mebibytes < MOST_MIB
    note(f"{read} changed files in one process", f"its memory grew by {mebibytes} MiB at most")
