"""What one operation needs while it runs: modelled from the operations that need most.

Not compiled, a dropout mask of n elements is drawn by integer arithmetic that holds 10.5 n bytes at
a time, and Gumbel noise 15 bytes for a slot and an id; fused kernels draw in registers. Tests
compare the sums with the peak of whole forward and backward passes on a CPU.

Letters: n = H B L L scores, N masked slots of a micro batch, C ids of a chunk.
"""

from pipeline.config import RunConfig
from pipeline.plan.activations import CHUNK_IDS, Activations, masked_slots

_MASK_DRAW_BYTES = 10.5  # for an element: an eighth of counters, products and words
_DRAWN_LOGIT_BYTES = 19  # fp32 logit, and 15 of Gumbel noise
_LOGIT_BYTES = 8  # fp32 logit and its exponential, forward and backward
_FP32 = 4
# Matrices of n elements that live at once: two scores, and a band of two columns a distance twice.
_TORCH_FORWARD, _TORCH_BACKWARD = 5, 4
_EAGER_FORWARD_BYTES, _EAGER_BACKWARD_BYTES = 8, 9  # a score: fp32 twice; gradients of both


def layer_workspace(kept: Activations, is_generator: bool) -> int:
    """Size what the last layer's backward pass needs above what the forward pass has kept.

    By then the head's activations are gone; by attention's turn, the feed-forward block's as well.

    Args:
        kept: The network and its shapes.
        is_generator: Which head it has.

    Returns:
        Bytes above the activations at the end of the forward pass.
    """
    states = kept.sequences * kept.length * kept.network.hidden_size * kept.weight_bytes
    inner = kept.sequences * kept.length * kept.network.intermediate_size * kept.weight_bytes
    recomputed = kept.recomputed_bytes()
    is_whole = kept.config.model.activation_checkpointing == "full"
    feed_forward = 2 * inner + 2 * states + (recomputed if is_whole else 0)
    attention = recomputed + _attention_workspace(kept, states) - kept.behind_attention_bytes()
    return max(0, max(feed_forward, attention) - kept.behind_layers_bytes(is_generator))


def _attention_workspace(kept: Activations, states: int) -> int:
    """What attention needs beyond what it keeps, in the worse of its two passes."""
    network, element = kept.network, kept.weight_bytes
    scores = network.num_attention_heads * kept.sequences * kept.length**2
    backend = kept.backend_for(kept.length)
    drops = network.attention_probs_dropout_prob > 0.0
    draw = _MASK_DRAW_BYTES if drops and not kept.is_compiled else 0
    if backend not in ("eager", "torch"):
        # From the kernels' design, all heads at once: both products with the table, and the
        # gradient of the scores, written by query and by key.
        columns = min(2 * network.position_buckets, 2 * kept.length)
        rows = network.num_attention_heads * kept.sequences * kept.length
        return 2 * rows * (columns + kept.length) * element + 4 * states
    if backend == "torch":
        kept_scores = scores * (element + (1 if drops else 0))
        forward = scores * max(_TORCH_FORWARD * element, draw)
        backward = scores * _TORCH_BACKWARD * element
    else:
        narrow = element if element < _FP32 else 0
        kept_scores = scores * (_FP32 + (2 * element if drops else narrow))
        terms = 2 * element if network.relative_attention else 0
        forward = scores * (terms + _EAGER_FORWARD_BYTES + narrow + draw)
        backward = scores * _EAGER_BACKWARD_BYTES
    return max(backward + 4 * states, round(forward) - kept_scores)


def logits_workspace(config: RunConfig, sequences: int, length: int, weight_bytes: int) -> int:
    """Size the logits of one chunk of ids, with the noise of their draws.

    Args:
        config: The run.
        sequences: Micro batch of one GPU.
        length: Tokens in a sequence.
        weight_bytes: Bytes of a weight: narrow gradients of a chunk are a copy.

    Returns:
        Bytes.
    """
    rows = sequences * masked_slots(length, config.objective)
    ids = min(CHUNK_IDS, config.model.vocab_size)
    narrow = weight_bytes if weight_bytes < _FP32 else 0
    if config.model.attention_backend == "triton":
        return rows * ids * (_FP32 + narrow)  # logits, and their gradient where it is not in place
    draws = config.discriminator is not None
    return rows * ids * (_DRAWN_LOGIT_BYTES if draws else _LOGIT_BYTES + narrow)
