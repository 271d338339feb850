"""Seconds of one optimizer step: a roofline, where nobody has measured.

    time of a token in a layer = operations of matrix products / their rate
                               + bytes that anything else moves / memory bandwidth

The rates are assumed, the bytes are counted: those of torch's operations on its meta device,
operands and results; those of compiled graphs as Inductor counts them; those of the fused kernels
as they document them (`pipeline.modeling.kernels.traffic`). Caches make the true traffic smaller.
No GPU has confirmed the rates: `measurements.deviations` holds the model against every point that
somebody measures.

Letters: B sequences, L sequence length, D hidden size, F inner width, H heads, R relative rows,
E width of the word table, V vocabulary.
"""

from dataclasses import dataclass

from pipeline.config import NetworkSection, RunConfig
from pipeline.plan.activations import FUSED_HEAD_SIZES, masked_slots
from pipeline.plan.devices import Cluster, Gpu
from pipeline.plan.parameters import EngineParameters
from pipeline.plan.sharding import FP32_BYTES, Sharding

PRODUCT_SHARE = 700 / 989
"""Of the peak rate in large matrix products: 700 TFLOP/s on an H100."""
ATTENTION_SHARE = 350 / 989
"""Of the peak rate inside fused attention."""
MEMORY_SHARE = 0.85
"""Of the memory's bandwidth."""
PEER_ATTENTION_SHARE = 29 / 989
"""The same of disentangled-flash 1.1.1: 29 TFLOP/s on an H200 by its own figures."""
LAUNCH_SECONDS = 5e-6
"""To launch a kernel from Python, which bounds small micro batches."""
HIDDEN_SHARE = 0.5
"""Of what DeepSpeed sends while it computes; the rest makes kernels wait for links and memory."""
HOST_BYTES_PER_SECOND = 20e9
"""Of CPU memory, a rank, where Adam runs there."""
PCIE_BYTES_PER_SECOND = 25e9
"""Between CPU and GPU, in one direction."""

# Elements that a token moves in a layer, forward and backward: for each score of a head, each
# column of the table and head, each inner and each hidden unit; without the operands of the dense
# products, 30 a hidden and 6 an inner unit.
_COUNTED = {
    ("eager", False): (47.7, 16.3, 6.75, 87.0),
    ("eager", True): (47.7, 16.3, 6.75, 87.0),  # not counted: as without graphs, masks aside
    ("torch", False): (33.0, 0.0, 6.75, 76.0),
    ("torch", True): (44.0, 0.0, 0.0, 77.0),
}
# Hidden elements of a layer with fused attention, inside of it and outside, with graphs or without.
_FUSED_ATTENTION, _FUSED_OUTSIDE = 21, {False: 66, True: 77}
_MASK_BYTES = {"scores": 138, "hidden": 142}
"""To draw and apply a dropout mask by integer arithmetic, an element; a compiled one moves bits."""
_COMPILED_MASK_BYTES = 0.5
_HEAD_BYTES = {
    "torch": {"forward": 32, "draws": 215, "backward": 42},
    "compiled": {"forward": 8, "draws": 40, "backward": 22},
    "fused": {"forward": 8, "draws": 0, "backward": 14},
}
"""A masked slot and an id: logits, Gumbel noise by integer arithmetic, and their gradient."""
_KERNELS = {"torch": (105, 118), "fused": (66, 88)}
"""Launches of a layer without graphs and dropout, and with graphs."""
_MASK_KERNELS = 4 * 91  # four masks a layer; attention's own is inside fused kernels
_UPDATE_BYTES = 28  # Adam reads four fp32 numbers and writes three
_NORM_BYTES = 12  # gradients are read for their norm, then scaled


def _product_rate(gpu: Gpu, precision: str) -> float:
    """FLOP/s in large matrix products."""
    return PRODUCT_SHARE * (gpu.fp32_flops if precision == "fp32" else gpu.half_flops)


