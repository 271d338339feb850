"""One chunk of the vocabulary as pure functions that torch.compile makes single passes of.

`vocabulary_head` computes the same with torch's operations. Counted for 1,232 slots, these move the
size of a chunk's logits eight times forward, eight times backward, and 54 times for the noise of
the draw. Inductor's count of these functions is once, three and a half times, and ten times.

    chunk_sums       running maximum and sum of exponentials, the target's logit, the argmax
    chunk_draw       the best Gumbel score among the allowed ids
    chunk_gradient   gradient of the logits and of the bias

Letters: N masked slots, C ids of a chunk, Q = C / 4 Philox counters of a row.
"""

import torch

from pipeline.counter_rng import philox4x32

Best = tuple[torch.Tensor, torch.Tensor]
"""Value [N] and offset in the chunk, int64 [N]; the lowest offset at a tie."""


def chunk_sums(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    offset_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Best]:
    """Take a chunk's logits into the running sums.

    Args:
        product_NC: Products of hidden states and rows of the table, fp32 or fp64.
        bias_C: Their bias.
        max_N: Maximum of the chunks before; -inf at first.
        sum_N: Sum of exponentials relative to that maximum.
        offset_N: int64, the target's place in this chunk, which may lie outside.

    Returns:
        Maximum and sum with this chunk; the logit at the target's place, or at the nearest one;
        the chunk's best.
    """
    return logit_sums(product_NC + bias_C, max_N, sum_N, offset_N)


def logit_sums(
    logits_NC: torch.Tensor, max_N: torch.Tensor, sum_N: torch.Tensor, offset_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Best]:
    """Compute `chunk_sums` of logits.

    Args:
        logits_NC: fp32 or fp64.
        max_N: As in `chunk_sums`.
        sum_N: As there.
        offset_N: As there.

    Returns:
        As there.
    """
    value_N, place_N = logits_NC.max(dim=1)
    new_max_N = torch.maximum(max_N, value_N)
    sum_here_N = (logits_NC - new_max_N[:, None]).exp_().sum(dim=1)
    sum_N = sum_N * (max_N - new_max_N).exp() + sum_here_N
    column_N = offset_N.clamp(0, logits_NC.shape[1] - 1)
    here_N = logits_NC.gather(1, column_N[:, None])[:, 0]
    return new_max_N, sum_N, here_N, (value_N, place_N)


def chunk_draw(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    quads_Q: torch.Tensor,
    positions_N: torch.Tensor,
    sample_words_N2: torch.Tensor,
    key_2: torch.Tensor,
    factor: float,
    start: int,
    stop: int,
) -> Best:
    """Find the highest of logit / temperature + Gumbel noise (`rtd.gumbel_noise`).

    A Philox counter gives noise for four ids in a row. Each of its four words has a reduction of
    its own, so that no word is moved to where its neighbours are.

    Args:
        product_NC: Products of hidden states and rows of the table, fp32 or fp64.
        bias_C: Their bias.
        quads_Q: int64, counters: ids of the chunk divided by four.
        positions_N: int64, positions of the slots in their sequences.
        sample_words_N2: int64, identities of their samples.
        key_2: int64, the stream.
        factor: 1 / temperature.
        start: First place in the chunk that may be drawn.
        stop: Place before which the allowed ones end.

    Returns:
        The best; value -inf where there is none, as in a row of NaN.
    """
    words = philox4x32(
        (quads_Q[None], positions_N[:, None], sample_words_N2[:, :1], sample_words_N2[:, 1:]),
        (key_2[0], key_2[1]),
    )
    size = product_NC.shape[1]
    value_N = torch.full_like(product_NC[:, 0], -torch.inf)
    place_N = torch.zeros_like(positions_N)
    for lane in range(min(4, size)):
        scores_NQ = (product_NC[:, lane::4] + bias_C[lane::4]) * factor
        u = (words[lane][:, : scores_NQ.shape[1]].float() + 0.5) * 2.0**-32
        scores_NQ = scores_NQ - torch.log(-torch.log1p(-u))
        place_Q = torch.arange(lane, size, 4, device=product_NC.device)
        allowed_Q = (place_Q >= start) & (place_Q < stop)
        best_N, quad_N = torch.where(allowed_Q, scores_NQ, -torch.inf).max(dim=1)
        at_N = 4 * quad_N + lane
        wins_N = (best_N > value_N) | ((best_N == value_N) & (at_N < place_N))
        value_N = torch.where(wins_N, best_N, value_N)
        place_N = torch.where(wins_N, at_N, place_N)
    return value_N, place_N


def chunk_gradient(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    weight_N: torch.Tensor,
    offset_N: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate the weighted cross entropies.

    Args:
        product_NC: Products of hidden states and rows of the table, fp32 or fp64.
        bias_C: Their bias.
        max_N: Maximum over all chunks.
        sum_N: Sum of exponentials relative to it.
        weight_N: Of each slot's loss; 0 where it does not count.
        offset_N: int64, the target's place in this chunk, which may lie outside.
        dtype: Of the products that follow.

    Returns:
        Gradient of the logits [N, C] in `dtype`, and of the bias [C].
    """
    place_C = torch.arange(product_NC.shape[1], device=product_NC.device)
    share_NC = (product_NC + bias_C - max_N[:, None]).exp() * (weight_N / sum_N)[:, None]
    is_target_NC = place_C == offset_N[:, None]
    d_logits_NC = share_NC - torch.where(is_target_NC, weight_N[:, None], 0.0)
    return d_logits_NC.to(dtype), d_logits_NC.sum(0)
