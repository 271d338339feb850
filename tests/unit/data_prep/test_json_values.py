import contextlib
import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import json_values
from data_prep.byte_streams import DamagedInput
from data_prep.json_values import iter_json_values

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def values_of(data: bytes, limit: int = 1 << 20) -> list:
    stream = io.BufferedReader(io.BytesIO(data))  # pyright: ignore[reportArgumentType]
    return list(iter_json_values(stream, limit))


def parsed(data: bytes) -> list:
    return [json.loads(value.data) for value in values_of(data)]


@given(
    st.lists(VALUES),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
    st.integers(min_value=1, max_value=9),
)
def test_an_array_gives_its_elements_whatever_the_blocks(elements, indent, ascii_only, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_BLOCK_BYTES", block)
        assert parsed(json.dumps(elements, indent=indent, ensure_ascii=ascii_only).encode()) == (
            elements
        )


@given(
    st.lists(st.dictionaries(st.text(), VALUES)),
    st.sampled_from(["", "\n", " ", "\r\n\n"]),
    st.integers(min_value=1, max_value=9),
)
def test_objects_one_after_the_other_are_read(objects, between, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_BLOCK_BYTES", block)
        assert parsed(between.join(json.dumps(o, indent=1) for o in objects).encode()) == objects


def test_arrays_one_after_the_other_are_read():
    assert parsed(b'[1, {"a": "]"}]\n["x"][]') == [1, {"a": "]"}, "x"]


def test_numbers_and_words_at_the_top_are_values():
    assert [value.data for value in values_of(b"12 true\nnull, 1.5e3")] == [
        b"12",
        b"true",
        b"null",
        b"1.5e3",
    ]


def test_a_value_above_the_limit_is_passed_over_and_the_next_one_read():
    data = json.dumps([{"a": "x" * 100}, {"a": "y"}, "z" * 100]).encode()
    found = values_of(data, limit=50)
    assert [(v.number, v.size, v.data) for v in found] == [
        (1, 109, None),
        (2, 10, b'{"a": "y"}'),
        (3, 102, None),
    ]


def test_a_long_value_is_never_held():
    class Endless(io.RawIOBase):
        sent = 0

        def readable(self):
            return True

        def readinto(self, buffer, /):
            if self.sent > 64 << 20:
                return 0
            data = b'["' if not self.sent else b"x" * len(buffer)
            buffer[: len(data)] = data
            self.sent += len(data)
            return len(data)

    tracemalloc.start()
    with pytest.raises(DamagedInput, match="the file ends inside a JSON value"):
        list(iter_json_values(io.BufferedReader(Endless()), limit=1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (b'[{"a": 1}, {"a": ', 1, "ends inside a JSON value"),
        (b'[{"a": 1}, {"a": 2}', 2, "ends inside a JSON array"),
        (b'{"a": 1}]', 1, "a JSON bracket closes nothing"),
        (b"[1] }", 1, "a JSON bracket closes nothing"),
        (b'["a\\', 0, "ends inside a JSON value"),
    ],
)
def test_what_stands_before_damage_is_read(data, count, message):
    stream = io.BufferedReader(io.BytesIO(data))  # pyright: ignore[reportArgumentType]
    values = iter_json_values(stream, 100)
    for _ in range(count):
        next(values)
    with pytest.raises(DamagedInput, match=message):
        next(values)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_values_or_damage(data):
    with contextlib.suppress(DamagedInput):
        assert all(value.size for value in values_of(b"[" + data))
