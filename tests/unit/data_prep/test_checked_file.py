"""Bytes of a token file: compared with the manifest at first, and with themselves ever after."""

import errno
import gc
import hashlib
import os
import random

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import checked_file
from data_prep.checked_file import PAGE_BYTES, CheckedFile, OpenFiles
from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES

NUM_BYTES = 2 * BLOCK_BYTES + 3 * PAGE_BYTES + 100


@pytest.fixture(scope="module")
def content():
    return random.Random(0).randbytes(NUM_BYTES)


@pytest.fixture(scope="module")
def original(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("checked") / "tokens"
    path.write_bytes(content)
    return path


@pytest.fixture
def path(content, tmp_path):
    """A file that a test may damage."""
    (tmp_path / "tokens").write_bytes(content)
    return tmp_path / "tokens"


def block_hashes(content):
    starts = range(0, len(content), BLOCK_BYTES)
    return [hashlib.sha256(content[n : n + BLOCK_BYTES]).hexdigest() for n in starts]


@pytest.fixture(scope="module")
def hashes(content):
    return block_hashes(content)


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


EDGES = [0, 1, PAGE_BYTES, BLOCK_BYTES, BLOCK_BYTES + PAGE_BYTES, 2 * BLOCK_BYTES, NUM_BYTES]
OFFSETS = st.one_of(
    st.integers(0, NUM_BYTES),
    st.tuples(st.sampled_from(EDGES), st.integers(-2, 2)).map(sum),
).map(lambda offset: min(max(offset, 0), NUM_BYTES))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(OFFSETS, OFFSETS), min_size=1, max_size=4))
def test_a_read_is_a_slice(original, content, hashes, ranges):
    file = CheckedFile(original, hashes, OpenFiles())
    for start, end in map(sorted, ranges):
        if start < end:
            assert file.read(start, end) == content[start:end]


def test_what_changes_after_it_was_checked_is_found(path, content, hashes):
    """The hole of a memory map: a page that is dropped and fetched anew is another page."""
    file = CheckedFile(path, hashes, OpenFiles())
    assert file.read(0, NUM_BYTES) == content
    flip(path, BLOCK_BYTES + PAGE_BYTES + 5)
    for _ in range(2):
        with pytest.raises(CorruptError) as caught:
            file.read(BLOCK_BYTES + PAGE_BYTES, BLOCK_BYTES + PAGE_BYTES + 1)
        assert f"{path}: bytes from {BLOCK_BYTES + PAGE_BYTES} (block 1) are not" in str(
            caught.value
        )
    # Neighbours are untouched, and so is the page once the disk gives it back as it was.
    assert file.read(0, BLOCK_BYTES + PAGE_BYTES) == content[: BLOCK_BYTES + PAGE_BYTES]
    flip(path, BLOCK_BYTES + PAGE_BYTES + 5)
    assert file.read(0, NUM_BYTES) == content


def test_every_flip_after_the_check_is_found(path, hashes):
    file = CheckedFile(path, hashes, OpenFiles())
    file.read(0, NUM_BYTES)
    rng = random.Random(1)
    for position in [0, NUM_BYTES - 1, *(rng.randrange(NUM_BYTES) for _ in range(50))]:
        flip(path, position)
        with pytest.raises(CorruptError, match="are not what they were when they were first read"):
            file.read(position, position + 1)
        flip(path, position)


def test_a_block_is_refused_before_it_is_used(path, hashes):
    flip(path, 2 * BLOCK_BYTES - 1)
    file = CheckedFile(path, hashes, OpenFiles())
    file.read(0, BLOCK_BYTES)
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"tokens: block 1 \(bytes from 4194304\) does not"):
            file.read(BLOCK_BYTES, BLOCK_BYTES + 1)


@pytest.mark.parametrize("was_read", [False, True])
def test_a_file_that_shrinks_is_an_error_and_no_signal(path, hashes, was_read):
    """Reading a map behind the end of its file would kill the process (SIGBUS)."""
    file = CheckedFile(path, hashes, OpenFiles())
    if was_read:
        file.read(0, NUM_BYTES)
    os.truncate(path, 2 * BLOCK_BYTES + 50)
    with pytest.raises(CorruptError, match="block 2"):
        file.read(NUM_BYTES - 10, NUM_BYTES)


def test_a_file_that_is_gone(path, hashes):
    path.unlink()
    with pytest.raises(CorruptError, match=r"tokens: cannot be read \(No such file or directory\)"):
        CheckedFile(path, hashes, OpenFiles()).read(0, 1)


def test_a_disk_that_refuses_is_named(path, hashes, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = CheckedFile(path, hashes, OpenFiles())
    file.read(0, 1)
    monkeypatch.setattr(checked_file.os, "pread", refuse)
    with pytest.raises(CorruptError, match=r"tokens: cannot be read \(Input/output error\)"):
        file.read(0, 1)


def test_few_files_stay_open(tmp_path):
    """A terabyte has more shards than a process may open."""

    def open_here():
        return [f.path for f in psutil.Process().open_files() if f.path.startswith(str(tmp_path))]

    files, checked = OpenFiles(limit=3), []
    for number in range(20):
        content = bytes([number]) * 100
        (tmp_path / str(number)).write_bytes(content)
        checked.append(CheckedFile(tmp_path / str(number), block_hashes(content), files))
    for number in [*range(20), *range(20)]:
        assert checked[number].read(0, 100) == bytes([number]) * 100
        assert len(open_here()) <= 3
    assert sorted(open_here()) == [str(tmp_path / name) for name in ("17", "18", "19")]
    checked[17].read(0, 1)
    checked[0].read(0, 1)  # takes the place of the one that was read longest ago
    assert sorted(open_here()) == [str(tmp_path / name) for name in ("0", "17", "19")]
    del files, checked
    gc.collect()
    assert not open_here()


def test_a_file_that_another_replaced_is_refused_once_it_is_opened_again(tmp_path):
    files = OpenFiles(limit=1)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    first, second = (
        CheckedFile(tmp_path / name, block_hashes(name.encode() * 10), files) for name in "ab"
    )
    first.read(0, 10)
    (tmp_path / "new").write_bytes(b"c" * 10)
    (tmp_path / "new").replace(tmp_path / "a")
    assert first.read(0, 10) == b"a" * 10  # what is open stays what it was
    second.read(0, 10)
    with pytest.raises(CorruptError, match="are not what they were when they were first read"):
        first.read(0, 10)
