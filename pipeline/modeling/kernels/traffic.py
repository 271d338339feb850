"""What the attention operators move and compute, counted by formula: bytes of HBM and FLOPs.

A custom operator hides its own traffic from a count of operands, so it is documented here, step by
step; a test compares the sum with what the launcher really hands to each kernel. A tensor counts
once each time that a step reads or writes it: tiles that neighbouring programs read again are
expected in the second-level cache, and whatever else stays there between two steps would make the
true traffic smaller.

Letters: L sequence length, d head size, R rows of the relative table, C columns of the products
with it.
"""

from dataclasses import dataclass

from pipeline.modeling.kernels.disentangled import fewest_columns
from pipeline.modeling.kernels.tile_table import TABLE_PROGRAMS

_WIDE_BYTES = 4


@dataclass(frozen=True)
class Step:
    """One step of an operator; all numbers are for one token of one layer."""

    name: str
    read_bytes: float
    written_bytes: float
    flops: float = 0.0

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention on a batch of full sequences."""

    num_heads: int
    head_size: int
    length: int
    table_rows: int
    """R, 0 without relative attention."""
    num_sequences: int
    element_bytes: int = 2
    heads_at_once: int | None = None
    """Heads of a group, which scratch memory decides; all of them where not given."""

    @property
    def row_bytes(self) -> int:
        """All heads of one token in one of queries, keys, values, context."""
        return self.num_heads * self.head_size * self.element_bytes

    @property
    def columns(self) -> int:
        """C of the form that the operators choose."""
        by_row = fewest_columns(self.table_rows, self.length) == "rows"
        return self.table_rows if by_row else (2 * self.length if self.table_rows else 0)

    @property
    def product_bytes(self) -> int:
        """Columns of one product with the table, all heads of one token."""
        return self.num_heads * self.columns * self.element_bytes

    @property
    def read_product_bytes(self) -> int:
        """Of these, what a row reads: of 2 L distances it meets L."""
        return min(self.product_bytes, self.score_bytes)

    @property
    def score_bytes(self) -> int:
        """One row of scores, all heads of one token."""
        return self.num_heads * self.length * self.element_bytes

    @property
    def number_bytes(self) -> int:
        """One number a row in fp32, all heads of one token."""
        return self.num_heads * _WIDE_BYTES

    @property
    def partial_bytes(self) -> float:
        """Gradients of one table by distance, before parts and rows are summed."""
        heads = self.heads_at_once or self.num_heads
        blocks = -(-2 * self.length // 64)
        parts = min(self.num_sequences, -(-TABLE_PROGRAMS // (blocks * heads)))
        table = self.num_heads * 2 * self.length * self.head_size * _WIDE_BYTES
        return parts * table / (self.num_sequences * self.length)


def _products(shape: AttentionShape) -> Step:
    """Queries and keys times the table, by matrix products."""
    width = shape.num_heads * shape.head_size
    return Step(
        "products with the table",
        2 * shape.row_bytes if shape.table_rows else 0,
        2 * shape.product_bytes,
        4 * shape.columns * width,
    )


def forward_traffic(shape: AttentionShape) -> list[Step]:
    """Count the forward operator.

    Args:
        shape: The layer.

    Returns:
        Its steps in order.
    """
    width = shape.num_heads * shape.head_size
    return [
        _products(shape),
        Step(
            "attention",
            3 * shape.row_bytes + 2 * shape.read_product_bytes,
            shape.row_bytes + shape.number_bytes,
            4 * shape.length * width,
        ),
    ]


def backward_traffic(shape: AttentionShape) -> list[Step]:
    """Count the backward operator.

    Args:
        shape: The layer.

    Returns:
        Its steps in order.
    """
    width, length = shape.num_heads * shape.head_size, shape.length
    sides = 2 if shape.table_rows else 0
    return [
        _products(shape),
        Step("delta", 2 * shape.row_bytes, shape.number_bytes),
        Step(
            "scores and values",
            4 * shape.row_bytes + 2 * shape.read_product_bytes + 2 * shape.number_bytes,
            shape.row_bytes + 2 * shape.score_bytes,
            6 * length * width,
        ),
        Step(
            "queries and keys",
            2 * (shape.score_bytes + shape.row_bytes),
            2 * shape.row_bytes,
            (8 if shape.table_rows else 4) * length * width,
        ),
        Step(
            "table by distance",
            sides * (shape.score_bytes + shape.row_bytes),
            sides * shape.partial_bytes,
            sides * 2 * length * width,
        ),
        Step("table by row", sides * shape.partial_bytes, 0),
    ]


def hidden_bytes(shape: AttentionShape) -> float:
    """Count what a sum over the operators' operands leaves out.

    Args:
        shape: The layer.

    Returns:
        Bytes a token, forward and backward, less each operand and each result once: queries, keys,
        values, context and log-sum-exp forward; these, the context's gradient and three gradients
        backward.
    """
    steps = forward_traffic(shape) + backward_traffic(shape)
    operands = 12 * shape.row_bytes + 2 * shape.number_bytes
    return sum(step.bytes for step in steps) - operands
