"""How kernels are launched: for which device, and with the options of their tile."""

from typing import Any

import torch
import triton

from pipeline.modeling.kernels.philox import philox4x32
from pipeline.modeling.kernels.tile_table import Tile, architecture_of

INTERPRETED = not isinstance(philox4x32, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels were imported: they then run on a CPU."""


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *args: Any, **constants: Any) -> None:
    """Launch a kernel with the options of its tile, on the current device.

    Args:
        kernel: A function of the kernel modules.
        grid: Programs in each dimension.
        tile: The tile.
        *args: Tensors, numbers and tuples of them.
        **constants: What the kernel is compiled for.
    """
    kernel[grid](*args, **constants, **tile.launch_options)


def device_architecture(device: torch.device) -> str | None:
    """Choose the tile table of a device.

    Args:
        device: Where the tensors are.

    Returns:
        A key of `TABLES`; None under the interpreter.
    """
    if INTERPRETED:
        return None
    return architecture_of(torch.cuda.get_device_capability(device))
