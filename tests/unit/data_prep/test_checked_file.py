"""Bytes of a token file: compared with the manifest at first, and with themselves ever after."""

import errno
import gc
import os
import random

import psutil
import pytest

from data_prep import checked_file
from data_prep.checked_file import PAGE_BYTES, PAGES_PER_BLOCK, CheckedFile, OpenFiles
from data_prep.errors import CorruptError
from data_prep.manifest import BLOCK_BYTES
from tests.two_token_files import block_hashes, flip

NUM_BYTES = 2 * BLOCK_BYTES + 3 * PAGE_BYTES + 100
NUM_PAGES = 2 * PAGES_PER_BLOCK + 4


@pytest.fixture(scope="module")
def content():
    return random.Random(0).randbytes(NUM_BYTES)


@pytest.fixture(scope="module")
def hashes(content):
    return block_hashes(content)


@pytest.fixture
def path(content, tmp_path):
    """A file that a test may damage."""
    (tmp_path / "tokens").write_bytes(content)
    return tmp_path / "tokens"


def read_block(file, block):
    into = bytearray(BLOCK_BYTES)
    file.accept(block, file.read_block(block, memoryview(into)))
    return into


def read_pages(file, first, end):
    into = bytearray((end - first) * PAGE_BYTES)
    file.read_pages(first, memoryview(into))
    return into


@pytest.fixture
def checked(path, hashes):
    """A file of which every block was checked."""
    file = CheckedFile(path, hashes, OpenFiles())
    assert not file.has_changed()
    for block in range(file.num_blocks):
        assert not file.is_checked(block)
        read_block(file, block)
        assert file.is_checked(block)
    return file


def test_blocks_and_pages_are_slices(checked, content):
    assert read_block(checked, 1) == content[BLOCK_BYTES : 2 * BLOCK_BYTES]
    assert read_block(checked, 2)[: 3 * PAGE_BYTES + 100] == content[2 * BLOCK_BYTES :]
    for first, end in [(0, 1), (5, 9), (126, 128), (128, 129), (130, 256)]:
        expected = content[first * PAGE_BYTES : end * PAGE_BYTES]
        assert read_pages(checked, first, end) == expected
    last = read_pages(checked, NUM_PAGES - 2, NUM_PAGES)
    assert last[: PAGE_BYTES + 100] == content[-PAGE_BYTES - 100 :]


def test_every_flip_after_the_check_is_found(checked, path):
    """The hole of a memory map: a page that is dropped and fetched anew is another page."""
    rng = random.Random(1)
    for position in [0, NUM_BYTES - 1, *(rng.randrange(NUM_BYTES) for _ in range(50))]:
        flip(path, position)
        assert not checked.has_changed()
        page = position // PAGE_BYTES
        with pytest.raises(CorruptError) as caught:
            read_pages(checked, page, page + 1)
        told = f"{path}: bytes from {page * PAGE_BYTES} (block {page // PAGES_PER_BLOCK}) are not"
        assert told in str(caught.value)
        flip(path, position)
        read_pages(checked, page, page + 1)


def test_the_page_in_a_run_that_is_damaged_is_named(checked, path):
    flip(path, 7 * PAGE_BYTES + 1)
    with pytest.raises(CorruptError, match=rf"bytes from {7 * PAGE_BYTES} "):
        read_pages(checked, 3, 12)


def test_a_block_is_refused_before_it_is_used(path, hashes):
    flip(path, 2 * BLOCK_BYTES - 1)
    file = CheckedFile(path, hashes, OpenFiles())
    read_block(file, 0)
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"tokens: block 1 \(bytes from 4194304\) does not"):
            read_block(file, 1)
        assert not file.is_checked(1)


def test_pages_of_an_unchecked_block_cannot_be_read(path, hashes):
    file = CheckedFile(path, hashes, OpenFiles())
    read_block(file, 0)
    with pytest.raises(AssertionError):
        read_pages(file, PAGES_PER_BLOCK, PAGES_PER_BLOCK + 1)


def test_a_file_that_somebody_wrote_to_counts_as_never_checked(checked, path, content):
    assert not checked.has_changed()
    path.write_bytes(content)
    os.utime(path, ns=(0, 1))
    assert checked.has_changed()
    assert not any(checked.is_checked(block) for block in range(checked.num_blocks))
    assert not checked.has_changed()
    read_block(checked, 0)
    assert checked.is_checked(0)


