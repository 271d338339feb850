"""Triton's interpreter for tests: the kernels imported anew, so that they run on a CPU, and back.

Triton reads TRITON_INTERPRET when a kernel is defined, that is, when its module is imported.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.modeling.kernels import serving, tile_table

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def forget_kernels() -> None:
    """Make the next use import the kernels anew: what holds Triton, and the launchers above it."""
    for name in list(sys.modules):
        is_ours = name.startswith("pipeline.modeling.kernels.")
        if is_ours and (hasattr(sys.modules[name], "triton") or name.endswith("_host")):
            del sys.modules[name]
    serving.host.cache_clear()
    serving.say_once.cache_clear()


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Interpret kernels inside, and compile them again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        forget_kernels()
        if HAS_TRITON:
            _let_scalars_be_numbers(patch)
        yield
    forget_kernels()


def _let_scalars_be_numbers(patch: pytest.MonkeyPatch) -> None:
    """Repair Triton 3.6 under NumPy 2.4, where an array of one element is no number any more.

    The interpreter holds a scalar as such an array, and `range` asks it for a number. Triton 3.7
    has the repair (triton-lang/triton, pull request 9172).
    """
    import triton
    from triton.runtime import interpreter

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        return
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_patch_lang_tensor", patched)


def watch_launches(patch: pytest.MonkeyPatch, host: Any) -> list[tuple[list[torch.Size], bool]]:
    """Let kernels run and write down where.

    Args:
        patch: Undone at the end of a test.
        host: The module that launches them.

    Returns:
        Filled with every launch: shapes of the tensors whose device it was made for, outermost
        first, and whether autocast was on.
    """
    inside: list[torch.Size] = []
    launches: list[tuple[list[torch.Size], bool]] = []
    launch = host.launch

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        inside.append(tensor.shape)
        yield
        inside.pop()

    def watch(*args: Any, **constants: Any) -> None:
        launches.append((list(inside), torch.is_autocast_enabled("cpu")))
        launch(*args, **constants)

    patch.setattr(torch.cuda, "device_of", device_of)
    patch.setattr(host, "launch", watch)
    return launches


def choose_tiles(patch: pytest.MonkeyPatch, rows: int, columns: int | None = None) -> None:
    """Set the interpreter's tiles, square ones where no columns are given."""
    patch.setattr(tile_table, "INTERPRETED", tile_table.Tile(rows, columns or rows, 1, 1))
