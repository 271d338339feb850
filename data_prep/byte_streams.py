"""Bytes of a file as lines or pieces, whatever compressed it and however broken it is.

- `open_bytes`: a file as a stream of plain bytes; gzip, zstd and xz are told by their first bytes.
- `iter_lines`: its lines, in bounded memory: a line above the limit is passed over, never held.
- `iter_pieces`: the whole of it in pieces up to a limit, cut where a reader would cut.
- `DamagedInput`: raised by the stream where the compressed data breaks.
- `is_bomb`: more plain bytes than any text packs into so few; a few kilobytes could fill a disk.

Only b"\\n" ends a line here: U+2028, U+0085 and lone carriage returns are characters of the text.
"""

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from data_prep.locations import open_file

_BUFFER_BYTES = 1 << 20
# What one step may unpack is bounded by what it is fed: zstd packs 128 KiB into 4 bytes, so 2 KiB
# can grow to 64 MiB, and no larger. Smaller steps would cost speed, larger ones memory.
_FEED_BYTES = 2048
_XZ_MEMORY_BYTES = 256 << 20
MAX_RATIO = 200
"""Text packs 3 to 10 times, the same line again and again up to 100 times."""
_FREE_BYTES = 64 << 20
BOMB = f"unpacks to more than {MAX_RATIO} times its size, which no text does"
_MAGIC_BYTES = 6


class DamagedInput(Exception):
    """The compressed bytes are broken from here on; the message says how."""


class Line(NamedTuple):
    """One line of a stream."""

    number: int
    """Counted from 1 at the start of the stream."""
    offset: int
    """Position of its first byte in the (unpacked) file."""
    size: int
    """Bytes, the line end included."""
    data: bytes | None
    """The line without its line end; None if it is longer than the limit."""


class Piece(NamedTuple):
    """One piece of a stream."""

    offset: int
    """Position of its first byte in the (unpacked) file."""
    data: bytes
    """Its bytes; the pieces of a stream joined together are the stream."""
    is_last: bool
    """Whether the stream, or the range of it, ends here."""


def _new_gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _new_xz() -> Any:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)


def _new_zstd() -> Any:
    return zstandard.ZstdDecompressor().decompressobj()


_FORMATS: tuple[tuple[str, bytes, Callable[[], Any]], ...] = (
    ("gzip", b"\x1f\x8b", _new_gzip),
    ("xz", b"\xfd7zXZ\x00", _new_xz),
    ("zstd", b"\x28\xb5\x2f\xfd", _new_zstd),
    *(("zstd", bytes([0x50 + n]) + b"\x2a\x4d\x18", _new_zstd) for n in range(16)),
)


def compression_of(first_bytes: bytes) -> str | None:
    """Tell a compression by the first bytes of a file.

    Args:
        first_bytes: At least the first 6 bytes, or the whole of a shorter file.

    Returns:
        "gzip", "xz" or "zstd" (a skippable frame in front included), or None for anything else.
    """
    for name, magic, _ in _FORMATS:
        if first_bytes.startswith(magic):
            return name
    return None


