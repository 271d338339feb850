"""Our networks <-> Hugging Face repositories: names, configuration and the merged tables.

    discriminator   deberta.* with word_embeddings.weight = E_D, mask_predictions.*
    generator       deberta.* with word_embeddings.weight = E_G and, where the network has them,
                    position_embeddings.weight; lm_predictions.lm_head.*

Parameter names are transformers' own, so that nearly everything is a copy. E_D is E_G + Delta
(merged here in fp32, the way training adds it, and nowhere else), E_G itself, or the
discriminator's own table; the way back is Delta := E_D - E_G, without which a model that goes on
training would start with E_D = E_G. A table narrower than the layers needs transformers' other head
of a masked language model, `cls.predictions`, which alone can be narrow.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from data_prep.errors import CorruptError, UserError
from pipeline.config import NetworkSection, RunConfig
from pipeline.modeling.pair import NetworkPair

ExportDtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
WEIGHTS_FILE = "model.safetensors"
WORD_TABLE = "deberta.embeddings.word_embeddings.weight"
POSITION_TABLE = "deberta.embeddings.position_embeddings.weight"
RELATIVE_TABLE = "deberta.encoder.rel_embeddings.weight"
DELTA = "deberta.embeddings.word_embeddings._weight"
POSITION_DELTA = "deberta.embeddings.position_embeddings._weight"
_SHARED = {WORD_TABLE: DELTA, POSITION_TABLE: POSITION_DELTA}
_NARROW_HEAD = {
    "lm_predictions.lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_predictions.lm_head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
    "lm_predictions.lm_head.bias": "cls.predictions.bias",
}
_OURS_ALONE = {"embedding_size", "relative_position_rule", "conv_kernel_size", "conv_act"}
"""Fields that config.json leaves out, or has only where they say something."""
Tensors = dict[str, torch.Tensor]


def repository_config(
    network: NetworkSection, vocab_size: int, architecture: str, dtype: ExportDtype
) -> dict[str, Any]:
    """Describe a network as transformers' DebertaV2Config does.

    Args:
        network: The network's section.
        vocab_size: Rows of the word table.
        architecture: Class that the repository is meant for.
        dtype: How the weights are stored.

    Returns:
        Content of config.json; the fields and values of the released V3 repositories.
    """
    relative = network.relative_attention
    values: dict[str, Any] = {
        "model_type": "deberta-v2",
        "architectures": [architecture],
        "vocab_size": vocab_size,
        **network.model_dump(exclude=_OURS_ALONE),
        "hidden_act": "gelu",
        "pos_att_type": "p2c|c2p" if relative else "",
        "share_att_key": relative,
        "norm_rel_ebd": "layer_norm" if relative else "none",
        "type_vocab_size": 0,
        "pad_token_id": 0,
        "pooler_hidden_size": network.hidden_size,
        "pooler_hidden_act": "gelu",
        "pooler_dropout": 0,
        # transformers 5.17 and 5.20 look for a tied matrix that the head of legacy=false does not
        # have, and fail; that head reads the word table itself, tied or not.
        "tie_word_embeddings": _is_narrow(network),
        "legacy": _is_narrow(network),
        "dtype": str(TORCH_DTYPES[dtype]).removeprefix("torch."),
    }
    if _is_narrow(network):
        values["embedding_size"] = network.embedding_size
    if network.conv_kernel_size:
        values["conv_kernel_size"] = network.conv_kernel_size
        values["conv_act"] = network.conv_act
    return values


def _is_narrow(network: NetworkSection) -> bool:
    return network.word_embedding_size != network.hidden_size


def repository_tensors(
    pair: NetworkPair, config: RunConfig, dtype: ExportDtype
) -> dict[str, Tensors]:
    """Name the weights of the networks as transformers does, with the shared tables merged.

    Args:
        pair: fp32.
        config: The run.
        dtype: What every tensor is rounded to, after the merge.

    Returns:
        "discriminator" (not with objective.task=mlm) and "generator": key -> contiguous tensor; in
        fp32 all but the merged tables are the networks' own storage.

    Raises:
        UserError: A weight is not finite, or is too large for the dtype.
    """
    ours = {"generator": _weights(pair.generator)}
    if pair.discriminator is not None:
        ours = {"discriminator": _weights(pair.discriminator), **ours}
        _merge(ours["discriminator"], ours["generator"], config)
    for name, network in config.networks.items():
        if network.clamps_distances:
            _clamp_for_transformers(ours[name])
    if _is_narrow(config.generator):
        ours["generator"] = _renamed(ours["generator"], _NARROW_HEAD)
    return {
        name: {key: _rounded(f"{name}: {key}", tensor, dtype) for key, tensor in tensors.items()}
        for name, tensors in ours.items()
    }


def _clamp_for_transformers(tensors: Tensors) -> None:
    """Make transformers, which does not clamp distances, compute what a clamped network does.

    Keys too far ahead read row 0 there, which no clamped network ever trains, and row 1 here; too
    far behind, both read the last row.
    """
    table_RD = tensors[RELATIVE_TABLE].clone()
    table_RD[0] = table_RD[1]
    tensors[RELATIVE_TABLE] = table_RD


def _merge(theirs: Tensors, base: Tensors, config: RunConfig) -> None:
    """Complete the discriminator's tables by the law of embedding sharing."""
    sharing = config.objective.embedding_sharing
    for table, delta in _discriminator_tables(config).items():
        if sharing == "gdes":
            theirs[table] = base[table] + theirs.pop(delta)
        elif sharing == "es":
            # A copy: safetensors refuses storage that two names share.
            theirs[table] = base[table].clone()


