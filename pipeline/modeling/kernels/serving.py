"""Whether the kernels serve a call: the reason against it, or None.

Triton compiles for NVIDIA GPUs since Ampere; with TRITON_INTERPRET set before the kernels are
imported it interprets them on a CPU, slowly, which is how they are tested without a GPU. Meta
tensors have no kernel to run, so that shapes and traffic can be counted everywhere.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch

HEAD_SIZES = (32, 64, 128)
_COMPILED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The interpreter has no bfloat16 arithmetic: it multiplies the bit patterns.
_INTERPRETED_DTYPES = (torch.float16, torch.float32, torch.float64)


@functools.cache
def host() -> Any:
    """Import the launcher, and with it Triton, when a kernel is wanted.

    Returns:
        The module `disentangled_host`.

    Raises:
        ImportError: Triton is missing or cannot be loaded.
    """
    return importlib.import_module("pipeline.modeling.kernels.disentangled_host")


# torch.compile asks once, while it traces: the answer depends on no tensor's values.
@torch.compiler.assume_constant_result
def refusal(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say why the kernels do not serve a call.

    Args:
        device: Where the tensors are.
        dtype: Their dtype.
        head_size: Channels of a head.

    Returns:
        The reason, in a few words, or None where they do.
    """
    if head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        return f"heads have {head_size} channels, and the kernels serve {sizes}"
    if device.type == "meta":
        return None
    try:
        interpreted = host().INTERPRETED
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if interpreted:
        return _refused_dtype(dtype, _INTERPRETED_DTYPES, "Triton's interpreter")
    if device.type != "cuda":
        return f"Triton compiles for NVIDIA GPUs, and the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    return _refused_dtype(dtype, _COMPILED_DTYPES, "the kernels")


def _refused_dtype(dtype: torch.dtype, served: tuple[torch.dtype, ...], by: str) -> str | None:
    if dtype in served:
        return None
    names = ", ".join(str(each).removeprefix("torch.") for each in served)
    return f"the dtype is {str(dtype).removeprefix('torch.')}, and {by} computes {names}"