@dataclass(frozen=True)
class LayerWork:
    """One encoder layer of a network at one length, on one GPU.

    Attributes:
        config: The run.
        network: The network.
        length: Tokens in a sequence.
        gpu: GPU type.
        precision: Of the DeepSpeed JSON.
    """

    config: RunConfig
    network: NetworkSection
    length: int
    gpu: Gpu
    precision: str

    @property
    def _element(self) -> int:
        return 4 if self.precision in ("fp32", "autocast") else 2

    @property
    def _product_rate(self) -> float:
        return _product_rate(self.gpu, self.precision)

    @property
    def _columns(self) -> int:
        return 2 * self.network.position_buckets if self.network.relative_attention else 0

    def seconds_per_token(self) -> float:
        """Model forward and backward pass of one layer, recomputation included.

        Returns:
            Seconds a token.
        """
        kind = self.config.model.activation_checkpointing
        dense = self._dense_flops() / self._product_rate
        moved = self._moved_bytes()
        attention = self._attention_seconds()
        bandwidth = MEMORY_SHARE * self.gpu.memory_bytes_per_second
        attention += moved["scores"] / bandwidth
        total = dense + attention + moved["hidden"] / bandwidth
        # A forward pass is a third of both passes.
        return total + {"none": 0.0, "attention": attention / 3, "full": total / 3}[kind]

    def kernels(self) -> int:
        """Count the kernels of forward and backward pass.

        Returns:
            Launches.
        """
        plain, compiled = _KERNELS["fused" if self._is_fused else "torch"]
        if self._is_compiled:
            return compiled
        return plain + (_MASK_KERNELS if self.network.hidden_dropout_prob > 0.0 else 0)

    @property
    def _is_compiled(self) -> bool:
        return self.config.model.compile == "layer"

    @property
    def _is_fused(self) -> bool:
        serves = self.network.attention_head_size in FUSED_HEAD_SIZES
        return serves and self.config.model.attention_backend not in ("eager", "torch")

    def _dense_flops(self) -> float:
        """Projections and feed-forward block, three forward passes' worth."""
        width, inner = self.network.hidden_size, self.network.intermediate_size
        return 3 * (8 * width**2 + 4 * width * inner)

    def _attention_seconds(self) -> float:
        """Matrix products of attention."""
        width, length = self.network.hidden_size, self.length
        tables = 12 * self._columns * width / self._product_rate
        if self._is_fused:
            is_ours = self.config.model.attention_backend == "triton"
            share = ATTENTION_SHARE if is_ours else PEER_ATTENTION_SHARE
            rate = self._product_rate * share / PRODUCT_SHARE
            return 3.5 * 4 * length * width / rate + tables  # scores are computed again
        products = 12 * length * width / self._product_rate
        if self.config.model.attention_backend == "eager":
            return products + tables
        # Both bands have two columns a distance: three times the operations of the scores.
        return products * (3 if self.network.relative_attention else 1)

    def _moved_bytes(self) -> dict[str, float]:
        """Bytes outside of matrix products: in attention, and in the rest of the layer."""
        network, is_compiled = self.network, self._is_compiled
        width, heads = network.hidden_size, network.num_attention_heads
        scores, columns = heads * self.length, heads * self._columns
        mask = _COMPILED_MASK_BYTES if is_compiled else _MASK_BYTES["hidden"]
        masks = 2 * width * mask if network.hidden_dropout_prob > 0.0 else 0.0
        if self._is_fused:
            # Products with the table written twice and read twice, dS written twice, read four
            # times, and 21 times a row of queries, keys, values or contexts.
            columns = min(columns, 2 * scores)
            attention = _FUSED_ATTENTION * width + 4 * columns + 4 * min(columns, scores)
            attention += 6 * scores if columns else 0
            hidden = _FUSED_OUTSIDE[is_compiled] * width * self._element
            return {"scores": attention * self._element, "hidden": hidden + masks}
        backend = "eager" if self.config.model.attention_backend == "eager" else "torch"
        by_score, by_column, by_inner, by_width = _COUNTED[backend, is_compiled]
        attention = (by_score * scores + by_column * columns) * self._element
        if network.attention_probs_dropout_prob > 0.0:
            mask = _COMPILED_MASK_BYTES if is_compiled else _MASK_BYTES["scores"]
            attention += mask * scores
        hidden = (by_inner * network.intermediate_size + by_width * width) * self._element
        return {"scores": attention, "hidden": hidden + masks}

    def moved_bytes(self) -> float:
        """Count what a token moves in the layer, the operands of dense products included.

        Returns:
            Bytes, forward and backward, without recomputation.
        """
        width, inner = self.network.hidden_size, self.network.intermediate_size
        return sum(self._moved_bytes().values()) + (30 * width + 6 * inner) * self._element


@dataclass(frozen=True)
class StepSeconds:
    """One optimizer step of one GPU, by what it waits for."""

    computing: float
    """Forward and backward passes."""
    updating: float
    """Adam, norms, sums of gradients."""
    communicating: float
    """All communication, overlapped or not."""
    exposed: float
    """Communication that computing does not hide."""

    @property
    def total(self) -> float:
        """The step."""
        return self.computing + self.updating + self.exposed


def token_seconds(config: RunConfig, gpu: Gpu, precision: str, length: int) -> float:
    """Model forward and backward passes of all networks.

    Args:
        config: The run.
        gpu: GPU type.
        precision: Of the DeepSpeed JSON.
        length: Tokens in a sequence.

    Returns:
        Seconds a token, large micro batches presumed.
    """
    share = masked_slots(length, config.objective) / length
    total = 0.0
    for name, network in config.networks.items():
        layer = LayerWork(config, network, length, gpu, precision)
        layers = float(network.num_hidden_layers)
        if name == "generator":
            layers += _decoder_share(config, length, share) - 1
            total += _mlm_head_seconds(config, gpu, precision, share)
        else:
            total += 6 * network.hidden_size**2 / _product_rate(gpu, precision)
        total += layers * layer.seconds_per_token()
    return total


