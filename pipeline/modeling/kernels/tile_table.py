"""Block sizes of the kernels, chosen beforehand: a run never times candidates.

A table belongs to a kind of GPU and says how it was chosen. Newer GPUs use the newest table that
they are not older than. `python -m tests.benchmarks.kernels_compile` compiles every entry and
fails where one spills registers or takes too much shared memory.
"""

from dataclasses import dataclass, replace
from typing import Literal

KernelName = Literal["forward", "delta", "scores", "side", "table", "rows"]
HeadKernelName = Literal["sums", "gradient"]

NOT_MEASURED = "not measured: chosen by registers and shared memory alone"


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut into programs."""

    rows: int
    """Queries of a tile; rows of dS in the kernels that read it; rows of the table; slots in the
    vocabulary head."""
    columns: int
    """Keys of a tile; columns or diagonals of dS; ids in the vocabulary head."""
    warps: int
    stages: int
    """Depth of the software pipeline that loads tiles."""
    fuses: bool = True
    """Whether a product and a sum may be rounded once instead of twice."""

    @property
    def launch_options(self) -> dict[str, int]:
        """How Triton compiles a kernel of this tile."""
        # Fusing was Triton's default, and will not be from 3.10 on.
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": self.fuses,
        }


@dataclass(frozen=True)
class TileTable:
    """The tiles of one kind of GPU."""

    measurement: str
    """Device, date and result of the benchmark that chose them."""
    tiles: dict[KernelName, dict[tuple[int, int], Tile]]
    """kernel -> (head size, bytes of an element) -> tile."""
    head: dict[HeadKernelName, Tile]
    """Kernels of the vocabulary head, whose logits are fp32 in every run."""


_DELTA = {32: Tile(128, 1, 4, 1), 64: Tile(64, 1, 4, 1), 128: Tile(32, 1, 4, 1)}
_SMALL, _SMALL_WIDE = Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)
_NARROW = Tile(32, 16, 8, 2)
_ROWS = {32: Tile(32, 32, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1)}
# fp32 goes through the ordinary units, so that its tiles differ little between GPUs.
_SINGLE: dict[KernelName, dict[int, Tile]] = {
    "forward": {32: _SMALL, 64: _SMALL, 128: _SMALL_WIDE},
    "delta": _DELTA,
    "scores": {32: _NARROW, 64: _NARROW, 128: _NARROW},
    "side": {32: _SMALL, 64: _SMALL, 128: _SMALL_WIDE},
    "table": {32: _SMALL_WIDE, 64: _SMALL_WIDE, 128: _SMALL_WIDE},
    "rows": _ROWS,
}
_SQUARE = Tile(64, 64, 4, 2)
_HALF_80: dict[KernelName, dict[int, Tile]] = {
    "forward": {32: Tile(64, 64, 8, 2), 64: Tile(64, 32, 8, 2), 128: Tile(64, 32, 8, 2)},
    "delta": _DELTA,
    "scores": {32: _SMALL, 64: Tile(64, 32, 4, 2), 128: _SMALL},
    "side": {32: _SQUARE, 64: _SQUARE, 128: Tile(64, 64, 8, 2)},
    "table": {32: _SQUARE, 64: _SQUARE, 128: Tile(64, 64, 8, 2)},
    "rows": _ROWS,
}
_HALF_90: dict[KernelName, dict[int, Tile]] = {
    "forward": {32: _SQUARE, 64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 4, 2)},
    "delta": _DELTA,
    "scores": {32: Tile(32, 64, 8, 2), 64: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 2)},
    "side": {32: _SQUARE, 64: _SQUARE, 128: Tile(64, 64, 8, 2)},
    "table": {32: _SQUARE, 64: _SQUARE, 128: Tile(64, 64, 8, 2)},
    "rows": _ROWS,
}


def _by_size(
    half: dict[KernelName, dict[int, Tile]], single: dict[KernelName, dict[int, Tile]]
) -> dict[KernelName, dict[tuple[int, int], Tile]]:
    """Join the tiles of two and of four bytes an element."""
    return {
        kernel: {
            (head_size, element_bytes): tile
            for element_bytes, table in ((2, half), (4, single))
            for head_size, tile in table[kernel].items()
        }
        for kernel in half
    }


# Four neighbours are one thread's: they share an evaluation of Philox, and no tile changes hands.
# Nothing is fused, so that scores of draws are rounded as torch's operations round them.
_HEAD: dict[HeadKernelName, Tile] = {
    "sums": Tile(1, 512, 4, 1, fuses=False),
    "gradient": Tile(8, 128, 4, 1, fuses=False),
}

TABLES: dict[str, TileTable] = {
    "sm_80": TileTable(NOT_MEASURED, _by_size(_HALF_80, _SINGLE), _HEAD),
    "sm_90": TileTable(NOT_MEASURED, _by_size(_HALF_90, _SINGLE), _HEAD),
}

INTERPRETED = Tile(128, 128, 1, 1)
"""Triton's interpreter runs a tile as NumPy operations: large ones are fast, any one is right."""

TABLE_PROGRAMS = 256
"""Programs that `table_kernel` should have: sequences are cut into parts until it has them."""
GRADIENT_ROWS = 128
"""Rows of a program of the vocabulary head's `gradient_kernel`, which sums them for the bias."""


def architecture_of(capability: tuple[int, int]) -> str:
    """Choose the table of a GPU.

    Args:
        capability: CUDA compute capability, at least (8, 0).

    Returns:
        A key of `TABLES`.
    """
    return "sm_90" if capability >= (9, 0) else "sm_80"


def tile_for(
    architecture: str | None,
    kernel: KernelName,
    head_size: int,
    element_bytes: int,
    octets: bool = True,
) -> Tile:
    """Look up the tile of a kernel.

    Args:
        architecture: A key of `TABLES`; None under the interpreter.
        kernel: The kernel.
        head_size: Channels of a head: 32, 64 or 128.
        element_bytes: Bytes of an input's element: 2 or 4.
        octets: Whether one evaluation of Philox serves eight elements of the tile. Where each
            evaluates its own, half as many columns keep the registers in bounds.

    Returns:
        The tile.
    """
    if architecture is None:
        return INTERPRETED
    tile = TABLES[architecture].tiles[kernel][head_size, element_bytes]
    return tile if octets else replace(tile, columns=max(16, tile.columns // 2))


def head_tile(architecture: str | None, kernel: HeadKernelName) -> Tile:
    """Look up the tile of a kernel of the vocabulary head.

    Args:
        architecture: A key of `TABLES`; None under the interpreter.
        kernel: The kernel.

    Returns:
        The tile.
    """
    return INTERPRETED if architecture is None else TABLES[architecture].head[kernel]
