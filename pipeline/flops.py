"""FLOPs of the minimal exact algorithm: the numerator of MFU, whatever an implementation wastes.

Counts multiply-adds as two operations, forward and backward as three forwards. Minimal means: the
generator's last layer runs on masked slots only, with keys and values once, twice where there is an
enhanced mask decoder; logits exist only at masked slots; embeddings are gathered; the relative
table is projected once for a whole batch. DeBERTaV3-large at length 512 needs 3.246 GFLOP a token.

    training_flops_per_token   one token of one sequence length
    training_flops             all steps of a run, phase by phase
    peak_flops                 what a device could do in a second
"""

import re

from pipeline.config import NetworkSection, RunConfig

TRAINING_FORWARDS = 3
"""Forward passes that one of training, with its backward pass, is worth."""

PEAK_DENSE_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Rates of tensor cores by words of the device's name, more specific names first: bf16 or fp16,
sums in fp32, without sparsity. V100 and T4 have fp16 alone.

Source:
    NVIDIA's data sheets of the types, whose rates with sparsity are halved; for RTX 3090 and 4090
    the white papers of GA102 and AD102.
"""


def _relative_rows(network: NetworkSection) -> int:
    """Rows of the relative table."""
    return 2 * network.position_buckets if network.relative_attention else 0


def _encoder_flops(network: NetworkSection, sequence_length: int, num_layers: int) -> int:
    """Forward operations of the input's projection, the convolution and some layers, a token."""
    h, embedding = network.hidden_size, network.word_embedding_size
    projection = 0 if embedding == h else 2 * embedding * h
    convolution = 2 * network.conv_kernel_size * h * h
    dense = 8 * h * h + 4 * h * network.intermediate_size
    layer = dense + 4 * sequence_length * h + 4 * _relative_rows(network) * h
    return projection + convolution + num_layers * layer


def _last_layer_flops(
    network: NetworkSection, sequence_length: int, mask_prob: float, passes: int
) -> float:
    """Forward operations of the last layer on masked slots for one token of the sequence."""
    h, relative_rows = network.hidden_size, _relative_rows(network)
    keys_once = 4 * h * h + 2 * relative_rows * h
    row = 4 * h * h + 4 * h * network.intermediate_size + 4 * sequence_length * h
    return keys_once + mask_prob * passes * (row + 2 * relative_rows * h)


def training_flops_per_token(config: RunConfig, sequence_length: int | None = None) -> float:
    """Count the operations of training the run's networks on one token.

    Args:
        config: The run.
        sequence_length: Tokens in a sequence; data.sequence_length where not given.

    Returns:
        Floating-point operations a token, forward and backward.
    """
    length = config.data.sequence_length if sequence_length is None else sequence_length
    mask_prob, g, d = config.objective.mask_prob, config.generator, config.discriminator
    passes = 2 if config.objective.enhanced_mask_decoder else 1
    mlm_head = 2 * g.word_embedding_size * (g.hidden_size + config.model.vocab_size)
    forward = (
        _encoder_flops(g, length, g.num_hidden_layers - 1)
        + _last_layer_flops(g, length, mask_prob, passes)
        + mask_prob * mlm_head
    )
    if d is not None:
        # Both heads of replaced token detection have one dense layer.
        forward += _encoder_flops(d, length, d.num_hidden_layers) + 2 * d.hidden_size**2
    return TRAINING_FORWARDS * forward


def training_flops(config: RunConfig, train_batch_size: int) -> float:
    """Count the operations of a whole run.

    Args:
        config: The run.
        train_batch_size: Sequences in a step where no phase says otherwise.

    Returns:
        Floating-point operations of schedule.max_steps steps; padding counts as tokens.
    """
    total, begun, whole = 0.0, 0, config.data.sequence_length
    ends = [
        (phase.until_step, phase.sequence_length, phase.train_batch_size)
        for phase in config.schedule.phases
    ]
    for until_step, phase_length, phase_batch in [*ends, (config.schedule.max_steps, None, None)]:
        length, batch = phase_length or whole, phase_batch or train_batch_size
        tokens = (until_step - begun) * batch * length
        total += tokens * training_flops_per_token(config, length)
        begun = until_step
    return total


def peak_flops(device_name: str) -> float | None:
    """Look up the dense rate of a device's tensor cores, bf16 or fp16.

    Args:
        device_name: As the driver reports it.

    Returns:
        Operations a second, or None for a device that the table lacks.
    """
    for words, rate in PEAK_DENSE_FLOPS.items():
        if re.search(rf"\b{words}\b", device_name):
            return rate
    return None