@pytest.mark.parametrize("length", [0, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 50, NUM_BYTES - 1])
def test_a_file_that_shrinks_is_an_error_and_no_signal(checked, path, length):
    """Reading a map behind the end of its file would kill the process (SIGBUS)."""
    os.truncate(path, length)
    with pytest.raises(CorruptError, match="block 2"):
        read_pages(checked, NUM_PAGES - 1, NUM_PAGES)
    with pytest.raises(CorruptError, match="block 2"):
        read_block(checked, 2)
    assert checked.has_changed()


def test_a_file_that_is_gone(path, hashes):
    path.unlink()
    for read in (CheckedFile.has_changed, lambda file: read_block(file, 0)):
        with pytest.raises(
            CorruptError, match=r"tokens: cannot be read \(No such file or directory\)"
        ):
            read(CheckedFile(path, hashes, OpenFiles()))


def test_a_disk_that_refuses_is_named(checked, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checked_file.os, "preadv", refuse)
    for read in (lambda: read_block(checked, 0), lambda: read_pages(checked, 0, 1)):
        with pytest.raises(CorruptError, match=r"tokens: cannot be read \(Input/output error\)"):
            read()


def test_a_read_that_the_system_cuts_short_goes_on(checked, content, monkeypatch):
    really = os.preadv
    calls = []

    def short(descriptor, buffers, offset):
        calls.append(offset)
        return really(descriptor, [buffers[0][:1_000_000]], offset)

    monkeypatch.setattr(checked_file.os, "preadv", short)
    assert read_block(checked, 0) == content[:BLOCK_BYTES]
    assert calls == [0, 1_000_000, 2_000_000, 3_000_000, 4_000_000]


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
        assert read_block(checked[number], 0)[:100] == bytes([number]) * 100
        assert not checked[number].has_changed()
        assert len(open_here()) <= 3
    assert sorted(open_here()) == [str(tmp_path / name) for name in ("17", "18", "19")]
    checked[17].has_changed()
    read_block(checked[0], 0)  # takes the place of the one that was read longest ago
    assert sorted(open_here()) == [str(tmp_path / name) for name in ("0", "17", "19")]
    del files, checked
    gc.collect()
    assert not open_here()


def test_a_file_that_another_replaced_is_noticed_once_it_is_opened_again(tmp_path):
    files = OpenFiles(limit=1)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    first, second = (
        CheckedFile(tmp_path / name, block_hashes(name.encode() * 10), files) for name in "ab"
    )
    assert not first.has_changed()
    (tmp_path / "new").write_bytes(b"c" * 10)
    (tmp_path / "new").replace(tmp_path / "a")
    assert not first.has_changed()  # what is open stays what it was
    assert read_block(first, 0)[:10] == b"a" * 10
    assert not second.has_changed()
    assert first.has_changed()
    with pytest.raises(CorruptError, match="block 0"):
        read_block(first, 0)


def test_a_file_that_makes_room_for_another_can_be_read_to_its_end(tmp_path, monkeypatch):
    """Its number would be that of the other file, which would be read instead."""
    files, really, into = OpenFiles(limit=1), os.preadv, bytearray(10)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 10)

    def open_another_first(descriptor, buffers, offset):
        monkeypatch.setattr(checked_file.os, "preadv", really)
        files.version(str(tmp_path / "b"))
        return really(descriptor, [buffers[0][:4]], offset)

    monkeypatch.setattr(checked_file.os, "preadv", open_another_first)
    assert files.read_into(str(tmp_path / "a"), 0, memoryview(into)) == 10
    assert into == b"a" * 10


def test_what_is_in_memory_is_not_asked_for(tmp_path, monkeypatch):
    """Both ends are looked at; where nobody can tell, the operating system is asked."""
    path, asked, really = tmp_path / "a", [], os.preadv
    path.write_bytes(bytes(5 * PAGE_BYTES))
    missing = set()

    def look(descriptor, buffers, offset, flags=0):
        assert flags == os.RWF_NOWAIT
        if offset in missing:
            raise BlockingIOError
        return really(descriptor, buffers, offset)

    monkeypatch.setattr(checked_file.os, "preadv", look)
    monkeypatch.setattr(checked_file.os, "posix_fadvise", lambda *words: asked.append(words[1:3]))
    files, run = OpenFiles(), (PAGE_BYTES, 3 * PAGE_BYTES)
    files.announce(str(path), *run)
    assert not asked
    for place in (PAGE_BYTES, 4 * PAGE_BYTES - 1):
        missing = {place}
        files.announce(str(path), *run)
    assert asked == [run, run]
    missing = set()
    files.announce(str(path), 4 * PAGE_BYTES, 3 * PAGE_BYTES)  # beyond the end of the file
    assert len(asked) == 3
