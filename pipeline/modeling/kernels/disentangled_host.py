"""What the attention operators do: products with the table, launches, and scratch memory.

    forward    C2P = Q Kr', P2C = K Qr' (cuBLAS), then one kernel        -> context, log-sum-exp
    backward   the products again, delta, dV and dS (two kernels), then dQ and dK (one kernel,
               twice) and dKr and dQr (one kernel by distance and one by row, twice)

Heads are processed in groups, so that scratch memory stays near `SCRATCH_BYTES` however long the
sequences are. Every output element has one writer and every sum one order: the same inputs give the
same bits.

Letters: H heads, T tokens of all sequences, L longest sequence, d head size, R rows of the relative
table, E = 2 L distances, C columns of the products (R or E).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from pipeline.modeling.kernels.arguments import Drop, Extent, Form, PositionTerms, Rows
from pipeline.modeling.kernels.forward_kernel import forward_kernel
from pipeline.modeling.kernels.gradient_kernels import row_kernel, side_kernel, table_kernel
from pipeline.modeling.kernels.launching import INTERPRETED, device_architecture, launch
from pipeline.modeling.kernels.score_kernel import delta_kernel, score_kernel
from pipeline.modeling.kernels.tile_table import (
    TABLE_PROGRAMS,
    KernelName,
    Tile,
    tile_for,
)

SCRATCH_BYTES = 256 * 2**20
"""Scratch memory of a group of heads; one head alone may need more."""

_WIDE = {torch.float64: tl.float64}


@dataclass(frozen=True)
class Problem:
    """One attention: the arguments of both operators."""

    query_HTd: torch.Tensor
    key_HTd: torch.Tensor
    value_HTd: torch.Tensor
    rel_key_HRd: torch.Tensor | None
    """Already scaled, like the next."""
    rel_query_HRd: torch.Tensor | None
    table_rows_2E: torch.Tensor | None
    """int16: rows of the table where key - query, and query - key, is e - (L - 1)."""
    key_mask_T: torch.Tensor | None
    """uint8, 0 at padding keys."""
    starts: torch.Tensor | None
    """int32 [sequences + 1]; None where every sequence has L tokens."""
    words_2: torch.Tensor | None
    """Key of the dropout site; None without dropout."""
    max_length: int
    by_row: bool
    scale: float
    dropout_p: float
    layer: int
    where: int

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch."""
        if self.starts is None:
            return self.query_HTd.shape[1] // self.max_length
        return self.starts.shape[0] - 1

    @property
    def num_columns(self) -> int:
        """Columns of each product with the table, 0 where there is none."""
        if self.rel_key_HRd is None:
            return 0
        return self.rel_key_HRd.shape[1] if self.by_row else 2 * self.max_length

    @property
    def wide(self) -> torch.dtype:
        """Dtype of sums."""
        return torch.promote_types(self.query_HTd.dtype, torch.float32)

    def form(self) -> Form:
        """Say which kernels serve it."""
        return Form(
            head_size=self.query_HTd.shape[2],
            max_length=self.max_length,
            num_columns=self.num_columns,
            by_row=self.by_row,
            has_mask=self.key_mask_T is not None,
            packed=self.starts is not None,
            drops=self.words_2 is not None,
            aligned=self.max_length % 8 == 0,
            wide=_WIDE.get(self.wide, tl.float32),
            # TF32 would round fp32 inputs to 10 bits.
            precision="ieee",
        )


