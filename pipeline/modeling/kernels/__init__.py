"""Fused kernels in Triton, which is optional: nothing here imports it before a kernel is wanted.

    disentangled       the attention of `pipeline.modeling.attention` as a pair of torch operators
    serving            whether the kernels serve a device, a dtype and a head size, and why not
    tile_table         block sizes by kind of GPU, head size and dtype; nothing is tuned in a run
    traffic            bytes of HBM and FLOPs that the operators document
    disentangled_host  what the operators do: matrix products, launches, scratch memory
    forward_kernel, backward_kernels, score_tiles, keep_bits   the Triton code

Only the last five files import Triton. Whether it compiles them or interprets them on a CPU is
decided outside, by TRITON_INTERPRET in the environment of whoever imports them first.
"""
