"""What the vocabulary head carries from chunk to chunk of its ids, in each of its forms.

    torch      torch's operations, in place where they can be
    compiled   a graph a chunk (`chunk_functions`)
    fused      a kernel a chunk (`kernels.vocabulary_host`)

All forms have the same interface: sums take products of hidden states and rows of the table, and
`gradient` turns such products into the gradient of the logits. Draws are the same in each, but for
candidates that tie to a rounding of their scores.

Letters: B sequences, K masked slots per sequence, N = B K slots, C ids of a chunk.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.autograd.profiler import record_function

from pipeline.modeling import chunk_functions
from pipeline.modeling.compiled import compiled
from pipeline.modeling.kernels import serving
from pipeline.modeling.kernels.arguments import Noise
from pipeline.rtd import DrawKey, gumbel_noise

HeadForm = Literal["torch", "compiled", "fused"]
DRAW_RANGE = "draw"
"""Name of draws in a profile; `fused` draws in the pass of the sums."""


def named_range(name: str) -> contextlib.AbstractContextManager[object]:
    """Open a range of a profile, where there is a profiler.

    Args:
        name: Of the range.

    Returns:
        A context.
    """
    is_profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return record_function(name) if is_profiled else contextlib.nullcontext()


@functools.lru_cache(maxsize=64)
def _key_words(first: int, second: int, device: torch.device) -> torch.Tensor:
    """A stream's key on the device: as numbers, each stream would have a graph of its own."""
    with torch.inference_mode(False):
        return torch.tensor([first, second]).to(device)


