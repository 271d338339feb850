"""What the fused vocabulary head does with a chunk's products: launches, and what they carry.

    ChunkSums        maxima, sums of exponentials, targets' logits, best ids and draws, by one pass
    chunk_gradient   gradient of the logits and of the bias, by one pass

Every element has one writer and every sum one order. Sums and products of the draw's scores are not
fused, so that they are rounded as torch's operations round them.

Letters: B sequences, K masked slots of a sequence, N = B K slots, C ids of a chunk.
"""

import torch

from pipeline.modeling.kernels.arguments import Noise, Sums
from pipeline.modeling.kernels.launching import INTERPRETED, device_architecture, launch
from pipeline.modeling.kernels.tile_table import GRADIENT_ROWS, head_tile
from pipeline.modeling.kernels.vocabulary_kernels import gradient_kernel, sums_kernel

__all__ = ["INTERPRETED", "ChunkSums", "chunk_gradient"]


class ChunkSums:
    """What the chunks so far have left.

    Args:
        targets_N: int64, the slots' targets.
        noise: What the noise of the draws depends on; None draws nothing.
    """

    def __init__(self, targets_N: torch.Tensor, noise: Noise | None) -> None:
        self._targets_N, self._noise = targets_N.contiguous(), noise
        start = 0 if noise is None else noise.start
        lowest, zero = (
            torch.full_like(targets_N, value, dtype=torch.float32) for value in (-torch.inf, 0.0)
        )
        self._sums = Sums(
            maximum=lowest,
            total=zero,
            target_logit=zero.clone(),
            # A row of NaN never wins; it keeps an id that is safe to look up.
            best_id=torch.zeros_like(targets_N),
            best_score=lowest.clone(),
            drawn_id=torch.full_like(targets_N, start),
        )

    def add(self, first: int, product_NC: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Take a chunk into account.

        Args:
            first: Its first id, a multiple of 4.
            product_NC: Products of hidden states and rows of the table, fp32, contiguous.
            bias_C: Their bias.
        """
        num_rows, size = product_NC.shape
        tile = head_tile(device_architecture(product_NC.device), "sums")
        # Pointers that a kernel without draws does not read.
        noise = self._noise or Noise(
            self._targets_N, self._targets_N, self._targets_N, 1, 1.0, 0, 0
        )
        launch(
            sums_kernel,
            (-(-num_rows // tile.rows),),
            tile,
            product_NC,
            bias_C,
            self._targets_N,
            self._sums,
            noise,
            first,
            num_rows,
            SIZE=size,
            DRAWS=self._noise is not None,
            BLOCK_R=tile.rows,
            BLOCK_C=tile.columns,
        )

    @property
    def max_N(self) -> torch.Tensor:
        """Maximum of the logits, fp32."""
        return self._sums.maximum

    @property
    def sum_N(self) -> torch.Tensor:
        """Sum of exponentials relative to the maximum, fp32."""
        return self._sums.total

    @property
    def target_logit_N(self) -> torch.Tensor:
        """Logits of the targets, fp32."""
        return self._sums.target_logit

    @property
    def best_id_N(self) -> torch.Tensor:
        """Ids of the maxima, int64, the lowest at a tie."""
        return self._sums.best_id

    @property
    def drawn_id_N(self) -> torch.Tensor | None:
        """Draws, int64; None without any."""
        return None if self._noise is None else self._sums.drawn_id


def chunk_gradient(
    product_NC: torch.Tensor,
    bias_C: torch.Tensor,
    max_N: torch.Tensor,
    sum_N: torch.Tensor,
    weight_N: torch.Tensor,
    targets_N: torch.Tensor,
    first: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate the weighted cross entropies; see `chunk_functions.chunk_gradient`.

    Args:
        product_NC: Products of hidden states and rows of the table, fp32, contiguous; overwritten
            where `dtype` is fp32.
        bias_C: Their bias.
        max_N: Maximum over all chunks.
        sum_N: Sum of exponentials relative to it.
        weight_N: Of each slot's loss, fp32; 0 where it does not count.
        targets_N: int64, the slots' targets.
        first: The chunk's first id.
        dtype: Of the products that follow.

    Returns:
        Gradient of the logits [N, C] in `dtype`, and of the bias [C] in fp32.
    """
    num_rows, size = product_NC.shape
    tile = head_tile(device_architecture(product_NC.device), "gradient")
    rows_a_part = max(GRADIENT_ROWS, tile.rows)
    parts = -(-num_rows // rows_a_part)
    in_place = dtype == product_NC.dtype
    d_logits_NC = product_NC if in_place else torch.empty_like(product_NC, dtype=dtype)
    d_bias_PC = product_NC.new_empty(parts, size)
    launch(
        gradient_kernel,
        (-(-size // tile.columns), parts),
        tile,
        product_NC,
        bias_C,
        targets_N.contiguous(),
        max_N,
        weight_N / sum_N,
        weight_N,
        d_logits_NC,
        d_bias_PC,
        first,
        num_rows,
        SIZE=size,
        ROWS=rows_a_part,
        BLOCK_R=tile.rows,
        BLOCK_C=tile.columns,
    )
    return d_logits_NC, d_bias_PC.sum(0)
