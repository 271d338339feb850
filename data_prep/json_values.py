"""The values of a .json file, one at a time, in bounded memory.

- `iter_json_values`: the elements of an array, or values that stand one after the other, each as
  the bytes that it has in the file; a value above the limit is passed over, never held.

What a value means is the reader's business: only brackets, strings and separators are looked at
here, so that a file of any size needs no more memory than its longest accepted value. One object,
an array of objects over many lines, arrays one after the other and JSON lines are all read.
"""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.byte_streams import DamagedInput

_BLOCK_BYTES = 1 << 20
_SEPARATORS = re.compile(rb"[\s,]*+")
_STRUCTURE = re.compile(rb'["\[\]{}]')
# The possessive forms keep the search linear in a string of backslashes.
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_REST_OF_SCALAR = re.compile(rb'[^\s,"\[\]{}]*+')


class JsonValue(NamedTuple):
    """One value of the file."""

    number: int
    """Counted from 1."""
    size: int
    """Its bytes."""
    data: bytes | None
    """The value as it stands in the file; None if it is longer than the limit."""


def iter_json_values(stream: io.BufferedReader, limit: int) -> Iterator[JsonValue]:
    """Read the values of a file.

    Args:
        stream: The file's bytes, behind a byte order mark.
        limit: Longest value that is held, in bytes.

    Yields:
        Every element of every array at the top, and every other value at the top.

    Raises:
        DamagedInput: The packed data is broken, a bracket closes nothing, or the file ends inside
            a value or an array; the values before were yielded.
    """
    scanner = _Scanner(limit)
    while block := stream.read(_BLOCK_BYTES):
        yield from scanner.feed(block)
    yield from scanner.close()


class _Scanner:
    """Where in the file the next byte lies; fed block by block.

    Args:
        limit: longest value that is held, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._number = 0
        self._in_array = False
        self._in_value = self._in_scalar = self._in_string = False
        self._skips_next = False
        """Whether the last block ended between a backslash and what it escapes."""
        self._depth = 0
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, block: bytes) -> Iterator[JsonValue]:
        """Take in the next bytes; yields the values that end in them."""
        position = 0
        while position < len(block):
            if not self._in_value:
                position = self._find_value(block, position)
                continue
            scan = self._scan_scalar if self._in_scalar else self._scan_nested
            end, has_ended = scan(block, position)
            self._size += end - position
            if self._size <= self._limit:
                self._parts.append(block[position:end])
            else:
                self._parts.clear()
            if has_ended:
                yield self._finish()
            position = end

    def close(self) -> Iterator[JsonValue]:
        """End the file; yields a number or a word that only the end of the file could end."""
        if self._in_value and not self._in_scalar:
            raise DamagedInput("the file ends inside a JSON value")
        if self._in_value:
            yield self._finish()
        if self._in_array:
            raise DamagedInput("the file ends inside a JSON array")

    def _find_value(self, block: bytes, position: int) -> int:
        """Pass separators and the brackets of the outer array; note where a value begins."""
        found = _SEPARATORS.match(block, position)
        position = found.end() if found else position
        first = block[position : position + 1]
        if first == b"[" and not self._in_array:
            self._in_array = True
            return position + 1
        if first == b"]" and self._in_array:
            self._in_array = False
            return position + 1
        if first in (b"]", b"}"):
            raise DamagedInput("a JSON bracket closes nothing")
        if first:
            self._in_value = True
            self._in_scalar = first not in (b'"', b"[", b"{")
        return position

    def _scan_scalar(self, block: bytes, position: int) -> tuple[int, bool]:
        found = _REST_OF_SCALAR.match(block, position)
        end = found.end() if found else position
        return end, end < len(block)

    def _scan_nested(self, block: bytes, position: int) -> tuple[int, bool]:
        """Go on to the end of a string, object or array, or of the block."""
        while position < len(block):
            if self._in_string:
                position = self._pass_string(block, position)
            else:
                found = _STRUCTURE.search(block, position)
                if found is None:
                    return len(block), False
                position = found.end()
                self._in_string = found[0] == b'"'
                if not self._in_string:
                    self._depth += 1 if found[0] in b"[{" else -1
                    if not self._depth:
                        return position, True
                continue
            if not self._in_string and not self._depth:
                return position, True
        return len(block), False

    def _pass_string(self, block: bytes, position: int) -> int:
        if self._skips_next:
            self._skips_next = False
            position += 1
        found = _REST_OF_STRING.match(block, position)
        position = found.end() if found else position
        if position < len(block):
            # What stopped the match is the closing quote, or a backslash that ends the block.
            self._skips_next = block[position] == ord("\\")
            self._in_string = self._skips_next
            position += 1
        return position

    def _finish(self) -> JsonValue:
        self._number += 1
        data = b"".join(self._parts) if self._size <= self._limit else None
        value = JsonValue(self._number, self._size, data)
        self._parts.clear()
        self._size = 0
        self._in_value = self._in_scalar = False
        return value
