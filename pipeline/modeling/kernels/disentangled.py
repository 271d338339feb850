"""Fused disentangled attention as a pair of torch operators, `deberta::disentangled_attention`.

To torch.compile and to meta tensors they are two opaque calls with known shapes, so that a layer
compiles in one piece; inside, `disentangled_host` launches the kernels. Kept for the backward pass
are the inputs, the context and one number a row; probabilities and dropout bits are computed again.

Letters: H heads, T tokens of all sequences, L longest sequence, d head size, R rows of the relative
table, E = 2 L distances.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from pipeline.counter_rng import DropoutSite
from pipeline.modeling.kernels.serving import host

Columns = Literal["rows", "distances"]
"""Columns of the products of queries and keys with the relative table, see `score_tiles`."""


def fewest_columns(table_rows: int, max_length: int) -> Columns:
    """Choose the columns that move the fewer bytes.

    A product with the table is written once and read once a pass, C columns of it for each token
    and head: R in one form, 2 L in the other. Where they are equal an address needs no look-up.

    Args:
        table_rows: R.
        max_length: L.

    Returns:
        The smaller form; a choice by bytes until a GPU has measured both.
    """
    return "rows" if table_rows < 2 * max_length else "distances"


def fused_attention(
    query_HTd: torch.Tensor,
    key_HTd: torch.Tensor,
    value_HTd: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    key_mask_T: torch.Tensor | None,
    starts: torch.Tensor | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    site: DropoutSite | None,
    columns: Columns | None = None,
) -> torch.Tensor:
    """Attend by the kernels; `serving.refusal` says where they cannot.

    Args:
        query_HTd: Queries, all sequences end to end.
        key_HTd: Keys.
        value_HTd: Values.
        tables: Key projection [H, R, d] and query projection [H, R, d] of the relative table, both
            times `scale`, and int [2, 2 L], the rows where key - query, and query - key, is
            e - (L - 1); None without one.
        key_mask_T: bool, False at padding keys; None where every token counts.
        starts: int32 [sequences + 1], first tokens of packed sequences and the end; None where
            every sequence has L tokens.
        max_length: L, tokens of the longest sequence.
        scale: Factor of the products of queries and keys.
        dropout_p: Probability of dropping an attention probability.
        site: Dropout site, for a mask of shape [H, T, L]; None outside training.
        columns: Form of the products with the table; the one with the fewer bytes where not given.

    Returns:
        Context [H, T, d], zero in rows without a key; a token's heads lie side by side in memory.
    """
    rel_key_HRd = rel_query_HRd = table_rows_2E = None
    by_row = False
    if tables is not None:
        rel_key_HRd, rel_query_HRd, table_rows_2E = tables
        table_rows_2E = table_rows_2E.to(torch.int16)
        columns = columns or fewest_columns(rel_key_HRd.shape[1], max_length)
        by_row = columns == "rows"
    drops = site is not None and dropout_p > 0.0
    context_HTd, _ = _attention(
        query_HTd,
        key_HTd,
        value_HTd,
        rel_key_HRd,
        rel_query_HRd,
        table_rows_2E,
        None if key_mask_T is None else key_mask_T.view(torch.uint8),
        starts,
        site.words_2 if site is not None and drops else None,
        max_length,
        by_row,
        scale,
        dropout_p if drops else 0.0,
        site.layer if site is not None else 0,
        site.where if site is not None else 0,
    )
    return context_HTd


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Make the last dimension contiguous, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _problem(*arguments: Any) -> Any:
    """Take an operator's arguments, the order of `_ARGUMENTS`, as the kernels read them."""
    *tensors, table_rows, key_mask, starts, words = arguments[:9]
    rows = (None if each is None else _rows(each) for each in tensors)
    return host().Problem(*rows, table_rows, key_mask, starts, words, *arguments[9:])


@contextlib.contextmanager
def _alone(query: torch.Tensor) -> Iterator[None]:
    """Make what surrounds a call irrelevant: autocast, and another current device."""
    # Products inside must have the dtype of the inputs, and Triton launches on the current device.
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        yield


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rel_key, Tensor? rel_query, "
    "Tensor? table_rows, Tensor? key_mask, Tensor? starts, Tensor? words, SymInt max_length, "
    "bool by_row, float scale, float dropout_p, SymInt layer, SymInt where"
)
"""Of both operators, named as the fields of `disentangled_host.Problem`."""


@torch.library.custom_op(
    "deberta::disentangled_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with _alone(arguments[0]):
        return host().forward(_problem(*arguments))


@torch.library.custom_op(
    "deberta::disentangled_attention_backward",
    mutates_args=(),
    schema="(Tensor d_context, Tensor context, Tensor log_sum_exp, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    d_context: torch.Tensor, context: torch.Tensor, log_sum_exp: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    with _alone(d_context):
        return host().backward(_problem(*arguments), _rows(d_context), context, log_sum_exp)


def _rows_like(like_HTd: torch.Tensor) -> torch.Tensor:
    """Describe what `disentangled_host` makes for [H, T, d]: a token's heads side by side."""
    num_heads, num_tokens, head_size = like_HTd.shape
    return like_HTd.new_empty(num_tokens, num_heads, head_size).transpose(0, 1)


@_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return _rows_like(query), query.new_empty(query.shape[:2], dtype=wide)


@_attention_backward.register_fake
def _(
    d_context: torch.Tensor,
    context: torch.Tensor,
    log_sum_exp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rel_key: torch.Tensor | None,
    rel_query: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    tables = [
        query.new_empty(0) if table is None else table.new_empty(table.shape)
        for table in (rel_key, rel_query)
    ]
    return (*(_rows_like(query) for _ in range(3)), *tables)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.numbers = inputs[9:]


def _differentiate(ctx: Any, d_context: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing hands each out a single time
    gradients = _attention_backward(d_context, *saved, *ctx.numbers)
    rel_key = saved[5]
    tables = (None, None) if rel_key is None else gradients[3:]
    return (*gradients[:3], *tables, *(None for _ in range(10)))


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)
