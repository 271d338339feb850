"""Fused kernels in Triton, which is optional: nothing here imports it before a kernel is wanted.

    disentangled       the attention of `pipeline.modeling.attention` as a pair of torch operators
    serving            whether the kernels serve a device, a dtype and a head size, and why not
    tile_table         block sizes by kind of GPU, head size and dtype; nothing is tuned in a run
    traffic, vocabulary_traffic   bytes of HBM and FLOPs that operators and kernels document
    arguments          groups of pointers and numbers that kernels take
    disentangled_host  what the operators do: matrix products, launches, scratch memory
    vocabulary_host    the same for the chunks of `pipeline.modeling.vocabulary_head`
    launching          for which device, with which options
    forward_kernel, score_kernel, gradient_kernels, score_tiles, keep_bits   attention in Triton
    vocabulary_kernels, gumbel                                               the head in Triton
    philox             the random words of both

Only what stands from `disentangled_host` on imports Triton. Whether it compiles the kernels or
interprets them on a CPU is decided outside, by TRITON_INTERPRET in the environment of whoever
imports them first.
"""