class _Pass:
    """One pass over a problem: what its launches share."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.form = problem.form()
        query = problem.query_HTd
        self.num_heads, self.num_tokens, self.head_size = query.shape
        self.architecture = device_architecture(query.device)
        starts = query if problem.starts is None else problem.starts
        self.extent = Extent(starts, self.num_tokens)
        # A pointer that no kernel of this form reads.
        self.key_mask = query if problem.key_mask_T is None else problem.key_mask_T
        self.table_rows = query if problem.table_rows_2E is None else problem.table_rows_2E

    def tile(self, kernel: KernelName) -> Tile:
        element_bytes = self.problem.query_HTd.element_size()
        draws = kernel in ("forward", "scores") and self.form.drops
        return tile_for(
            self.architecture,
            kernel,
            self.head_size,
            element_bytes,
            octets=self.form.aligned or not draws,
        )

    def grid(self, rows: int, heads: slice) -> tuple[int, int, int]:
        """Blocks of `rows`, sequences, heads."""
        blocks = -(-self.problem.max_length // rows)
        return blocks, self.problem.num_sequences, heads.stop - heads.start

    def may_pass_the_end(self, tile: Tile) -> bool:
        """Say whether a tile can reach past the end of its sequence."""
        length = self.problem.max_length
        return self.form.packed or length % tile.rows > 0 or length % tile.columns > 0

    def groups(self, elements_a_token: int) -> Iterator[slice]:
        """Cut the heads so that their scratch memory stays in bounds."""
        element_bytes = self.problem.query_HTd.element_size()
        bytes_a_head = elements_a_token * self.num_tokens * element_bytes
        size = min(self.num_heads, max(1, SCRATCH_BYTES // max(1, bytes_a_head)))
        for first in range(0, self.num_heads, size):
            yield slice(first, min(first + size, self.num_heads))

    def terms(self, heads: slice) -> PositionTerms:
        """Multiply queries and keys by the table."""
        p = self.problem
        if p.rel_key_HRd is None or p.rel_query_HRd is None or p.table_rows_2E is None:
            return PositionTerms(p.query_HTd, p.query_HTd, self.table_rows)
        products = []
        for rows_HTd, table_HRd, rows_E in (
            (p.query_HTd, p.rel_key_HRd, p.table_rows_2E[0]),
            (p.key_HTd, p.rel_query_HRd, p.table_rows_2E[1]),
        ):
            table_HCd = table_HRd[heads]
            if not p.by_row:
                table_HCd = table_HCd.index_select(1, rows_E.to(torch.int32))
            products.append(rows_HTd[heads] @ table_HCd.mT)
        return PositionTerms(products[0], products[1], self.table_rows)

    def drop(self, heads: slice) -> Drop:
        """Describe the dropout site for a group of heads."""
        p = self.problem
        if p.words_2 is None:
            return Drop(p.query_HTd, 0, 0, 0, 0, 1.0)
        threshold = round(p.dropout_p * 65536)
        keep_scale = 1.0 / (1.0 - p.dropout_p)
        return Drop(p.words_2, p.layer, p.where, heads.start, threshold, keep_scale)

    def inputs(self, heads: slice) -> tuple[Any, ...]:
        """What makes the scores of some heads, in the order of the kernels that compute them."""
        p = self.problem
        rows = (Rows.of(each[heads]) for each in (p.query_HTd, p.key_HTd, p.value_HTd))
        return *rows, self.terms(heads), self.key_mask, self.extent, self.drop(heads)

    def table_gradient(
        self, side: int, side_HTd: torch.Tensor, d_scores: torch.Tensor, gradient_HRd: torch.Tensor
    ) -> None:
        """Sum dS over the rows of each distance, then over the distances of each table row."""
        p, tile = self.problem, self.tile("table")
        num_heads, num_distances = side_HTd.shape[0], 2 * p.max_length
        blocks = -(-num_distances // tile.columns)
        wanted = 1 if INTERPRETED else -(-TABLE_PROGRAMS // (blocks * num_heads))
        sequences_a_part = -(-p.num_sequences // min(p.num_sequences, wanted))
        parts = -(-p.num_sequences // sequences_a_part)
        by_distance = side_HTd.new_empty(
            num_heads * parts, num_distances, self.head_size, dtype=p.wide
        )
        launch(
            table_kernel,
            (blocks, parts, num_heads),
            tile,
            d_scores,
            Rows.of(side_HTd),
            self.extent,
            Rows.of(by_distance),
            p.num_sequences,
            sequences_a_part,
            FORM=self.form,
            BLOCK_R=tile.rows,
            BLOCK_C=tile.columns,
        )
        tile, num_rows = self.tile("rows"), gradient_HRd.shape[1]
        launch(
            row_kernel,
            (-(-num_rows // tile.rows), num_heads),
            tile,
            Rows.of(by_distance),
            self.table_rows[side],
            Rows.of(gradient_HRd),
            num_rows,
            parts,
            FORM=self.form,
            BLOCK_R=tile.rows,
            BLOCK_C=tile.columns,
        )


def _empty_rows(like_HTd: torch.Tensor) -> torch.Tensor:
    """Make room for [H, T, d] with a token's heads side by side, as projections write and read."""
    num_heads, num_tokens, head_size = like_HTd.shape
    return like_HTd.new_empty(num_tokens, num_heads, head_size).transpose(0, 1)


