"""Whether the kernels serve a call: the reason against it, or None.

Triton compiles for NVIDIA GPUs since Ampere; with TRITON_INTERPRET set before the kernels are
imported it interprets them on a CPU, slowly, which is how they are tested without a GPU. The
attention's operators also take meta tensors, which have no kernel to run, so that shapes and
traffic can be counted everywhere.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

HEAD_SIZES = (32, 64, 128)
COMPILED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The interpreter has no bfloat16 arithmetic: it multiplies the bit patterns.
_INTERPRETED_DTYPES = (torch.float16, torch.float32, torch.float64)
# What the vocabulary head rounds to narrow dtypes are results; its arithmetic is fp32 everywhere.
_HEAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

logger = logging.getLogger(__name__)


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log a message the first time that it comes up.

    Args:
        level: Of `logging`.
        message: The message.
    """
    logger.log(level, message)


@functools.cache
def host(name: Literal["disentangled", "vocabulary"] = "disentangled") -> Any:
    """Import a launcher, and with it Triton, when a kernel is wanted.

    Args:
        name: Of attention or of the vocabulary head.

    Returns:
        The module `disentangled_host` or `vocabulary_host`.

    Raises:
        ImportError: Triton is missing or cannot be loaded.
    """
    return importlib.import_module(f"pipeline.modeling.kernels.{name}_host")


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
        return refused_head_size(head_size, "the kernels")
    if device.type == "meta":
        return None
    return _refused("disentangled", device, dtype, _INTERPRETED_DTYPES, COMPILED_DTYPES)


def head_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels do not serve the vocabulary head.

    Args:
        device: Where the tensors are.
        dtype: Of hidden states and word table.

    Returns:
        The reason, in a few words, or None where they do.
    """
    return _refused("vocabulary", device, dtype, _HEAD_DTYPES, _HEAD_DTYPES)


def _refused(
    name: Literal["disentangled", "vocabulary"],
    device: torch.device,
    dtype: torch.dtype,
    interpreted_dtypes: Sequence[torch.dtype],
    compiled_dtypes: Sequence[torch.dtype],
) -> str | None:
    try:
        interpreted = host(name).INTERPRETED
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if interpreted and device.type != "meta":
        return refused_dtype(dtype, interpreted_dtypes, "Triton's interpreter")
    if device.type != "cuda":
        return f"Triton compiles for NVIDIA GPUs, and the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    return refused_dtype(dtype, compiled_dtypes, "the kernels")


def refused_head_size(head_size: int, by: str) -> str:
    """Say that heads are not of a served size.

    Args:
        head_size: Channels of a head.
        by: Who serves `HEAD_SIZES`.

    Returns:
        The reason.
    """
    sizes = ", ".join(map(str, HEAD_SIZES))
    return f"heads have {head_size} channels, and {by} serve {sizes}"


def refused_dtype(dtype: torch.dtype, served: Sequence[torch.dtype], by: str) -> str | None:
    """Say why a dtype is not served.

    Args:
        dtype: Of the tensors.
        served: What can be computed.
        by: By whom.

    Returns:
        The reason, or None where it is served.
    """
    if dtype in served:
        return None
    names = ", ".join(str(each).removeprefix("torch.") for each in served)
    return f"the dtype is {str(dtype).removeprefix('torch.')}, and {by} can compute {names}"
