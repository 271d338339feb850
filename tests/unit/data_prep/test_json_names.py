"""Names that stand twice in an object, spelled with and without escapes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.json_names import is_twice, may_be_twice


def spelled(name, data):
    """A way to write a name between quotes."""
    short = {json.loads(f'"\\{char}"'): f"\\{char}" for char in 'bfnrt"\\/'}

    def char_spelled(char):
        units = char.encode("utf-16-be")
        codes = [units[n : n + 2].hex() for n in range(0, len(units), 2)]
        escaped = "".join(
            f"\\u{data.draw(st.sampled_from([code, code.upper()]))}" for code in codes
        )
        plain = [] if char in '"\\' or char < " " else [char]
        return data.draw(st.sampled_from([*plain, escaped, *filter(None, [short.get(char)])]))

    return '"' + "".join(map(char_spelled, name)) + '"'


@given(
    st.text(
        st.sampled_from('te/"\\\n\x01é😀') | st.characters(codec="utf-8"), min_size=1, max_size=5
    ),
    st.data(),
)
def test_every_spelling_of_a_name_is_seen(name, data):
    first, second = spelled(name, data), spelled(name, data)
    assert json.loads(first) == json.loads(second) == name
    twice = f'{{{first}: 1, "another\\n": [{{}}], {second}: 2}}'
    assert may_be_twice(twice.encode(), name)
    assert is_twice(twice, name)
    assert not may_be_twice(f"{{{first}: 1}}".encode(), name)


@pytest.mark.parametrize(
    ("source", "may_be", "is_so"),
    [
        ('{"text": 1, "te\\u0078T": 2}', False, False),
        ('{"text": 1, "te\\u0079t": 2}', False, False),
        ('{"text": 1, "te\\U0078t": 2}', False, None),
        ('{"text": 1, "te\\\\u0078t": 2}', False, False),
        ('{"text": "te\\u0078t"}', True, False),
        ('{"text": 1, "inner": {"te\\u0078t": 2}}', True, False),
        ('{"inner": {"te\\u0078t": 2, "text": 1}}', True, False),
        ('{"text": 1, "inner": {}, "tex\\u0074": 2}', True, True),
    ],
)
def test_only_names_of_the_outermost_object_count(source, may_be, is_so):
    assert may_be_twice(source.encode(), "text") is may_be
    if is_so is not None:
        assert is_twice(source, "text") is is_so