def _decoder_share(config: RunConfig, length: int, share: float) -> float:
    """The last layer at masked slots, as a share of a whole layer's operations."""
    network = config.generator
    width, columns = network.hidden_size, 0
    if network.relative_attention:
        columns = 2 * network.position_buckets
    passes = 2 if config.objective.enhanced_mask_decoder else 1
    rows = 4 * width**2 + 4 * width * (network.intermediate_size + length) + 2 * columns * width
    keys = 4 * width**2 + 2 * columns * width
    return (keys + share * passes * rows) / (keys + rows)


def _mlm_head_seconds(config: RunConfig, gpu: Gpu, precision: str, share: float) -> float:
    """The generator's head at masked slots; logits are computed twice."""
    network, vocabulary = config.generator, config.model.vocab_size
    width = network.word_embedding_size
    products = 2 * width * (3 * network.hidden_size + 4 * vocabulary)
    form = "compiled" if config.model.compile == "layer" else "torch"
    parts = _HEAD_BYTES["fused" if config.model.attention_backend == "triton" else form]
    moved = parts["forward"] + parts["backward"]
    if config.discriminator is not None:
        moved += parts["draws"]
    bandwidth = MEMORY_SHARE * gpu.memory_bytes_per_second
    return share * (products / _product_rate(gpu, precision) + moved * vocabulary / bandwidth)


def micro_step_seconds(
    config: RunConfig, gpu: Gpu, precision: str, *, micro_batch: int, length: int
) -> float:
    """Model forward and backward passes of one micro batch on one GPU.

    Args:
        config: The run.
        gpu: GPU type.
        precision: Of the DeepSpeed JSON.
        micro_batch: Sequences.
        length: Tokens in a sequence.

    Returns:
        Seconds; at least what launching the kernels takes.
    """
    tokens, weight_bytes = micro_batch * length, 4 if precision in ("fp32", "autocast") else 2
    computing = tokens * token_seconds(config, gpu, precision, length)
    kernels = sum(
        network.num_hidden_layers * LayerWork(config, network, length, gpu, precision).kernels()
        for network in config.networks.values()
    )
    # Dense gradients of the word tables: written, added to and read whatever the batch is.
    tables = sum(
        config.model.vocab_size * network.word_embedding_size * weight_bytes
        for network in config.networks.values()
    )
    bandwidth = MEMORY_SHARE * gpu.memory_bytes_per_second
    return max(computing, kernels * LAUNCH_SECONDS) + 6 * tables / bandwidth


def step_seconds(
    sharding: Sharding,
    engines: dict[str, EngineParameters],
    cluster: Cluster,
    *,
    micro_seconds: float,
    accumulation_steps: int,
    sent: dict[bool, float],
) -> StepSeconds:
    """Put a step together.

    Args:
        sharding: Layout of the parameters.
        engines: From `engine_parameters`.
        cluster: The GPUs.
        micro_seconds: Forward and backward passes of a micro batch.
        accumulation_steps: Micro steps of a step.
        sent: Bytes that a rank sends in a step, by whether DeepSpeed computes meanwhile.

    Returns:
        Seconds.
    """
    computing = accumulation_steps * micro_seconds
    owned = sum(sharding.owned_elements(g) for each in engines.values() for g in each.groups)
    elements = sum(each.elements for each in engines.values())
    bandwidth = MEMORY_SHARE * cluster.gpu.memory_bytes_per_second
    normed = elements if sharding.layout in ("replicated", "bf16") else owned
    summed = elements if sharding.stage < 2 else owned
    sums = (sharding.weight_bytes + 2 * sharding.sum_bytes) * summed * accumulation_steps
    update = (_UPDATE_BYTES + sharding.weight_bytes) * owned
    updating = (update + _NORM_BYTES * normed + sums) / bandwidth
    if sharding.config.offload_optimizer:
        copied = (FP32_BYTES + sharding.weight_bytes) * owned / PCIE_BYTES_PER_SECOND
        updating = copied + update / HOST_BYTES_PER_SECOND + sums / bandwidth
    ring = cluster.ring_bytes_per_second
    overlapped = sent.get(True, 0.0) / ring
    exposed = max(overlapped - computing, (1 - HIDDEN_SHARE) * overlapped)
    exposed += sent.get(False, 0.0) / ring
    return StepSeconds(
        computing=computing,
        updating=updating,
        communicating=sum(sent.values()) / ring,
        exposed=exposed,
    )
