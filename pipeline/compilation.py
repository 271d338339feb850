"""Whether torch.compile can make a kernel here, asked before a run depends on it.

On a CPU its kernels are C++ and need a compiler; on a GPU they are Triton's and need Triton and a C
compiler for the launcher. What is missing shows only when a kernel is made, in the first step, as
an error of forty lines.
"""

import torch

from data_prep.errors import UserError


def require_compiler(device: torch.device) -> None:
    """Make one small kernel.

    Args:
        device: Where the run computes.

    Raises:
        UserError: It cannot be made.
    """
    try:
        # A cosine is in no library of finished kernels.
        torch.compile(torch.cos, fullgraph=True, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        reason = _innermost(error)
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise UserError(
            f'model.compile = "layer" needs {needs} for kernels on {device.type}, and none can be '
            f"made: {reason}. Install what is missing, or set model.compile=none; the run then "
            "computes the same, more slowly"
        ) from error


def _innermost(error: BaseException) -> str:
    """Type and first line of what an error was caused by."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
