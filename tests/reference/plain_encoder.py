"""The encoder without a shortcut: every layer at every position, attention pair by pair.

Written from the papers and from the description of the released code, not from `pipeline`. It has
no dropout, no kernel, no table by distance and no selected slots:

    bucket             distance -> bucket, one pair at a time
    logits_by_pairs    attention logits, one pair of positions at a time: the definition
    logits_at_once     the same sums as tensors, for long comparisons; a test holds them together
    PlainEncoder       weights by name -> embeddings, hidden states, enhanced mask decoder

Everything is differentiable in the weights and computes in their dtype. A `section` is anything
with the fields of `pipeline.config.NetworkSection`; masks are bool [B, L], True at real tokens.
"""

import functools
import math

import torch

PAD_ID = 0


def bucket(distance, position_buckets, max_position, rule="clamp"):
    """Bucket of a signed distance (debertav3 code, da_utils.py), for one pair of positions."""
    middle = position_buckets // 2
    magnitude = abs(distance)
    if rule == "clamp":
        magnitude = min(magnitude, max_position - 1)
    if magnitude > middle:
        steps = math.log(magnitude / middle) / math.log((max_position - 1) / middle) * (middle - 1)
        magnitude = math.ceil(steps - 1e-9) + middle
    return magnitude if distance >= 0 else -magnitude


def table_row(distance, position_buckets, max_position, rule="clamp"):
    """Row of the relative table for a signed distance."""
    row = bucket(distance, position_buckets, max_position, rule) + position_buckets
    return min(max(row, 0), 2 * position_buckets - 1)


@functools.lru_cache(maxsize=16)
def table_rows(length, position_buckets, max_position, rule):
    """Row of every pair (query, key): int64 [L, L]."""
    return torch.tensor(
        [
            [table_row(i - j, position_buckets, max_position, rule) for j in range(length)]
            for i in range(length)
        ]
    )


def attention_logits(query, key, rel_key, rel_query, position_buckets, max_position, rule="clamp"):
    """Logits of one head of one sequence from [L, d] and [R, d], one pair at a time."""
    length, size = query.shape
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            r = table_row(i - j, position_buckets, max_position, rule)
            row.append(query[i] @ key[j] + query[i] @ rel_key[r] + key[j] @ rel_query[r])
        rows.append(torch.stack(row))
    return torch.stack(rows) / fp32_root(3 * size)


def fp32_root(number):
    """The released code and transformers keep the root of the scale in fp32 in every dtype."""
    return torch.tensor(float(number)).sqrt().item()


def logits_by_pairs(query, key, rel_key, rel_query, *geometry):
    """Logits [B, H, L, L] of all heads and sequences from [B, H, L, d] and [H, R, d]."""
    if rel_key is None:
        return torch.stack([_content_by_pairs(*pair) for pair in zip(query, key, strict=True)])
    return torch.stack(
        [
            torch.stack(
                [
                    attention_logits(q, k, rk, rq, *geometry)
                    for q, k, rk, rq in zip(queries, keys, rel_key, rel_query, strict=True)
                ]
            )
            for queries, keys in zip(query, key, strict=True)
        ]
    )


def _content_by_pairs(query, key):
    """Logits [H, L, L] of ordinary attention in one sequence."""
    return torch.stack(
        [
            torch.stack([torch.stack([q @ k for k in keys]) for q in queries])
            / fp32_root(query.shape[-1])
            for queries, keys in zip(query, key, strict=True)
        ]
    )


def logits_at_once(query, key, rel_key, rel_query, *geometry):
    """The sums of `logits_by_pairs`, every pair with its own copy of its two table rows."""
    logits = torch.einsum("bhid,bhjd->bhij", query, key)
    if rel_key is None:
        return logits / fp32_root(query.shape[-1])
    rows = table_rows(query.shape[2], *geometry)
    logits = logits + torch.einsum("bhid,hijd->bhij", query, rel_key[:, rows])
    logits = logits + torch.einsum("bhjd,hijd->bhij", key, rel_query[:, rows])
    return logits / fp32_root(3 * query.shape[-1])


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS = {"gelu": gelu, "tanh": torch.tanh, "relu": lambda x: x.clamp(min=0)}


