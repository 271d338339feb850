"""Cross entropy, draw and accuracy over the whole vocabulary, a chunk of ids at a time.

With 128,100 ids the logits of a micro batch would be its largest tensor. Here they exist for
`CHUNK_IDS` ids at once: the forward pass keeps running maxima and a running log-sum-exp, and the
backward pass computes each chunk's logits again (`chunk_functions`: the same as compiled graphs).
Products of half precision inputs are accumulated and kept in fp32: rounding a logit to bf16 would
move a loss of 10 by up to 0.03.

Letters: B sequences, K masked slots per sequence, N = B K slots, C ids of a chunk, D hidden size,
V vocabulary.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.profiler import record_function

from pipeline.modeling.chunk_functions import Best, chunk_draw, chunk_gradient, chunk_sums
from pipeline.modeling.compiled import compiled
from pipeline.rtd import DrawKey, gumbel_noise

CHUNK_IDS = 16_384
"""Ids of one chunk, a multiple of 4: 80 MB of fp32 logits for 16 sequences of 512 tokens."""
HEAD_RANGE, DRAW_RANGE = "vocabulary head", "draw"
"""Their names in a profile."""


class MlmOutput(NamedTuple):
    """What the generator's head reports of a micro batch."""

    loss_sum: torch.Tensor
    """Scalar, fp32 (fp64 in an fp64 model): sum of cross entropies over valid slots, in nats."""
    drawn_BK: torch.Tensor | None
    """int64 [B, K]: one draw from softmax(logits / temperature) for each slot; None without any."""
    correct_sum: torch.Tensor
    """Scalar, fp32: valid slots whose most probable id is the target."""


def _named(name: str) -> contextlib.AbstractContextManager[object]:
    """Open a range of a profile, where there is a profiler."""
    is_profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return record_function(name) if is_profiled else contextlib.nullcontext()


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep autocast away: it would round the logits of the forward pass, and of that alone."""
    if device.type == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and losses: fp32, or fp64 in an fp64 model."""
    return torch.promote_types(dtype, torch.float32)


@functools.lru_cache(maxsize=64)
def _key_words(first: int, second: int, device: torch.device) -> torch.Tensor:
    """A stream's key on the device: as numbers, each stream would have a graph of its own."""
    with torch.inference_mode(False):
        return torch.tensor([first, second]).to(device)


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


class _Best:
    """Running argmax over chunks; ties go to the lowest id."""

    def __init__(self, like_N: torch.Tensor, first_id: int = 0) -> None:
        self.value_N = torch.full_like(like_N, -torch.inf)
        # A row of NaN never wins; it keeps an id that is safe to look up.
        self.id_N = torch.full_like(like_N, first_id, dtype=torch.int64)

    def update(self, first: int, value_N: torch.Tensor, offset_N: torch.Tensor) -> None:
        wins_N = value_N > self.value_N
        self.value_N = torch.where(wins_N, value_N, self.value_N)
        self.id_N = torch.where(wins_N, offset_N + first, self.id_N)


