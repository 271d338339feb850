"""Kernels in Triton's interpreter, and back."""

import contextlib
import sys

import pytest

from pipeline.modeling.kernels import serving

STAY_IMPORTED = (
    "arguments",
    "disentangled",
    "flash_peer",
    "serving",
    "tile_table",
    "traffic",
    "vocabulary_traffic",
)
"""Modules without Triton, which other modules hold."""


def forget_kernels():
    """Make the next use import the kernels anew: Triton reads its environment at that moment."""
    for name in list(sys.modules):
        package, _, module = name.rpartition(".")
        if package == "pipeline.modeling.kernels" and module not in STAY_IMPORTED:
            del sys.modules[name]
    serving.host.cache_clear()
    serving.say_once.cache_clear()


@contextlib.contextmanager
def interpreted_kernels():
    """Interpret the kernels on the CPU meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        forget_kernels()
        yield
    forget_kernels()