class PlainEncoder:
    """The weights of one network by name, and what its encoder makes of tokens."""

    def __init__(self, weights, section, logits=logits_by_pairs):
        self.weights = weights
        self.section = section
        self.logits = logits

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, x, name):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        normal = (x - mean) / torch.sqrt(variance + self.section.layer_norm_eps)
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, ids, mask, words, positions):
        """Sum of embeddings -> projection -> LayerNorm -> mask.

        `words` is the table [V, E]; `positions` the table [P, E], or None where the input has no
        absolute positions. The row of [PAD] learns nothing by being looked up.
        """
        x = torch.where((ids == PAD_ID)[:, :, None], words[ids].detach(), words[ids])
        if positions is not None:
            x = x + positions[: ids.shape[1]]
        if "deberta.embeddings.embed_proj.weight" in self.weights:
            x = x @ self.weights["deberta.embeddings.embed_proj.weight"].T
        return self.layer_norm(x, "deberta.embeddings.LayerNorm") * mask[:, :, None]

    def heads(self, x):
        """[.., L, D] -> [.., H, L, d]."""
        size = self.section.hidden_size // self.section.num_attention_heads
        return torch.stack(x.split(size, dim=-1), dim=-3)

    def attention(self, query_states, states, name, mask):
        """Attention of [B, L, D] query states to [B, L, D] states."""
        query, key, value = (
            self.heads(self.linear(x, f"{name}.{projection}_proj"))
            for x, projection in ((query_states, "query"), (states, "key"), (states, "value"))
        )
        rel_key = rel_query = None
        section = self.section
        if section.relative_attention:
            table = self.weights["deberta.encoder.rel_embeddings.weight"]
            table = self.layer_norm(table, "deberta.encoder.LayerNorm")
            rel_key = self.heads(self.linear(table, f"{name}.key_proj"))
            rel_query = self.heads(self.linear(table, f"{name}.query_proj"))
        end = section.max_relative_positions
        max_position = section.max_position_embeddings if end < 1 else end
        geometry = (section.position_buckets, max_position, section.relative_position_rule)
        logits = self.logits(query, key, rel_key, rel_query, *geometry)
        logits = logits.masked_fill(~mask[:, None, None, :], -1e30)
        context = torch.softmax(logits, -1) @ value
        return torch.cat(context.unbind(1), -1)

    def layer(self, query_states, states, number, mask):
        name = f"deberta.encoder.layer.{number}"
        context = self.attention(query_states, states, f"{name}.attention.self", mask)
        out = self.linear(context, f"{name}.attention.output.dense") + query_states
        out = self.layer_norm(out, f"{name}.attention.output.LayerNorm")
        inner = gelu(self.linear(out, f"{name}.intermediate.dense"))
        result = self.linear(inner, f"{name}.output.dense") + out
        return self.layer_norm(result, f"{name}.output.LayerNorm")

    def convolution(self, embedded, after_layer, mask):
        """The convolution of DeBERTa-v2-xlarge: beside the first layer, on the embeddings."""
        kernel = self.weights["deberta.encoder.conv.conv.weight"]  # [out, in, width]
        width, length = kernel.shape[2], embedded.shape[1]
        padded = torch.nn.functional.pad(embedded, (0, 0, width // 2, width // 2))
        out = self.weights["deberta.encoder.conv.conv.bias"] + sum(
            padded[:, shift : shift + length] @ kernel[:, :, shift].T for shift in range(width)
        )
        out = ACTIVATIONS[self.section.conv_act](out * mask[:, :, None])
        out = self.layer_norm(after_layer + out, "deberta.encoder.conv.LayerNorm")
        return out * mask[:, :, None]

    def hidden_states(self, embedded, mask):
        """Embedding output and the output of every layer: num_hidden_layers + 1 of [B, L, D]."""
        states = [embedded]
        for number in range(self.section.num_hidden_layers):
            state = self.layer(states[-1], states[-1], number, mask)
            if number == 0 and self.section.conv_kernel_size > 0:
                state = self.convolution(embedded, state, mask)
            states.append(state)
        return states

    def decode(self, states, mask):
        """Enhanced mask decoder at every position: the last layer twice, all keys from H[-2]."""
        memory = states[-2]
        table = self.weights["deberta.embeddings.position_embeddings.weight"]
        query = memory + table[: memory.shape[1]]
        for _ in range(2):
            query = self.layer(query, memory, self.section.num_hidden_layers - 1, mask)
        return query