class _Draws:
    """Running Gumbel-argmax over chunks, among the allowed ids."""

    def __init__(
        self, like_N: torch.Tensor, draw: DrawKey, positions_BK: torch.Tensor, num_ids: int
    ) -> None:
        self._draw, self._positions_BK = draw, positions_BK
        self._allowed = range(num_ids) if draw.allowed_ids is None else draw.allowed_ids
        self._best = _Best(like_N, self._allowed.start)

    def _here(self, first: int, size: int) -> slice:
        """Places of a chunk that may be drawn."""
        return slice(max(self._allowed.start - first, 0), min(self._allowed.stop - first, size))

    def update(self, first: int, logits_NC: torch.Tensor) -> None:
        """Take a chunk into account; its logits are overwritten."""
        draw, size = self._draw, logits_NC.shape[1]
        here = self._here(first, size)
        if here.start >= here.stop:
            return
        noise_BKC = gumbel_noise(draw.sample_words_B2, self._positions_BK, first, size, draw.key)
        scores_NC = logits_NC.div_(draw.temperature).add_(noise_BKC.flatten(0, 1))
        self._best.update(first + here.start, *scores_NC[:, here].max(dim=1))

    def update_compiled(self, first: int, product_NC: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Take a chunk into account in one graph."""
        draw, size = self._draw, product_NC.shape[1]
        here = self._here(first, size)
        if here.start >= here.stop:
            return
        num_slots = self._positions_BK.shape[1]
        best = compiled(chunk_draw)(
            product_NC,
            bias_C,
            torch.arange(first // 4, (first + size + 3) // 4, device=product_NC.device),
            self._positions_BK.flatten(),
            draw.sample_words_B2.repeat_interleave(num_slots, 0, output_size=len(product_NC)),
            _key_words(*draw.key, product_NC.device),
            draw.temperature,
            here.start,
            here.stop,
        )
        self._best.update(first, *best)

    def ids_BK(self) -> torch.Tensor:
        """Return the draws, int64 [B, K]."""
        return self._best.id_N.view(self._positions_BK.shape)


def _sums(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    offset_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Best]:
    """Compute `chunk_sums` in little memory; the products become logits."""
    logits_NC = product_NC.add_(bias_C)
    new_max_N = torch.maximum(max_N, logits_NC.amax(dim=1))
    sum_here_N = (logits_NC - new_max_N[:, None]).exp_().sum(dim=1)
    sum_N = sum_N * (max_N - new_max_N).exp() + sum_here_N
    column_N = offset_N.clamp(0, logits_NC.shape[1] - 1)
    here_N = logits_NC.gather(1, column_N[:, None])[:, 0]
    value_N, place_N = logits_NC.max(dim=1)
    return new_max_N, sum_N, here_N, (value_N, place_N)


def _gradient(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    weight_N: torch.Tensor,
    offset_N: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `chunk_gradient` in little memory, in place of the products."""
    logits_NC = product_NC.add_(bias_C)
    d_logits_NC = logits_NC.sub_(max_N[:, None]).exp_().mul_((weight_N / sum_N)[:, None])
    is_here_N = (offset_N >= 0) & (offset_N < logits_NC.shape[1])
    # One column a row: the subtraction of the one-hot target needs no accumulation.
    row_N = torch.arange(offset_N.shape[0], device=offset_N.device)
    column_N = offset_N.clamp(0, logits_NC.shape[1] - 1)
    d_logits_NC[row_N, column_N] -= torch.where(is_here_N, weight_N, 0.0)
    return d_logits_NC.to(dtype), d_logits_NC.sum(0)


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
        compiles: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        valid_N, targets_N = valid_BK.flatten(), targets_BK.flatten()
        zero_N = hidden_ND.new_zeros(hidden_ND.shape[0], dtype=_wide(hidden_ND.dtype))
        # The sum of exponentials is kept relative to the running maximum, not as its logarithm:
        # a logarithm of 10 would carry a rounding of 1e-6 into every gradient.
        max_N, sum_N, target_logit_N = torch.full_like(zero_N, -torch.inf), zero_N, zero_N
        best = _Best(zero_N)
        draws = None if draw is None else _Draws(zero_N, draw, positions_BK, len(table_VD))
        for first, product_NC, bias_C in _products(hidden_ND, table_VD, bias_V, chunk_ids):
            offset_N, size = targets_N - first, product_NC.shape[1]
            sums = _sums
            if compiles:
                sums = compiled(chunk_sums)
                if draws is not None:
                    with _named(DRAW_RANGE):
                        draws.update_compiled(first, product_NC, bias_C)
            max_N, sum_N, here_N, top = sums(product_NC, bias_C, max_N, sum_N, offset_N)
            is_here_N = (offset_N >= 0) & (offset_N < size)
            target_logit_N = torch.where(is_here_N, here_N, target_logit_N)
            best.update(first, *top)
            if draws is not None and not compiles:
                with _named(DRAW_RANGE):
                    draws.update(first, product_NC)
        ctx.chunk_ids, ctx.compiles = chunk_ids, compiles
        ctx.save_for_backward(hidden_ND, table_VD, bias_V, valid_N, targets_N, max_N, sum_N)
        loss_sum = torch.where(valid_N, sum_N.log() + (max_N - target_logit_N), 0.0).sum()
        correct_sum = (valid_N & (best.id_N == targets_N)).sum().float()
        drawn_BK = None if draws is None else draws.ids_BK()
        ctx.mark_non_differentiable(*(each for each in (drawn_BK, correct_sum) if each is not None))
        return loss_sum, drawn_BK, correct_sum

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        hidden_ND, table_VD, bias_V, valid_N, targets_N, max_N, sum_N = ctx.saved_tensors
        weight_N = torch.where(valid_N, grads[0], 0.0)
        d_hidden_ND = hidden_ND.new_zeros(hidden_ND.shape, dtype=_wide(hidden_ND.dtype))
        d_table_VD, d_bias_V = torch.empty_like(table_VD), torch.empty_like(bias_V)
        differentiate = compiled(chunk_gradient) if ctx.compiles else _gradient
        for first, product_NC, bias_C in _products(hidden_ND, table_VD, bias_V, ctx.chunk_ids):
            ids = slice(first, first + product_NC.shape[1])
            d_logits_NC, d_bias_V[ids] = differentiate(
                product_NC, bias_C, max_N, sum_N, weight_N, targets_N - first, table_VD.dtype
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
    compiles: bool = False,
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
        compiles: Whether a chunk's functions are compiled graphs; likewise.

    Returns:
        Loss sum, draws and correct predictions; only the loss has a gradient.
    """
    with _without_autocast(hidden_BKD.device), _named(HEAD_RANGE):
        loss_sum, drawn_BK, correct_sum = _ChunkedCrossEntropy.apply(
            hidden_BKD.flatten(0, 1),
            table_VD,
            bias_V,
            valid_BK,
            targets_BK,
            positions_BK,
            draw,
            chunk_ids,
            compiles,
        )
    return MlmOutput(loss_sum, drawn_BK, correct_sum)
