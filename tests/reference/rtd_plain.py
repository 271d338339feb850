"""Masked language modelling and replaced token detection without a shortcut: losses and draws.

Plain functions of (weights by name, token ids), written from the papers and from the description
of the released code, not from `pipeline`. Nothing is skipped or shared: the generator computes its
unused last pass, decodes every position and holds all logits; the discriminator's table is the
whole V x E sum. No dropout. Everything is differentiable in the weights, in their own dtype:

    weights = {name: t.detach().clone().requires_grad_() for name, t in state_dict.items()}
    step = generator_step(weights, network, ids, mask, positions, valid, targets, noise)
    ids, labels = corrupt(ids, positions, valid, step.drawn)
    step = discriminator_step(generator_weights, weights, network, ids, mask, labels)

`network` is anything with the fields of `pipeline.config.NetworkSection`. Masks are bool [B, L].
`plain_encoder.py` has the encoder, `plain_training.py` the steps of training.
"""

from typing import NamedTuple

import torch

from tests.reference.plain_encoder import (
    PlainEncoder,
    attention_logits,
    bucket,
    gelu,
    logits_by_pairs,
)

__all__ = ["attention_logits", "bucket", "corrupt", "discriminator_step", "generator_step"]

WORDS = "deberta.embeddings.word_embeddings"
POSITIONS = "deberta.embeddings.position_embeddings"


class GeneratorStep(NamedTuple):
    loss_sum: torch.Tensor  # scalar, over valid slots
    logits: torch.Tensor  # [B, K, V]
    drawn: torch.Tensor | None  # [B, K]; None without noise
    correct: int


class DiscriminatorStep(NamedTuple):
    loss_sum: torch.Tensor  # scalar, over tokens that are not padding
    logits: torch.Tensor  # [B, L]


def generator_states(weights, network, ids, mask, logits=logits_by_pairs):
    """The generator's encoder and its hidden states, embedding output first."""
    encoder = PlainEncoder(weights, network, logits)
    positions = weights[f"{POSITIONS}.weight"] if network.position_biased_input else None
    embedded = encoder.embed(ids, mask, weights[f"{WORDS}.weight"], positions)
    return encoder, encoder.hidden_states(embedded, mask)


def generator_step(
    weights,
    network,
    ids,
    mask,
    positions,
    valid,
    targets,
    noise,
    temperature=1.0,
    *,
    enhanced_mask_decoder=True,
    drawable=slice(None),
    logits=logits_by_pairs,
):
    """Loss, logits and draws of the generator.

    `noise` is Gumbel noise [B, K, V], or None where nothing is drawn; `drawable` are the ids that
    may be drawn, as a slice.
    """
    encoder, states = generator_states(weights, network, ids, mask, logits)
    decoded = encoder.decode(states, mask) if enhanced_mask_decoder else states[-1]
    name = "lm_predictions.lm_head"
    x = gelu(encoder.linear(decoded, f"{name}.dense"))
    x = encoder.layer_norm(x, f"{name}.LayerNorm")
    all_logits = x @ weights[f"{WORDS}.weight"].T + weights[f"{name}.bias"]
    slots = torch.stack([row[at] for row, at in zip(all_logits, positions, strict=True)])
    losses = -torch.log_softmax(slots, -1).gather(-1, targets[:, :, None])[:, :, 0]
    correct = int(((slots.argmax(-1) == targets) & valid).sum())
    drawn = None
    if noise is not None:
        forbidden = torch.ones(slots.shape[-1], dtype=torch.bool)
        forbidden[drawable] = False
        scores = slots.detach() / temperature + noise
        drawn = scores.masked_fill(forbidden, -torch.inf).argmax(-1)
    return GeneratorStep((losses * valid).sum(), slots, drawn, correct)


def corrupt(ids, positions, valid, drawn):
    """Corrupted ids, and labels: 1 where a masked token was replaced by another one."""
    corrupted, labels = ids.clone(), torch.zeros(ids.shape)
    for row in range(ids.shape[0]):
        for slot in range(positions.shape[1]):
            if valid[row, slot]:
                position = positions[row, slot]
                corrupted[row, position] = drawn[row, slot]
                labels[row, position] = float(drawn[row, slot] != ids[row, position])
    return corrupted, labels


def shared_table(generator_weights, weights, name, sharing):
    """The discriminator's table under `gdes` sg(E_G) + Delta, `es` E_G or `nes` its own."""
    if sharing == "nes":
        return weights[f"{name}.weight"]
    if sharing == "es":
        return generator_weights[f"{name}.weight"]
    return generator_weights[f"{name}.weight"].detach() + weights[f"{name}._weight"]


def discriminator_states(
    generator_weights, weights, network, ids, mask, sharing="gdes", logits=logits_by_pairs
):
    """The discriminator's encoder and its hidden states, embedding output first."""
    encoder = PlainEncoder(weights, network, logits)
    words = shared_table(generator_weights, weights, WORDS, sharing)
    positions = None
    if network.position_biased_input:
        positions = shared_table(generator_weights, weights, POSITIONS, sharing)
    return encoder, encoder.hidden_states(encoder.embed(ids, mask, words, positions), mask)


def discriminator_step(
    generator_weights,
    weights,
    network,
    ids,
    mask,
    labels,
    *,
    sharing="gdes",
    rtd_head="debertav3",
    logits=logits_by_pairs,
):
    """Loss and logits of the discriminator on corrupted ids."""
    encoder, states = discriminator_states(
        generator_weights, weights, network, ids, mask, sharing, logits
    )
    hidden, name = states[-1], "mask_predictions"
    if rtd_head == "debertav3":
        hidden = encoder.layer_norm(hidden[:, :1] + hidden, f"{name}.LayerNorm")
    x = gelu(encoder.linear(hidden, f"{name}.dense"))
    scores = encoder.linear(x, f"{name}.classifier")[:, :, 0]
    right = torch.where(labels.bool(), scores, -scores)
    losses = -torch.nn.functional.logsigmoid(right)
    return DiscriminatorStep((losses * mask).sum(), scores)