def compression_of_file(path: str) -> str | None:
    """Tell the compression of a file by its first bytes.

    Args:
        path: The file.

    Returns:
        As `compression_of`.

    Raises:
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        return compression_of(file.read(_MAGIC_BYTES))


def is_bomb(packed_bytes: int, plain_bytes: int) -> bool:
    """Tell bytes that were packed to do harm, or by mistake, from text.

    Args:
        packed_bytes: Bytes read so far.
        plain_bytes: What they became.

    Returns:
        Whether they are above 64 MiB and more than 200 times as many.
    """
    return plain_bytes > max(_FREE_BYTES, MAX_RATIO * packed_bytes)


class _Unpacked(io.RawIOBase):
    """The plain bytes of a compressed file: members one after the other, zero padding skipped."""

    def __init__(self, file: io.BufferedReader, name: str, new_decoder: Callable[[], Any]):
        self._file = file
        self._name = name
        self._new_decoder = new_decoder
        self._decoder: Any = None
        self._packed = b""
        self._plain = memoryview(b"")
        self._packed_bytes = self._plain_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._plain:
            if not self._packed:
                self._packed = self._file.read(_FEED_BYTES)
                self._packed_bytes += len(self._packed)
            if not self._packed:
                if self._decoder is not None:
                    raise DamagedInput(f"{self._name} data ends before its end mark")
                return 0
            self._plain = memoryview(self._unpack_step())
            self._plain_bytes += len(self._plain)
            if is_bomb(self._packed_bytes, self._plain_bytes):
                raise DamagedInput(f"{self._name} data {BOMB}")
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _unpack_step(self) -> bytes:
        if self._decoder is None:
            self._packed = self._packed.lstrip(b"\x00")
            if not self._packed:
                return b""
            self._decoder = self._new_decoder()
        try:
            plain = self._decoder.decompress(self._packed)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
            raise DamagedInput(f"{self._name} data is broken: {error}") from error
        self._packed = b""
        if self._decoder.eof:
            self._packed = self._decoder.unused_data
            self._decoder = None
        return plain

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(path: str | Path) -> io.BufferedReader:
    """Open a file as its plain bytes.

    Args:
        path: A path or URL: a plain file, or one packed with gzip, xz or zstd (any number of
            members).

    Returns:
        A buffered stream; reading raises `DamagedInput` where the packed data breaks.

    Raises:
        OSError: The file cannot be opened.
    """
    file = open_file(str(path))
    name = compression_of(file.peek(_MAGIC_BYTES)[:_MAGIC_BYTES])
    for known, _, new_decoder in _FORMATS:
        if known == name:
            return io.BufferedReader(_Unpacked(file, known, new_decoder), _BUFFER_BYTES)
    return file


def iter_lines(
    stream: io.BufferedReader, limit: int, start: int, end: int | None
) -> Iterator[Line]:
    """Read the lines of a stream, or of a range of it, in bounded memory.

    Args:
        stream: Where to read; a range is reached by seeking, so it needs a plain file.
        limit: Longest line that is held, in bytes.
        start: Offset of the first line, 0 or just behind a b"\\n".
        end: Offset behind the last line, or None for the end of the stream.

    Yields:
        Every line, blank ones included; `data` is None for one above the limit.

    Raises:
        DamagedInput: Packed data is broken; the lines before were yielded.
    """
    if start:
        stream.seek(start)
    offset, number = start, 0
    while end is None or offset < end:
        data = stream.readline(limit + 2)
        if not data:
            return
        number += 1
        size = len(data)
        ended = data.endswith(b"\n")
        content = data[:-1].removesuffix(b"\r") if ended else data
        is_long = len(content) > limit
        while is_long and not ended:
            data = content = b""
            data = stream.readline(_BUFFER_BYTES)
            size += len(data)
            ended = not data or data.endswith(b"\n")
        yield Line(number, offset, size, None if is_long else content)
        offset += size


def iter_pieces(
    stream: io.BufferedReader, limit: int, start: int, end: int | None
) -> Iterator[Piece]:
    """Read a stream, or a range of it, in pieces of at most `limit` bytes.

    A piece ends behind the last blank line of its second half, else behind the last line end, else
    behind the last space or tab, else between two characters.

    Args:
        stream: Where to read; a range is reached by seeking, so it needs a plain file.
        limit: Longest piece, in bytes; at least 8.
        start: Offset of the first byte.
        end: Offset behind the last byte, or None for the end of the stream.

    Yields:
        The pieces in order; one alone if everything fits the limit.

    Raises:
        DamagedInput: Packed data is broken; the pieces before were yielded.
    """
    if start:
        stream.seek(start)
    offset, read_to = start, start
    kept = b""
    while True:
        wanted = limit + 1 - len(kept)
        more = stream.read(wanted if end is None else min(wanted, end - read_to))
        read_to += len(more)
        kept += more
        if len(kept) <= limit:
            if kept:
                yield Piece(offset, kept, is_last=True)
            return
        cut = _cut_point(kept, limit)
        yield Piece(offset, kept[:cut], is_last=False)
        kept = kept[cut:]
        offset += cut


def _cut_point(data: bytes, limit: int) -> int:
    blank_line = data.rfind(b"\n\n", limit // 2, limit) + 2
    if blank_line > 2:
        return blank_line
    for marks in ((b"\n",), (b" ", b"\t")):
        cut = max(data.rfind(mark, 0, limit) for mark in marks) + 1
        if cut:
            return cut
    cut = limit
    # A UTF-8 character has at most 3 continuation bytes; more of them is not UTF-8 anyway.
    while cut > limit - 3 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
