import contextlib
import gzip
import io
import lzma
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.byte_streams import (
    DamagedInput,
    compression_of,
    iter_lines,
    iter_pieces,
    open_bytes,
)

SKIPPABLE_FRAME = b"\x5a\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
PACKERS = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "zstd skippable": lambda data: SKIPPABLE_FRAME + zstandard.compress(data),
}
packers = pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
byte_soup = st.lists(
    st.sampled_from([b"\n", b"\r\n", b" ", b"ab", b"\xe2\x82\xac", b"\xff", b"\x00", b"\n\n"])
).map(b"".join)


def stream(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))  # pyright: ignore[reportArgumentType]


def read_file(path) -> bytes:
    with open_bytes(path) as file:
        return file.read()


@given(byte_soup, st.integers(1, 8))
def test_lines_are_those_of_a_split(data, limit):
    expected = data.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    ended = data.count(b"\n")
    lines = list(iter_lines(stream(data), limit, 0, None))
    assert [line.number for line in lines] == list(range(1, len(expected) + 1))
    offset = 0
    for index, (line, content) in enumerate(zip(lines, expected, strict=True)):
        assert line.offset == offset
        assert line.size == len(content) + (index < ended)
        content = content.removesuffix(b"\r") if index < ended else content
        assert line.data == (content if len(content) <= limit else None)
        offset += line.size


@given(byte_soup, st.integers(8, 20))
def test_pieces_joined_are_the_stream(data, limit):
    pieces = list(iter_pieces(stream(data), limit, 0, None))
    assert b"".join(piece.data for piece in pieces) == data
    assert all(0 < len(piece.data) <= limit for piece in pieces)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(data)
    assert [piece.offset for piece in pieces] == [
        sum(len(before.data) for before in pieces[:index]) for index in range(len(pieces))
    ]


@given(st.text(st.sampled_from("ab \u20ac\U0001f600"), max_size=60), st.integers(8, 20))
def test_pieces_never_cut_a_character(text, limit):
    for piece in iter_pieces(stream(text.encode()), limit, 0, None):
        piece.data.decode()


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (b"aaaa aaa\n\nbb cc\ndd", b"aaaa aaa\n\n"),
        (b"a\n\nbbbb bbb\nbb cc", b"a\n\nbbbb bbb\n"),
        (b"aaaa bbbb cccc dddd", b"aaaa bbbb "),
        (b"aaaaaaaaaaaaaaaaaaa", b"aaaaaaaaaaaaa"),
    ],
    ids=["blank line", "line end", "space", "nothing"],
)
def test_a_piece_ends_where_a_reader_would_cut(data, first):
    assert next(iter_pieces(stream(data), 13, 0, None)).data == first


@given(byte_soup.filter(bool), st.data())
def test_a_range_of_lines_is_a_slice(data, draw):
    whole = list(iter_lines(stream(data), 100, 0, None))
    first = draw.draw(st.integers(0, len(whole) - 1))
    last = draw.draw(st.integers(first, len(whole) - 1))
    start, end = whole[first].offset, whole[last].offset + whole[last].size
    lines = list(iter_lines(stream(data), 100, start, end))
    assert [line.data for line in lines] == [line.data for line in whole[first : last + 1]]
    assert b"".join(p.data for p in iter_pieces(stream(data), 9, start, end)) == data[start:end]


@packers
def test_compression_is_told_by_the_first_bytes(pack, tmp_path, request):
    data = b"line\n" * 10_000
    path = tmp_path / "no_suffix_at_all"
    path.write_bytes(pack(data))
    assert compression_of(pack(data)[:6]) == request.node.callspec.id.split()[0]
    assert read_file(path) == data


@packers
def test_members_follow_each_other_and_zero_padding_is_skipped(pack, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pack(b"one ") + pack(b"") + pack(b"two") + bytes(64))
    assert read_file(path) == b"one two"


def unpack_what_is_there(packed: bytes) -> bytes:
    if packed.startswith(SKIPPABLE_FRAME):
        packed = packed[len(SKIPPABLE_FRAME) :]
    decoders = {
        "gzip": lambda: zlib.decompressobj(31),
        "xz": lzma.LZMADecompressor,
        "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    }
    return decoders[compression_of(packed)]().decompress(packed)


@packers
@pytest.mark.parametrize("cut", [0.5, 0.9, 0.999])
def test_a_truncated_file_says_so_after_its_sound_lines(pack, cut, tmp_path):
    text = b"".join(b"%x\n" % (n * n * 7919) for n in range(60_000))
    packed = pack(text)[: int(len(pack(text)) * cut)]
    path = tmp_path / "file"
    path.write_bytes(packed)
    read = []

    def read_all():
        with open_bytes(path) as file:
            for line in iter_lines(file, 100, 0, None):
                read.append(line.data)

    with pytest.raises(DamagedInput, match="ends before its end mark"):
        read_all()
    assert read == unpack_what_is_there(packed).split(b"\n")[:-1]
    assert len(read) > 20_000


@packers
def test_no_flipped_bit_stops_or_silently_changes_a_packed_file(pack, tmp_path):
    data = bytes(range(256)) * 40
    packed = bytearray(pack(data))
    path = tmp_path / "file"
    # xz and gzip carry a checksum; zstandard.compress writes none, so that only crashes count.
    checked = compression_of(packed) != "zstd"
    silent = 0
    for position in range(0, len(packed), 3):
        packed[position] ^= 16
        path.write_bytes(packed)
        packed[position] ^= 16
        if compression_of(path.read_bytes()) is None:
            continue
        with contextlib.suppress(DamagedInput):
            silent += read_file(path) != data
    assert silent == 0 or not checked


def test_what_follows_a_gzip_member_must_be_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(b"text") + b"garbage")
    with open_bytes(path) as file, pytest.raises(DamagedInput, match="gzip data is broken"):
        file.read()


def test_a_plain_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(b"not packed at all")
    assert read_file(path) == b"not packed at all"
