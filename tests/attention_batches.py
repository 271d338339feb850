"""Inputs of the attention in every layout, and what the backends make of them.

Letters: B sequences, L sequence length, H heads, d head size, R relative rows.
"""

import torch

from pipeline.counter_rng import DropoutKey
from pipeline.modeling.attention import (
    KeySide,
    disentangled_attention,
    packed_disentangled_attention,
)
from pipeline.modeling.relative_positions import relative_positions

CPU = torch.device("cpu")
HEAD_SIZES = (32, 64, 128)
LAYOUTS = ("full", "padded", "packed")
BUCKETS, MAX_POSITION = 32, 512


class AttentionBatch:
    """Queries, keys, values and both projections of the table, and how they are laid out."""

    def __init__(self, layout, length, head_size, dtype=torch.float32, heads=1, seed=0):
        self.starts = self.mask = None
        sequences, tokens = 1, length
        if layout == "packed":
            self.starts = torch.tensor([0, 3, 3 + length], dtype=torch.int32)
            tokens = 3 + length
        if layout == "padded":
            sequences = 1 if length > 500 else 2
            lengths = torch.tensor([length - length // 3, length // 2 + 1])[:sequences]
            self.mask = torch.arange(length) < lengths[:, None]
        generator = torch.Generator().manual_seed(seed)
        # As projections leave them: a token's heads side by side.
        rows, table = (sequences, tokens, heads, head_size), (2 * BUCKETS, heads, head_size)
        drawn = [
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in (rows, rows, rows, table, table, rows)
        ]
        # The biases of the query, the key and the value projection; the table goes through two.
        biases = torch.randn(3, heads, head_size, generator=generator, dtype=torch.float64) / 2
        for tensor, bias_Hd in zip(drawn, biases[[0, 1, 2, 1, 0]], strict=False):
            tensor += bias_Hd
        self.tensors = [each.to(dtype).requires_grad_() for each in drawn[:5]]
        self.weights = drawn[5].to(dtype).permute(2, 0, 1, 3)
        self.longest = max(3, length) if layout == "packed" else length
        self.relative = relative_positions(self.longest, BUCKETS, MAX_POSITION, CPU)
        self.site = DropoutKey.derive(0, "generator", 1, 2, 3, CPU).site(4, 1)

    def attend(self, backend, dropout_p, *tensors):
        """Context [H, B, L, d] of five tensors, or of three without a table."""
        query, key, value = (t.permute(2, 0, 1, 3) for t in tensors[:3])
        keys = KeySide(key, value, *(t.transpose(0, 1) for t in tensors[3:]))
        relative = self.relative if len(tensors) > 3 else None
        if self.starts is not None:
            return packed_disentangled_attention(
                backend, query, keys, relative, self.starts, dropout_p, self.site, self.longest
            )
        return disentangled_attention(
            backend, query, keys, relative, self.mask, dropout_p, self.site
        )

    def value_and_gradients(self, backend, dropout_p, num_tensors=5):
        """Context, and the gradient of each tensor."""
        tensors = self.tensors[:num_tensors]
        context = self.attend(backend, dropout_p, *tensors)
        return [context, *torch.autograd.grad((context * self.weights).sum(), tensors)]


def errors(ours, theirs):
    """Largest error of each tensor, relative to its largest element, or 0.5: one key has 0."""
    return [
        ((left - right).abs().max() / right.abs().max().clamp(min=0.5)).item()
        for left, right in zip(ours, theirs, strict=True)
    ]


def assert_no_fallback(caplog):
    """Nothing was left to the `torch` backend."""
    assert "replaced by torch" not in caplog.text
