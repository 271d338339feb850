"""Names in JSON objects, however they are spelled: "text" is also "te\\u0078t".

- `may_be_twice`: whether an object may have a name twice; quick, and never wrong when it says no.
- `is_twice`: whether its outermost object has it twice; reads the whole of it.
"""

import json
import re
from functools import lru_cache
from itertools import islice

_SHORT_ESCAPES = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_SHORT_ESCAPES |= {char: char for char in '"\\/'}


def may_be_twice(data: bytes, name: str) -> bool:
    """Look for spellings of a name between quotes.

    Args:
        data: An object as it stands in a file.
        name: The name.

    Returns:
        False if it stands there once at most, be it as a name or as a value.
    """
    if data.count(f'"{name}"'.encode("utf-8", "surrogatepass")) > 1:
        return True
    needle, spellings = _spellings(name)
    # Most lines have no such escape, and looking for one costs less than looking for a pattern.
    return needle in data and len(list(islice(spellings.finditer(data), 2))) > 1


def is_twice(source: str, name: str) -> bool:
    """Tell whether the outermost object has a name twice; `json.loads` takes the last one.

    Args:
        source: An object.
        name: The name.

    Returns:
        Whether it does.
    """
    names: list[str] = []

    def remember(pairs: list[tuple[str, object]]) -> None:
        # Called for inner objects first.
        names[:] = [name for name, _ in pairs]

    json.loads(source, object_pairs_hook=remember)
    return names.count(name) > 1


@lru_cache(maxsize=16)
def _spellings(name: str) -> tuple[bytes, re.Pattern[bytes]]:
    """What each way to write a name with escapes holds, and all ways (RFC 8259, section 7)."""
    has_short_ones = any(char in _SHORT_ESCAPES for char in name)
    needle = b"\\u00" if name.isascii() and not has_short_ones else b"\\"
    return needle, re.compile(b'"' + b"".join(map(_spellings_of, name)) + b'"')


def _spellings_of(char: str) -> bytes:
    units = char.encode("utf-16-be", "surrogatepass")
    codes = (units[n : n + 2].hex() for n in range(0, len(units), 2))
    ways = ["".join(rf"\\u(?i:{code})" for code in codes)]
    if char in _SHORT_ESCAPES:
        ways.append(re.escape("\\" + _SHORT_ESCAPES[char]))
    escaped = "|".join(ways).encode()
    if char in '"\\' or char < " ":
        return b"(?:" + escaped + b")"
    return b"(?:" + re.escape(char.encode("utf-8", "surrogatepass")) + b"|" + escaped + b")"
