"""Networks that weights are taken from, and whether they fit the networks of a run.

    Donor           one network: tensors under our names, and the sizes that are known of it
    Source          what `initialize.path` is: one or two donors and their tokenizer
    disagreements   every size in which a donor and a network's section differ
    context_notes   what a longer context does to positions

A longer context is no disagreement: absolute positions and buckets have a rule each for it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config import NetworkSection
from pipeline.hf_layout import DELTA, POSITION_TABLE, WORD_TABLE, Tensors

RELATIVE_END = "relative_end"
"""A size that no section has: the distance at which the buckets end, max_relative_positions or,
where that is -1, max_position_embeddings."""
LAYER_NUMBER = re.compile(r"deberta\.encoder\.layer\.(\d+)\.")
_EXACT = (
    "hidden_size",
    "embedding_size",
    "num_attention_heads",
    "intermediate_size",
    "layer_norm_eps",
    "relative_attention",
    "position_buckets",
    "relative_position_rule",
    "position_biased_input",
    "conv_kernel_size",
    "conv_act",
)


@dataclass(frozen=True)
class Donor:
    """One network that weights are taken from."""

    source: str
    """File or commit, for messages."""
    weights: Tensors
    """By the names of our parameters. A discriminator may have its word table, its Delta to the
    generator's, both, or neither where it shared the generator's."""
    sizes: Mapping[str, Any]
    """Fields of NetworkSection as far as they are known, and RELATIVE_END."""
    problems: tuple[str, ...] = ()
    """What no section could agree with."""

    def has(self, head: str) -> bool:
        """Tell whether a head was saved with the network.

        Args:
            head: Beginning of its names.

        Returns:
            Whether there is a tensor of it.
        """
        return any(key.startswith(head) for key in self.weights)

    @property
    def num_rows(self) -> int | None:
        """Rows of the word table; None for a donor that has none of its own."""
        table = _word_table(self.weights)
        return None if table is None else table.shape[0]


@dataclass(frozen=True)
class Source:
    """What `initialize.path` is."""

    path: Path
    donors: Mapping[str, Donor]
    """"generator", "discriminator" or both."""
    tokenizer_fingerprint: str | None
    """SHA-256 of the spm.model that the networks learned with; None where it is unknown."""
    tokenizer_path: Path | None
    """Where that spm.model should be."""


def section_sizes(network: NetworkSection) -> dict[str, Any]:
    """List the sizes of a network of ours.

    Args:
        network: Its section.

    Returns:
        As in `Donor.sizes`.
    """
    end = network.last_relative_position + 1
    sizes = network.model_dump(include={*_EXACT, "num_hidden_layers", "max_position_embeddings"})
    if end >= network.max_position_embeddings:
        del sizes["relative_position_rule"]  # no distance is so far that it would tell
    return {**sizes, "embedding_size": network.word_embedding_size, RELATIVE_END: end}


def measured_sizes(weights: Tensors) -> dict[str, Any]:
    """Read from the shapes of tensors what they tell of their network.

    Args:
        weights: By our names, with at least one layer.

    Returns:
        As in `Donor.sizes`.
    """
    numbers = [int(match[1]) for key in weights if (match := LAYER_NUMBER.match(key))]
    sizes: dict[str, Any] = {"num_hidden_layers": max(numbers) + 1}
    if (table := _word_table(weights)) is not None:
        sizes["embedding_size"] = table.shape[1]
    relative = weights.get("deberta.encoder.rel_embeddings.weight")
    sizes["relative_attention"] = relative is not None
    if relative is not None:
        sizes["position_buckets"] = relative.shape[0] // 2
    inner = weights.get(f"deberta.encoder.layer.{min(numbers)}.intermediate.dense.weight")
    if inner is not None:
        sizes["intermediate_size"], sizes["hidden_size"] = inner.shape
    kernel = weights.get("deberta.encoder.conv.conv.weight")
    sizes["conv_kernel_size"] = 0 if kernel is None else kernel.shape[-1]
    if POSITION_TABLE in weights:
        sizes["max_position_embeddings"] = weights[POSITION_TABLE].shape[0]
    return sizes


def _word_table(weights: Tensors) -> torch.Tensor | None:
    """A word table, or the Delta to one."""
    return weights.get(WORD_TABLE, weights.get(DELTA))


def disagreements(
    name: str, network: NetworkSection, donor: Donor, may_be_shallower: bool
) -> list[str]:
    """Find every size in which a donor differs from the network that it should become.

    Args:
        name: "generator" or "discriminator".
        network: Its section.
        donor: What is there.
        may_be_shallower: The network may have fewer layers and takes the first ones.

    Returns:
        A line for each, with the cure.
    """
    wanted = section_sizes(network)
    lines = dict.fromkeys(f"{donor.source}: {problem}" for problem in donor.problems)
    # The file's own shapes last: what config.json says of them may be wrong.
    for found in (donor.sizes, measured_sizes(donor.weights)):
        for key in _meaningful(wanted, found):
            if wanted[key] != found[key]:
                lines[_line(name, key, wanted[key], found[key], donor.source)] = None
        if (layers := found.get("num_hidden_layers")) is not None:
            have = wanted["num_hidden_layers"]
            if have != layers and not (may_be_shallower and have < layers):
                lines[_line(name, "num_hidden_layers", have, layers, donor.source)] = None
        lines |= dict.fromkeys(_disagreeing_reach(name, network, found, donor.source))
    return list(lines)


def _meaningful(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that both sides have and that mean something for the network."""
    for key in _EXACT:
        if key not in wanted or key not in found:
            continue
        has_none = key in ("position_buckets", "relative_position_rule")
        if has_none and not wanted["relative_attention"]:
            continue
        if key == "conv_act" and not wanted["conv_kernel_size"]:
            continue
        yield key