def _discriminator_tables(config: RunConfig) -> dict[str, str]:
    """Tables that the discriminator's repository has, and the names of their Deltas."""
    assert config.discriminator is not None
    biased = config.discriminator.position_biased_input
    return {table: delta for table, delta in _SHARED.items() if biased or table != POSITION_TABLE}


def _renamed(tensors: Tensors, prefixes: Mapping[str, str]) -> Tensors:
    """Replace the beginnings of names."""
    renamed = {}
    for key, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = tensor
    return renamed


def pair_from_tensors(
    config: RunConfig, tensors: Mapping[str, Tensors], dtype: torch.dtype = torch.float32
) -> NetworkPair:
    """Rebuild the networks from the weights of their repositories.

    Args:
        config: The run that the weights come from.
        tensors: As from `repository_tensors`.
        dtype: fp32 or fp64, of the networks; the tensors are widened before Delta is formed.

    Returns:
        The networks, on the CPU.

    Raises:
        CorruptError: A tensor is missing, unknown or of another shape.
    """
    pair = NetworkPair(config).to(dtype)
    wide = {
        name: {key: tensor.to(dtype) for key, tensor in weights.items()}
        for name, weights in tensors.items()
    }
    if _is_narrow(config.generator):
        ours = {theirs: ours for ours, theirs in _NARROW_HEAD.items()}
        wide["generator"] = _renamed(wide["generator"], ours)
    if pair.discriminator is not None:
        _split(wide["discriminator"], wide["generator"], config)
    for name in config.networks:
        try:
            pair.get_submodule(name).load_state_dict(wide[name])
        except RuntimeError as error:
            raise CorruptError(
                f"{name}/{WEIGHTS_FILE} does not hold the weights that pretraining_config.json "
                f"describes; export again ({error})"
            ) from error
    return pair


def _split(theirs: Tensors, base: Tensors, config: RunConfig) -> None:
    """Undo `_merge`."""
    sharing = config.objective.embedding_sharing
    for table, delta in _discriminator_tables(config).items():
        for name, weights in (("discriminator", theirs), ("generator", base)):
            if table not in weights:
                raise CorruptError(f"{name}/{WEIGHTS_FILE}: {table} is missing; export again")
        if sharing == "gdes":
            theirs[delta] = theirs.pop(table) - base[table]
        elif sharing == "es":
            del theirs[table]


def _weights(network: nn.Module) -> Tensors:
    """Parameters by name, without gradients."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def _rounded(where: str, tensor: torch.Tensor, dtype: ExportDtype) -> torch.Tensor:
    """Round one tensor, and refuse what is not a number afterwards."""
    rounded = tensor.to(TORCH_DTYPES[dtype]).contiguous()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{where} holds values that are not finite: export an earlier commit")
    if not torch.isfinite(rounded).all():
        largest = tensor.abs().max().item()
        raise UserError(f"{where} holds {largest:.3g}, too large for {dtype}: use --dtype bf16")
    return rounded
