"""Replaced token detection without a shortcut: the judge of the training step.

Plain functions of (weights by name, token ids), written from the paper and from the description of
the released code, not from `pipeline`. Nothing is skipped or shared: the generator computes its
unused last pass, decodes every position and holds all logits; the discriminator's table is the
whole V x H sum. No dropout. Everything is differentiable in the weights, in their own dtype:

    weights = {name: t.detach().clone().requires_grad_() for name, t in state_dict.items()}
    step = generator_step(weights, network, ids, mask, positions, valid, targets, noise)
    step = discriminator_step(generator_weights, weights, network, corrupted, mask, labels)

`network` is anything with the fields of `pipeline.config.NetworkSection`. Masks are bool [B, L].
"""

import math
from typing import NamedTuple

import torch


class GeneratorStep(NamedTuple):
    loss_sum: torch.Tensor  # scalar, over valid slots
    logits: torch.Tensor  # [B, K, V]
    drawn: torch.Tensor  # [B, K]
    correct: int


class DiscriminatorStep(NamedTuple):
    loss_sum: torch.Tensor  # scalar, over tokens that are not padding
    logits: torch.Tensor  # [B, L]


def bucket(distance, position_buckets, max_position):
    """Row offset of a signed distance (debertav3 code, da_utils.py), for one pair of positions."""
    middle = position_buckets // 2
    magnitude = min(abs(distance), max_position - 1)
    if magnitude > middle:
        steps = math.log(magnitude / middle) / math.log((max_position - 1) / middle) * (middle - 1)
        magnitude = math.ceil(steps - 1e-9) + middle
    return magnitude if distance >= 0 else -magnitude


def layer_norm(x, weights, name, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[
        f"{name}.bias"
    ]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def relative_table(weights, network):
    table = weights["deberta.encoder.rel_embeddings.weight"]
    return layer_norm(table, weights, "deberta.encoder.LayerNorm", network.layer_norm_eps)


def attention_logits(query, key, rel_key, rel_query, position_buckets, max_position):
    """Logits of one head of one sequence from [L, d] and [R, d], one pair at a time."""
    length, size = query.shape
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            r = bucket(i - j, position_buckets, max_position) + position_buckets
            r = min(max(r, 0), 2 * position_buckets - 1)
            row.append(query[i] @ key[j] + query[i] @ rel_key[r] + key[j] @ rel_query[r])
        rows.append(torch.stack(row))
    # The released code and transformers keep the root in fp32 in every dtype.
    return torch.stack(rows) / torch.tensor(3.0 * size).sqrt().item()


def attention(query_states, states, weights, name, network, mask):
    """Attention of [B, L, D] query states to [B, L, D] states."""
    table = relative_table(weights, network)
    query, key, value = (
        linear(x, weights, f"{name}.{projection}_proj")
        for x, projection in ((query_states, "query"), (states, "key"), (states, "value"))
    )
    rel_key = linear(table, weights, f"{name}.key_proj")
    rel_query = linear(table, weights, f"{name}.query_proj")
    size = network.hidden_size // network.num_attention_heads
    contexts = []
    for sequence in range(query.shape[0]):
        heads = []
        for head in range(network.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            logits = attention_logits(
                query[sequence, :, part],
                key[sequence, :, part],
                rel_key[:, part],
                rel_query[:, part],
                network.position_buckets,
                network.max_position_embeddings,
            )
            logits = logits.masked_fill(~mask[sequence][None, :], -1e30)
            heads.append(torch.softmax(logits, -1) @ value[sequence, :, part])
        contexts.append(torch.cat(heads, -1))
    return torch.stack(contexts)


def layer(query_states, states, weights, name, network, mask):
    context = attention(query_states, states, weights, f"{name}.attention.self", network, mask)
    eps = network.layer_norm_eps
    out = linear(context, weights, f"{name}.attention.output.dense") + query_states
    out = layer_norm(out, weights, f"{name}.attention.output.LayerNorm", eps)
    inner = gelu(linear(out, weights, f"{name}.intermediate.dense"))
    result = linear(inner, weights, f"{name}.output.dense") + out
    return layer_norm(result, weights, f"{name}.output.LayerNorm", eps)


def hidden_states(table, ids, weights, network, mask):
    """Embedding output and the output of every layer: num_hidden_layers + 1 tensors [B, L, D]."""
    x = layer_norm(table[ids], weights, "deberta.embeddings.LayerNorm", network.layer_norm_eps)
    states = [x * mask[:, :, None]]
    for number in range(network.num_hidden_layers):
        name = f"deberta.encoder.layer.{number}"
        states.append(layer(states[-1], states[-1], weights, name, network, mask))
    return states


def decode(states, weights, network, mask):
    """Enhanced mask decoder at every position: the last layer twice, keys and values from H[-2]."""
    memory = states[-2]
    name = f"deberta.encoder.layer.{network.num_hidden_layers - 1}"
    positions = weights["deberta.embeddings.position_embeddings.weight"][: memory.shape[1]]
    query = memory + positions
    for _ in range(2):
        query = layer(query, memory, weights, name, network, mask)
    return query


def generator_step(weights, network, ids, mask, positions, valid, targets, noise, temperature=1.0):
    """Loss, logits and draws of the generator; `noise` is Gumbel noise [B, K, V]."""
    table = weights["deberta.embeddings.word_embeddings.weight"]
    states = hidden_states(table, ids, weights, network, mask)
    decoded = decode(states, weights, network, mask)
    name = "lm_predictions.lm_head"
    x = gelu(linear(decoded, weights, f"{name}.dense"))
    x = layer_norm(x, weights, f"{name}.LayerNorm", network.layer_norm_eps)
    all_logits = x @ table.T + weights[f"{name}.bias"]
    logits = torch.stack([row[slots] for row, slots in zip(all_logits, positions, strict=True)])
    losses = -torch.log_softmax(logits, -1).gather(-1, targets[:, :, None])[:, :, 0]
    drawn = (logits.detach() / temperature + noise).argmax(-1)
    correct = int(((logits.argmax(-1) == targets) & valid).sum())
    return GeneratorStep((losses * valid).sum(), logits, drawn, correct)


def discriminator_step(generator_weights, weights, network, ids, mask, labels):
    """Loss and logits of the discriminator on corrupted ids, with E_D = sg(E_G) + Delta."""
    base = generator_weights["deberta.embeddings.word_embeddings.weight"].detach()
    table = base + weights["deberta.embeddings.word_embeddings._weight"]
    hidden = hidden_states(table, ids, weights, network, mask)[-1]
    name = "mask_predictions"
    x = hidden + hidden[:, :1]
    x = layer_norm(x, weights, f"{name}.LayerNorm", network.layer_norm_eps)
    x = gelu(linear(x, weights, f"{name}.dense"))
    logits = linear(x, weights, f"{name}.classifier")[:, :, 0]
    probability = torch.sigmoid(logits)
    right = torch.where(labels.bool(), probability, 1 - probability)
    return DiscriminatorStep((-torch.log(right) * mask).sum(), logits)
