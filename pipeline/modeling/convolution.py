"""The convolution of DeBERTa-v2-xlarge: n-grams of the input, added behind the first layer.

    conv(embeddings) -> dropout -> activation -> + output of layer 0 -> LayerNorm -> padding mask

Parameter names are those of transformers' ConvLayer. The embeddings are zero at padding, so that
the end of a short sequence sees what the end of a full one sees.

Letters: B sequences, L sequence length, D hidden size.
"""

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import NetworkSection
from pipeline.counter_rng import DropoutKey, dropout
from pipeline.modeling.embeddings import LayerNorm, dropout_site

_ACTIVATIONS = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}
_LAYER, _WHERE = 0, 4  # dropout site: the first free one of the layer that this runs beside


class Convolution(nn.Module):
    """One convolution over positions, its residual sum and its LayerNorm.

    Args:
        network: Sizes, kernel, activation and dropout.
    """

    def __init__(self, network: NetworkSection) -> None:
        super().__init__()
        width, kernel = network.hidden_size, network.conv_kernel_size
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.LayerNorm = LayerNorm(width, network.layer_norm_eps)
        self.activation = _ACTIVATIONS[network.conv_act]
        self.dropout_prob = network.hidden_dropout_prob

    def forward(
        self,
        embedded_BLD: torch.Tensor,
        layer_output_BLD: torch.Tensor,
        attention_mask_BL: torch.Tensor | None,
        dropout_key: DropoutKey | None,
    ) -> torch.Tensor:
        """Add what neighbouring tokens say to the first layer's output.

        Args:
            embedded_BLD: Input of the first layer, zero at padding.
            layer_output_BLD: Output of the first layer.
            attention_mask_BL: bool [B, L], False at padding; None where there is none.
            dropout_key: Dropout of this micro step; None outside training.

        Returns:
            [B, L, D], zero at padding.

        Source:
            `bert.py` (ConvLayer) of the release, which drops before it activates.
        """
        convolved_BLD = self.conv(embedded_BLD.mT).mT
        site = dropout_site(dropout_key, _LAYER, _WHERE)
        activated_BLD = self.activation(dropout(convolved_BLD, self.dropout_prob, site))
        output_BLD = self.LayerNorm(layer_output_BLD + activated_BLD)
        if attention_mask_BL is None:
            return output_BLD
        return output_BLD * attention_mask_BL[:, :, None].to(output_BLD.dtype)
