"""Names and shapes of all parameters, as `pipeline.modeling` makes them, without making them.

A test holds them against the modules themselves, for every preset and every variant.

Letters: D hidden size, E width of the word table, F inner width, R relative rows, V vocabulary,
P positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from pipeline.config import NetworkSection, RunConfig

_NO_DECAY_NAMES = ("bias", "LayerNorm.weight")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a network."""

    name: str
    shape: tuple[int, ...]

    @cached_property
    def elements(self) -> int:
        """Its numbers."""
        return prod(self.shape)

    @cached_property
    def decays(self) -> bool:
        """Whether AdamW decays it: the rule of `pipeline.optimizer.parameter_groups`."""
        return not any(part in self.name for part in _NO_DECAY_NAMES)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied, as the weight of a Linear or of a convolution is."""
        is_table = self.name.endswith(("embeddings.weight", "embeddings._weight"))
        return len(self.shape) > 1 and not is_table


def _linear(name: str, inputs: int, outputs: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (outputs, inputs))
    yield Parameter(f"{name}.bias", (outputs,))


def _layer_norm(name: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,))
    yield Parameter(f"{name}.bias", (width,))


def _embedding_head(network: NetworkSection) -> Iterator[Parameter]:
    """What the embeddings of both networks have besides tables."""
    width, hidden = network.word_embedding_size, network.hidden_size
    if width != hidden:
        yield Parameter("deberta.embeddings.embed_proj.weight", (hidden, width))
    yield from _layer_norm("deberta.embeddings.LayerNorm", hidden)


def _encoder(network: NetworkSection) -> Iterator[Parameter]:
    """The layers, the relative table and the convolution."""
    width, inner, encoder = network.hidden_size, network.intermediate_size, "deberta.encoder"
    for number in range(network.num_hidden_layers):
        layer = f"{encoder}.layer.{number}"
        for projection in ("query_proj", "key_proj", "value_proj"):
            yield from _linear(f"{layer}.attention.self.{projection}", width, width)
        yield from _linear(f"{layer}.attention.output.dense", width, width)
        yield from _layer_norm(f"{layer}.attention.output.LayerNorm", width)
        yield from _linear(f"{layer}.intermediate.dense", width, inner)
        yield from _linear(f"{layer}.output.dense", inner, width)
        yield from _layer_norm(f"{layer}.output.LayerNorm", width)
    if network.relative_attention:
        yield Parameter(f"{encoder}.rel_embeddings.weight", (2 * network.position_buckets, width))
        yield from _layer_norm(f"{encoder}.LayerNorm", width)
    if network.conv_kernel_size:
        yield Parameter(f"{encoder}.conv.conv.weight", (width, width, network.conv_kernel_size))
        yield Parameter(f"{encoder}.conv.conv.bias", (width,))
        yield from _layer_norm(f"{encoder}.conv.LayerNorm", width)


def _generator(config: RunConfig) -> Iterator[Parameter]:
    network, vocabulary = config.generator, config.model.vocab_size
    width, tables = network.word_embedding_size, "deberta.embeddings"
    yield from _embedding_head(network)
    yield Parameter(f"{tables}.word_embeddings.weight", (vocabulary, width))
    if config.objective.enhanced_mask_decoder or network.position_biased_input:
        positions = (network.max_position_embeddings, width)
        yield Parameter(f"{tables}.position_embeddings.weight", positions)
    yield from _encoder(network)
    head = "lm_predictions.lm_head"
    yield Parameter(f"{head}.bias", (vocabulary,))
    yield from _linear(f"{head}.dense", network.hidden_size, width)
    yield from _layer_norm(f"{head}.LayerNorm", width)


def _discriminator(config: RunConfig, network: NetworkSection) -> Iterator[Parameter]:
    width, sharing = network.word_embedding_size, config.objective.embedding_sharing
    yield from _embedding_head(network)
    if sharing != "es":
        weight = "_weight" if sharing == "gdes" else "weight"
        table = (config.model.vocab_size, width)
        yield Parameter(f"deberta.embeddings.word_embeddings.{weight}", table)
        if network.position_biased_input:
            positions = (network.max_position_embeddings, width)
            yield Parameter(f"deberta.embeddings.position_embeddings.{weight}", positions)
    yield from _encoder(network)
    if config.objective.rtd_head == "debertav3":
        yield from _layer_norm("mask_predictions.LayerNorm", network.hidden_size)
    yield from _linear("mask_predictions.dense", network.hidden_size, network.hidden_size)
    yield from _linear("mask_predictions.classifier", network.hidden_size, 1)


def network_parameters(config: RunConfig) -> dict[str, list[Parameter]]:
    """List the parameters of each network.

    Args:
        config: The run.

    Returns:
        Network -> parameters, in the order of `named_parameters()` of its module.
    """
    networks = {"generator": [*_generator(config)]}
    if config.discriminator is not None:
        networks["discriminator"] = [*_discriminator(config, config.discriminator)]
    return networks


@dataclass(frozen=True)
class EngineParameters:
    """The parameters of one DeepSpeed engine."""

    ordered: tuple[Parameter, ...]
    """In the order of its module."""
    groups: tuple[tuple[Parameter, ...], ...]
    """In the order of its optimizer: of each network those that decay, then those that do not."""

    @cached_property
    def elements(self) -> int:
        """Their numbers, without padding."""
        return sum(parameter.elements for parameter in self.ordered)


def engine_parameters(config: RunConfig) -> dict[str, EngineParameters]:
    """Say which engine trains which parameters.

    Args:
        config: The run.

    Returns:
        "generator" and "discriminator", "generator" alone, or "joint" -> its parameters.
    """
    networks = network_parameters(config)
    engines = {name: [parameters] for name, parameters in networks.items()}
    if config.discriminator is not None and config.objective.update == "joint":
        engines = {"joint": [*networks.values()]}
    return {
        name: EngineParameters(
            tuple(parameter for network in trained for parameter in network),
            tuple(group for network in trained for group in _groups(network)),
        )
        for name, trained in engines.items()
    }


def _groups(parameters: list[Parameter]) -> Iterator[tuple[Parameter, ...]]:
    """Those that decay and those that do not; DeepSpeed removes a group without parameters."""
    for decays in (True, False):
        if group := tuple(each for each in parameters if each.decays == decays):
            yield group
