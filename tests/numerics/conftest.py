"""Fixtures of the kernels: Triton's interpreter, and its tiles."""

import pytest

from tests.interpreting import choose_tiles, interpreted_kernels


@pytest.fixture(scope="module")
def interpreter():
    """Kernels are interpreted in a file that asks for this, and in no other."""
    with interpreted_kernels():
        yield


@pytest.fixture
def tiles(monkeypatch):
    """Set the interpreter's tiles: a function of rows and columns."""
    return lambda rows, columns=None: choose_tiles(monkeypatch, rows, columns)
