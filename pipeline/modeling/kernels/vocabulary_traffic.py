"""What the fused vocabulary head moves, counted by formula: bytes for a masked slot and an id.

Only tensors of a slot's size times an id's count. What belongs to a slot alone (sums) or to an id
alone (rows of the table, the bias) is shared by thousands of the others; gradients of the bias are
partial sums of `GRADIENT_ROWS` rows. A test compares the steps with what the kernels are handed.
"""

from pipeline.modeling.kernels.tile_table import GRADIENT_ROWS
from pipeline.modeling.kernels.traffic import Step

_LOGIT_BYTES = 4


def head_forward_traffic() -> list[Step]:
    """Count loss, accuracy and draws.

    Returns:
        Steps in order, for a slot and an id.
    """
    return [
        Step("products of hidden states and table", 0, _LOGIT_BYTES),
        Step("sums and draws", _LOGIT_BYTES, 0),
    ]


def head_backward_traffic(element_bytes: int) -> list[Step]:
    """Count the gradients of hidden states, table and bias.

    Args:
        element_bytes: Of the dtype of hidden states and table.

    Returns:
        Steps in order, for a slot and an id.
    """
    partial = _LOGIT_BYTES / GRADIENT_ROWS
    return [
        Step("products of hidden states and table", 0, _LOGIT_BYTES),
        Step("gradient of logits", _LOGIT_BYTES, element_bytes + partial),
        Step("gradient of the bias", partial, 0),
        Step("products with the gradient", 2 * element_bytes, 0),
    ]