def serving_form(form: HeadForm, otherwise: HeadForm, hidden: torch.Tensor) -> HeadForm:
    """Return the form itself, or another one where the kernels do not serve.

    Args:
        form: What is asked for.
        otherwise: What takes the place of `fused`.
        hidden: Hidden states, for their device and dtype.

    Returns:
        The form; the log says once why it is not the one that was asked for.
    """
    if form != "fused":
        return form
    if hidden.device.type == "meta":  # where only shapes are looked at
        return otherwise
    reason = serving.head_refusal(hidden.device, hidden.dtype)
    if reason is None:
        return form
    serving.say_once(
        logging.WARNING, f"the fused vocabulary head is replaced by {otherwise}: {reason}"
    )
    return otherwise


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
        self._allowed = _allowed_ids(draw, num_ids)
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
        scores_NC = logits_NC.mul_(1.0 / draw.temperature).add_(noise_BKC.flatten(0, 1))
        self._best.update(first + here.start, *scores_NC[:, here].max(dim=1))

    def update_compiled(self, first: int, product_NC: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Take a chunk into account in one graph."""
        draw, size = self._draw, product_NC.shape[1]
        here = self._here(first, size)
        if here.start >= here.stop:
            return
        num_slots = self._positions_BK.shape[1]
        best = compiled(chunk_functions.chunk_draw)(
            product_NC,
            bias_C,
            torch.arange(first // 4, (first + size + 3) // 4, device=product_NC.device),
            self._positions_BK.flatten(),
            draw.sample_words_B2.repeat_interleave(num_slots, 0, output_size=len(product_NC)),
            _key_words(*draw.key, product_NC.device),
            1.0 / draw.temperature,
            here.start,
            here.stop,
        )
        self._best.update(first, *best)

    @property
    def id_N(self) -> torch.Tensor:
        """The draws, int64."""
        return self._best.id_N


def _allowed_ids(draw: DrawKey, num_ids: int) -> range:
    return range(num_ids) if draw.allowed_ids is None else draw.allowed_ids


def _sums(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    offset_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, chunk_functions.Best]:
    """Compute `chunk_sums` in little memory; the products become logits."""
    return chunk_functions.logit_sums(product_NC.add_(bias_C), max_N, sum_N, offset_N)


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


class ChunkSums:
    """What the chunks so far have left, by torch's operations or by graphs of them.

    Args:
        like_N: Zeros, in the dtype of the logits.
        targets_N: int64, the slots' targets.
        draw: What the draws depend on; None draws nothing.
        positions_BK: int64, which key the noise.
        num_ids: V.
        compiles: Whether a chunk's functions are compiled graphs.
    """

    def __init__(
        self,
        like_N: torch.Tensor,
        targets_N: torch.Tensor,
        draw: DrawKey | None,
        positions_BK: torch.Tensor,
        num_ids: int,
        compiles: bool,
    ) -> None:
        # The sum of exponentials is kept relative to the running maximum, not as its logarithm:
        # a logarithm of 10 would carry a rounding of 1e-6 into every gradient.
        self.max_N = torch.full_like(like_N, -torch.inf)
        self.sum_N = self.target_logit_N = like_N
        self._targets_N, self._compiles = targets_N, compiles
        self._best = _Best(like_N)
        self._draws = None if draw is None else _Draws(like_N, draw, positions_BK, num_ids)

    def add(self, first: int, product_NC: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Take a chunk into account.

        Args:
            first: Its first id, a multiple of 4.
            product_NC: Products of hidden states and rows of the table; they may be overwritten.
            bias_C: Their bias.
        """
        offset_N, size = self._targets_N - first, product_NC.shape[1]
        sums = _sums
        if self._compiles:
            sums = compiled(chunk_functions.chunk_sums)
            if self._draws is not None:
                with named_range(DRAW_RANGE):
                    self._draws.update_compiled(first, product_NC, bias_C)
        self.max_N, self.sum_N, here_N, top = sums(
            product_NC, bias_C, self.max_N, self.sum_N, offset_N
        )
        is_here_N = (offset_N >= 0) & (offset_N < size)
        self.target_logit_N = torch.where(is_here_N, here_N, self.target_logit_N)
        self._best.update(first, *top)
        if self._draws is not None and not self._compiles:
            with named_range(DRAW_RANGE):
                self._draws.update(first, product_NC)

    @property
    def best_id_N(self) -> torch.Tensor:
        """Ids of the maxima, int64, the lowest at a tie."""
        return self._best.id_N

    @property
    def drawn_id_N(self) -> torch.Tensor | None:
        """Draws, int64; None without any."""
        return None if self._draws is None else self._draws.id_N


def chunk_sums(
    form: HeadForm,
    like_N: torch.Tensor,
    targets_N: torch.Tensor,
    draw: DrawKey | None,
    positions_BK: torch.Tensor,
    num_ids: int,
) -> Any:
    """Begin a pass over the chunks.

    Args:
        form: Which implementation, see the module.
        like_N: Zeros, in the dtype of the logits.
        targets_N: int64, the slots' targets.
        draw: What the draws depend on; None draws nothing.
        positions_BK: int64, which key the noise.
        num_ids: V.

    Returns:
        A `ChunkSums`, or its like in `kernels.vocabulary_host`.
    """
    if form != "fused":
        compiles = form == "compiled"
        return ChunkSums(like_N, targets_N, draw, positions_BK, num_ids, compiles)
    noise = None
    if draw is not None:
        allowed = _allowed_ids(draw, num_ids)
        noise = Noise(
            _key_words(*draw.key, like_N.device),
            draw.sample_words_B2.contiguous(),
            positions_BK.flatten().contiguous(),
            positions_BK.shape[1],
            1.0 / draw.temperature,
            allowed.start,
            allowed.stop,
        )
    return serving.host("vocabulary").ChunkSums(targets_N, noise)


def chunk_gradient(
    form: HeadForm,
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    sums_2: Sequence[torch.Tensor],
    weight_N: torch.Tensor,
    targets_N: torch.Tensor,
    first: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate the weighted cross entropies of one chunk.

    Args:
        form: Which implementation, see the module.
        product_NC: Products of hidden states and rows of the table; they may be overwritten.
        bias_C: Their bias.
        sums_2: Maximum over all chunks [N], and sum of exponentials relative to it [N].
        weight_N: Of each slot's loss; 0 where it does not count.
        targets_N: int64, the slots' targets.
        first: The chunk's first id.
        dtype: Of the products that follow.

    Returns:
        Gradient of the logits [N, C] in `dtype`, and of the bias [C].
    """
    max_N, sum_N = sums_2
    arguments = (product_NC, bias_C, max_N, sum_N, weight_N)
    if form == "fused":
        host = serving.host("vocabulary")
        return host.chunk_gradient(*arguments, targets_N, first, dtype)
    differentiate = compiled(chunk_functions.chunk_gradient) if form == "compiled" else _gradient
    return differentiate(*arguments, targets_N - first, dtype)