def _disagreeing_reach(
    name: str, network: NetworkSection, found: Mapping[str, Any], source: str
) -> Iterator[str]:
    """A context that would shrink, and buckets that would end elsewhere for no reason."""
    longest, old_longest = network.max_position_embeddings, found.get("max_position_embeddings")
    if old_longest is not None and longest < old_longest:
        yield (
            f"{name}.max_position_embeddings is {longest}, shorter than the {old_longest} of "
            f"{source}: set {name}.max_position_embeddings={old_longest}; data.sequence_length may "
            "be shorter"
        )
    end, old_end = network.last_relative_position + 1, found.get(RELATIVE_END)
    if not network.relative_attention or old_end is None or end == old_end:
        return
    grows = old_longest is not None and longest > old_longest
    if not (grows and end == longest):
        yield (
            f"{name}.max_relative_positions makes the buckets end at {end}, those of {source} end "
            f"at {old_end}: set {name}.max_relative_positions={old_end}"
        )


def _line(name: str, key: str, wanted: Any, found: Any, source: str) -> str:
    return f"{name}.{key} is {wanted}, {source} has {found}: set {name}.{key}={_toml(found)}"


def _toml(value: Any) -> str:
    """Write a value as the command line wants it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def context_notes(name: str, network: NetworkSection, donor: Donor) -> Iterator[str]:
    """Say what becomes of positions where the context grows.

    Args:
        name: "generator" or "discriminator".
        network: Its section.
        donor: Agrees with it.

    Yields:
        Notes.
    """
    found = {**donor.sizes, **measured_sizes(donor.weights)}
    longest, old_longest = network.max_position_embeddings, found.get("max_position_embeddings")
    if old_longest is None or longest <= old_longest:
        return
    if POSITION_TABLE in donor.weights:
        yield (
            f"{name}: positions {old_longest} to {longest - 1} repeat the rows of the first "
            f"{old_longest}, because rows that were learned tell neighbours apart from the first "
            "step on, and fresh ones would have to learn to"
        )
    if not network.relative_attention:
        return
    end, old_end = network.last_relative_position + 1, found.get(RELATIVE_END, old_longest)
    if end == old_end:
        yield (
            f"{name}: the buckets of relative positions end at {end} as learned; farther tokens "
            f"count as {end - 1} away"
            if network.relative_position_rule == "clamp"
            else f"{name}: the buckets of relative positions end at {end} as learned, and by "
            "relative_position_rule=transformers all keys too far ahead read a row that was never "
            "trained"
        )
        return
    yield (
        f"{name}: the buckets of relative positions are stretched from {old_end} to {end}: "
        f"distances above {network.position_buckets // 2} get other rows than they had, also in "
        f"short sequences; {name}.max_relative_positions={old_end} keeps the learned ones"
    )
