"""Gumbel noise in a kernel: that of `rtd.gumbel_noise`, computed where it is used.

The words are the same integers, and the formula has the same operations in the same order, each
rounded to fp32. Its two logarithms are those of the library that torch uses on the same device:
CUDA's on a GPU, torch's own where the kernels are interpreted (NumPy's differ in the last bit of
every fifth number).

Letters: R rows, that is masked slots, Q counters of a row, C = 4 Q ids.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from pipeline.modeling.kernels.philox import philox4x32


@triton.jit
def _log1p(x):
    """Compute log(1 + x) as `torch.log1p` does."""
    return libdevice.log1p(x)


@triton.jit
def _log(x):
    """Compute the natural logarithm as `torch.log` does."""
    return libdevice.log(x)


def _interpreted(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """Let the interpreter call a function of torch, which has no library of the device."""

    def evaluate(x: Any) -> Any:
        found = -x  # another tile of this shape
        found.handle.data = function(torch.from_numpy(x.handle.data)).numpy()
        return found

    return evaluate


if not isinstance(_log, triton.JITFunction):
    _log1p, _log = _interpreted(torch.log1p), _interpreted(torch.log)


@triton.jit
def gumbel_tile(slot_R3, key_2, first_quad, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Evaluate a tile of standard Gumbel noise.

    Args:
        slot_R3: Three uint32 [R, 1]: positions of the slots, and both words of their samples.
        key_2: Two uint32, the stream.
        first_quad: First vocabulary id, divided by four.
        BLOCK_R: R.
        BLOCK_Q: Q.

    Returns:
        fp32 [R, C]; -inf where a word rounds to u = 1.
    """
    quad_1Q = (first_quad + tl.arange(0, BLOCK_Q)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = philox4x32(quad_1Q, slot_R3[0], slot_R3[1], slot_R3[2], key_2[0], key_2[1])
    # Joins put the new axis last: the four words of a counter lie side by side.
    words_RQ22 = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    word_RC = tl.reshape(words_RQ22, [BLOCK_R, 4 * BLOCK_Q])
    u_RC = (word_RC.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return -_log(-_log1p(-u_RC))
