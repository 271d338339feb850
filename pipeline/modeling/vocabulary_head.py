"""Cross entropy, draw and accuracy over the whole vocabulary, a chunk of ids at a time.

With 128,100 ids the logits of a micro batch would be its largest tensor. Here they exist for
`CHUNK_IDS` ids at once: the forward pass keeps running maxima and a running log-sum-exp, and the
backward pass computes each chunk's logits again. `vocabulary_sums` has what lies between the matrix
products, in three forms: torch's operations, compiled graphs, fused kernels.
Products of half precision inputs are accumulated and kept in fp32: rounding a logit to bf16 would
move a loss of 10 by up to 0.03.

Letters: B sequences, K masked slots per sequence, N = B K slots, C ids of a chunk, D hidden size,
V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pipeline.modeling.vocabulary_sums import (
    DRAW_RANGE,
    HeadForm,
    chunk_gradient,
    chunk_sums,
    named_range,
    serving_form,
)
from pipeline.rtd import DrawKey

__all__ = ["CHUNK_IDS", "DRAW_RANGE", "HEAD_RANGE", "MlmOutput", "vocabulary_head"]

CHUNK_IDS = 16_384
"""Ids of one chunk, a multiple of 4: 80 MB of fp32 logits for 16 sequences of 512 tokens."""
HEAD_RANGE = "vocabulary head"
"""Its name in a profile."""


class MlmOutput(NamedTuple):
    """What the generator's head reports of a micro batch."""

    loss_sum: torch.Tensor
    """Scalar, fp32 (fp64 in an fp64 model): sum of cross entropies over valid slots, in nats."""
    drawn_BK: torch.Tensor | None
    """int64 [B, K]: one draw from softmax(logits / temperature) for each slot; None without any."""
    correct_sum: torch.Tensor
    """Scalar, fp32: valid slots whose most probable id is the target."""


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep autocast away: it would round the logits of the forward pass, and of that alone."""
    if device.type == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and losses: fp32, or fp64 in an fp64 model."""
    return torch.promote_types(dtype, torch.float32)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply matrices into fp32 at least, on matrix units where the device has them."""
    wide = _wide(left.dtype)
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _products(
    hidden_ND: torch.Tensor, table_VD: torch.Tensor, bias_V: torch.Tensor, chunk_ids: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the first id of each chunk, its logits [N, C] without the bias, and the bias [C]."""
    for first in range(0, table_VD.shape[0], chunk_ids):
        rows_CD = table_VD[first : first + chunk_ids]
        yield first, _product(hidden_ND, rows_CD.mT), bias_V[first : first + chunk_ids]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy, with the draws and the argmax as by-products."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: torch.Tensor,
        table_VD: torch.Tensor,
        bias_V: torch.Tensor,
        valid_BK: torch.Tensor,
        targets_BK: torch.Tensor,
        positions_BK: torch.Tensor,
        draw: DrawKey | None,
        chunk_ids: int,
        form: HeadForm,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        valid_N, targets_N = valid_BK.flatten(), targets_BK.flatten()
        zero_N = hidden_ND.new_zeros(hidden_ND.shape[0], dtype=_wide(hidden_ND.dtype))
        sums = chunk_sums(form, zero_N, targets_N, draw, positions_BK, len(table_VD))
        for first, product_NC, bias_C in _products(hidden_ND, table_VD, bias_V, chunk_ids):
            sums.add(first, product_NC, bias_C)
        max_N, sum_N = sums.max_N, sums.sum_N
        ctx.chunk_ids, ctx.form = chunk_ids, form
        ctx.save_for_backward(hidden_ND, table_VD, bias_V, valid_N, targets_N, max_N, sum_N)
        losses_N = sum_N.log() + (max_N - sums.target_logit_N)
        loss_sum = torch.where(valid_N, losses_N, 0.0).sum()
        correct_sum = (valid_N & (sums.best_id_N == targets_N)).sum().float()
        drawn_BK = None if draw is None else sums.drawn_id_N.view(positions_BK.shape)
        ctx.mark_non_differentiable(*(each for each in (drawn_BK, correct_sum) if each is not None))
        return loss_sum, drawn_BK, correct_sum

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        hidden_ND, table_VD, bias_V, valid_N, targets_N, *sums_2 = ctx.saved_tensors
        weight_N = torch.where(valid_N, grads[0], 0.0)
        d_hidden_ND = hidden_ND.new_zeros(hidden_ND.shape, dtype=_wide(hidden_ND.dtype))
        d_table_VD, d_bias_V = torch.empty_like(table_VD), torch.empty_like(bias_V)
        for first, product_NC, bias_C in _products(hidden_ND, table_VD, bias_V, ctx.chunk_ids):
            ids = slice(first, first + product_NC.shape[1])
            d_logits_NC, d_bias_V[ids] = chunk_gradient(
                ctx.form, product_NC, bias_C, sums_2, weight_N, targets_N, first, table_VD.dtype
            )
            d_hidden_ND += _product(d_logits_NC, table_VD[ids])
            d_table_VD[ids] = _product(d_logits_NC.mT, hidden_ND)
        d_hidden_ND = d_hidden_ND.to(hidden_ND.dtype)
        return d_hidden_ND, d_table_VD, d_bias_V, None, None, None, None, None, None


def vocabulary_head(
    hidden_BKD: torch.Tensor,
    table_VD: torch.Tensor,
    bias_V: torch.Tensor,
    valid_BK: torch.Tensor,
    targets_BK: torch.Tensor,
    positions_BK: torch.Tensor,
    draw: DrawKey | None,
    chunk_ids: int = CHUNK_IDS,
    form: HeadForm = "torch",
    otherwise: HeadForm = "torch",
) -> MlmOutput:
    """Score hidden states against the word table: loss, draw and accuracy in one sweep.

    Draws are Gumbel-argmax, the lowest id at a tie, with `rtd.gumbel_noise`; they use the logits
    of the loss, which is the order of the released code (`rtd_task.py`, make_electra_data). Ids
    that may not be drawn stay in the loss.

    Args:
        hidden_BKD: [B, K, D], after the head's transformation.
        table_VD: [V, D], the tied word embeddings.
        bias_V: [V].
        valid_BK: bool [B, K]; False slots count nothing and get no gradient.
        targets_BK: int64 [B, K].
        positions_BK: int64 [B, K], which key the noise.
        draw: Stream, samples, temperature and ids of the draws; None draws nothing.
        chunk_ids: Ids of one chunk, a multiple of 4; results differ in rounding only.
        form: What computes a chunk, see `vocabulary_sums`; likewise.
        otherwise: What takes the place of `fused` where the kernels do not serve.

    Returns:
        Loss sum, draws and correct predictions; only the loss has a gradient.
    """
    with (
        _without_autocast(hidden_BKD.device),
        torch.cuda.device_of(hidden_BKD),  # Triton launches on the current device
        named_range(HEAD_RANGE),
    ):
        loss_sum, drawn_BK, correct_sum = _ChunkedCrossEntropy.apply(
            hidden_BKD.flatten(0, 1),
            table_VD,
            bias_V,
            valid_BK,
            targets_BK,
            positions_BK,
            draw,
            chunk_ids,
            serving_form(form, otherwise, hidden_BKD),
        )
    return MlmOutput(loss_sum, drawn_BK, correct_sum)
