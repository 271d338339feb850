"""Philox4x32-10 in a kernel: the words of `counter_rng.philox4x32`, in 32-bit registers."""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, key_0, key_1):
    """Evaluate Philox4x32-10.

    Args:
        c0: uint32 tile, first word of the counters; the others are tiles that broadcast with it.
        c1: Second word.
        c2: Third word.
        c3: Fourth word.
        key_0: uint32, first word of the key.
        key_1: Second word.

    Returns:
        Four uint32 tiles of the broadcast shape.
    """
    multiplier_0: tl.constexpr = 0xD2511F53
    multiplier_1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, multiplier_0)
        high_1 = tl.umulhi(c2, multiplier_1)
        low_0 = tl.mul(c0, multiplier_0, sanitize_overflow=False)
        low_1 = tl.mul(c2, multiplier_1, sanitize_overflow=False)
        c0 = high_1 ^ c1 ^ key_0
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_1
        c3 = low_0
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3
