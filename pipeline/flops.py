"""FLOPs of the minimal exact algorithm: the numerator of MFU, whatever an implementation wastes.

Counts multiply-adds as two operations, forward and backward as three forwards. Minimal means: the
generator's last layer runs only inside the enhanced mask decoder, on masked slots, with keys and
values once; logits exist only at masked slots; embeddings are gathered. DeBERTaV3-large at length
512 needs 3.246 GFLOP a token.
"""

from pipeline.config import NetworkSection, RunConfig

_TRAINING_FORWARDS = 3

PEAK_DENSE_BF16_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Vendors' dense bf16 rates by a part of the device's name; more specific names first."""


def _layer_flops(network: NetworkSection, sequence_length: int) -> int:
    """Forward operations of one encoder layer for one token."""
    h, relative_rows = network.hidden_size, 2 * network.position_buckets
    dense = 8 * h * h + 4 * h * network.intermediate_size
    return dense + 4 * sequence_length * h + 4 * relative_rows * h


def _mask_decoder_flops(network: NetworkSection, sequence_length: int, mask_prob: float) -> float:
    """Forward operations of the enhanced mask decoder for one token of the sequence."""
    h, relative_rows = network.hidden_size, 2 * network.position_buckets
    keys_once = 4 * h * h + 2 * relative_rows * h
    row = 4 * h * h + 4 * h * network.intermediate_size + 4 * sequence_length * h
    return keys_once + mask_prob * 2 * (row + 2 * relative_rows * h)


def training_flops_per_token(config: RunConfig) -> float:
    """Count the operations of training both networks on one token.

    Args:
        config: The run.

    Returns:
        Floating-point operations a token, forward and backward.
    """
    length, mask_prob = config.data.sequence_length, config.objective.mask_prob
    d, g = config.discriminator, config.generator
    discriminator = d.num_hidden_layers * _layer_flops(d, length) + 2 * d.hidden_size**2
    mlm_head = 2 * g.hidden_size**2 + 2 * g.hidden_size * config.model.vocab_size
    generator = (
        (g.num_hidden_layers - 1) * _layer_flops(g, length)
        + _mask_decoder_flops(g, length, mask_prob)
        + mask_prob * mlm_head
    )
    return _TRAINING_FORWARDS * (discriminator + generator)


def peak_flops(device_name: str) -> float | None:
    """Look up a device's dense bf16 rate.

    Args:
        device_name: As the driver reports it.

    Returns:
        Operations a second, or None for a device that the table lacks.
    """
    for part, rate in PEAK_DENSE_BF16_FLOPS.items():
        if part in device_name:
            return rate
    return None