def forward(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend.

    Args:
        problem: The arguments.

    Returns:
        Context [H, T, d] and log-sum-exp [H, T] of each row's scores, fp32 (fp64 for fp64).
    """
    p, this = problem, _Pass(problem)
    context_HTd = _empty_rows(p.query_HTd)
    log_sum_exp_HT = p.query_HTd.new_empty(p.query_HTd.shape[:2], dtype=p.wide)
    tile = this.tile("forward")
    for heads in this.groups(2 * p.num_columns):
        launch(
            forward_kernel,
            this.grid(tile.rows, heads),
            tile,
            *this.inputs(heads),
            Rows.of(context_HTd[heads]),
            log_sum_exp_HT[heads],
            p.scale,
            FORM=this.form,
            MASKED=this.may_pass_the_end(tile),
            BLOCK_Q=tile.rows,
            BLOCK_K=tile.columns,
        )
    return context_HTd, log_sum_exp_HT


def backward(
    problem: Problem,
    d_context_HTd: torch.Tensor,
    context_HTd: torch.Tensor,
    log_sum_exp_HT: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Differentiate `forward`.

    Args:
        problem: Its arguments.
        d_context_HTd: Gradient of the context.
        context_HTd: The context.
        log_sum_exp_HT: What `forward` returned beside it.

    Returns:
        Gradients of queries, keys, values [H, T, d] and of both tables [H, R, d]; the last two are
        empty where there is no table.
    """
    p, this = problem, _Pass(problem)
    gradients = [_empty_rows(p.query_HTd) for _ in range(3)]
    tables = [torch.empty_like(t) for t in (p.rel_key_HRd, p.rel_query_HRd) if t is not None]
    delta_HT = torch.empty_like(log_sum_exp_HT)
    tile = this.tile("delta")
    launch(
        delta_kernel,
        (-(-this.num_tokens // tile.rows), this.num_heads),
        tile,
        Rows.of(context_HTd),
        Rows.of(d_context_HTd),
        delta_HT,
        this.num_tokens,
        FORM=this.form,
        BLOCK_T=tile.rows,
    )
    for heads in this.groups(2 * p.num_columns + 2 * p.max_length):
        by_query, by_key = _score_gradients(
            this, heads, d_context_HTd, log_sum_exp_HT, delta_HT, gradients[2]
        )
        sides = ((p.query_HTd, p.key_HTd, by_query), (p.key_HTd, p.query_HTd, by_key))
        for side, (side_HTd, other_HTd, d_scores) in enumerate(sides):
            _side_gradient(this, side, heads, other_HTd[heads], d_scores, gradients[side][heads])
            if tables:
                this.table_gradient(side, side_HTd[heads], d_scores, tables[side][heads])
    return (*gradients, *(tables or [p.query_HTd.new_empty(0) for _ in range(2)]))


def _score_gradients(
    this: _Pass,
    heads: slice,
    d_context_HTd: torch.Tensor,
    log_sum_exp_HT: torch.Tensor,
    delta_HT: torch.Tensor,
    d_value_HTd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute dV of some heads, and their dS by query and by key, both [H, T, L]."""
    p, tile = this.problem, this.tile("scores")
    shape = (heads.stop - heads.start, this.num_tokens, p.max_length)
    by_query, by_key = (p.query_HTd.new_empty(shape) for _ in range(2))
    launch(
        score_kernel,
        this.grid(tile.columns, heads),
        tile,
        *this.inputs(heads),
        Rows.of(d_context_HTd[heads]),
        log_sum_exp_HT[heads],
        delta_HT[heads],
        Rows.of(d_value_HTd[heads]),
        by_query,
        by_key,
        p.scale,
        FORM=this.form,
        MASKED=this.may_pass_the_end(tile),
        BLOCK_Q=tile.rows,
        BLOCK_K=tile.columns,
    )
    return by_query, by_key


def _side_gradient(
    this: _Pass,
    side: int,
    heads: slice,
    other_HTd: torch.Tensor,
    d_scores: torch.Tensor,
    gradient_HTd: torch.Tensor,
) -> None:
    """Compute dQ (side 0) or dK (side 1) of some heads."""
    tile = this.tile("side")
    table_HRd = (this.problem.rel_key_HRd, this.problem.rel_query_HRd)[side]
    launch(
        side_kernel,
        this.grid(tile.rows, heads),
        tile,
        d_scores,
        Rows.of(other_HTd),
        Rows.of(other_HTd if table_HRd is None else table_HRd[heads]),
        this.table_rows if table_HRd is None else this.table_rows[side],
        this.extent,
        Rows.of(gradient_HTd),
        this.problem.scale,
        FORM=this.form,
        BLOCK_R=tile.rows,
        BLOCK_C=tile.columns,
    )
