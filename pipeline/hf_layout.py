"""Our networks <-> Hugging Face repositories: names, configuration and the one merged table.

    discriminator   deberta.* with word_embeddings.weight = E_G + Delta, mask_predictions.*
    generator       deberta.* with word_embeddings.weight = E_G and position_embeddings.weight,
                    lm_predictions.lm_head.*

Parameter names are transformers' own, so that everything but the discriminator's word table is a
copy. That table is merged here in fp32, the way training adds it, and nowhere else; the way back is
Delta := E_D - E_G, without which a model that goes on training would start with E_D = E_G.

Letters: D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_prep.errors import CorruptError, UserError
from pipeline.config import NetworkSection, RunConfig
from pipeline.modeling.networks import Discriminator, Generator

ExportDtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
WEIGHTS_FILE = "model.safetensors"
WORD_TABLE = "deberta.embeddings.word_embeddings.weight"
DELTA = "deberta.embeddings.word_embeddings._weight"
Tensors = dict[str, torch.Tensor]


def repository_config(
    network: NetworkSection, vocab_size: int, architecture: str, dtype: ExportDtype
) -> dict[str, Any]:
    """Describe a network as transformers' DebertaV2Config.

    Args:
        network: The network's section.
        vocab_size: Rows of the word table.
        architecture: Class that the repository is meant for.
        dtype: How the weights are stored.

    Returns:
        Content of config.json; the fields and values of the released V3 repositories.
    """
    return {
        "model_type": "deberta-v2",
        "architectures": [architecture],
        "vocab_size": vocab_size,
        **network.model_dump(),
        "hidden_act": "gelu",
        "relative_attention": True,
        "max_relative_positions": -1,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pad_token_id": 0,
        "pooler_hidden_size": network.hidden_size,
        "pooler_hidden_act": "gelu",
        "pooler_dropout": 0,
        "tie_word_embeddings": True,
        # transformers' other head of a masked language model has other names: it would be random.
        "legacy": False,
        "dtype": str(TORCH_DTYPES[dtype]).removeprefix("torch."),
    }


def repository_tensors(
    generator: Generator, discriminator: Discriminator, dtype: ExportDtype
) -> dict[str, Tensors]:
    """Name the weights of both networks as transformers does, with the word tables merged.

    Args:
        generator: fp32.
        discriminator: fp32.
        dtype: What every tensor is rounded to, after the merge.

    Returns:
        "discriminator" and "generator": key -> contiguous tensor; in fp32 all but the merged table
        are the networks' own storage.

    Raises:
        UserError: A weight is not finite, or is too large for the dtype.
    """
    ours = {"discriminator": _weights(discriminator), "generator": _weights(generator)}
    delta_VD = ours["discriminator"].pop(DELTA)
    ours["discriminator"][WORD_TABLE] = ours["generator"][WORD_TABLE] + delta_VD
    return {
        name: {key: _rounded(f"{name}: {key}", tensor, dtype) for key, tensor in tensors.items()}
        for name, tensors in ours.items()
    }


def networks_from_tensors(
    config: RunConfig, tensors: Mapping[str, Tensors], dtype: torch.dtype = torch.float32
) -> tuple[Generator, Discriminator]:
    """Rebuild both networks from the weights of their repositories.

    Args:
        config: The run that the weights come from.
        tensors: "discriminator" and "generator", as from `repository_tensors`.
        dtype: fp32 or fp64, of the networks; the tensors are widened before Delta is formed.

    Returns:
        The generator and the discriminator, on the CPU.

    Raises:
        CorruptError: A tensor is missing, unknown or of another shape.
    """
    generator = Generator(config.generator, config.model).to(dtype)
    discriminator = Discriminator(config.discriminator, config.model).to(dtype)
    theirs = {key: tensor.to(dtype) for key, tensor in tensors["discriminator"].items()}
    base = {key: tensor.to(dtype) for key, tensor in tensors["generator"].items()}
    for name, weights in (("discriminator", theirs), ("generator", base)):
        if WORD_TABLE not in weights:
            raise CorruptError(f"{name}/{WEIGHTS_FILE}: {WORD_TABLE} is missing; export again")
    theirs[DELTA] = theirs.pop(WORD_TABLE) - base[WORD_TABLE]
    for name, network, weights in (
        ("generator", generator, base),
        ("discriminator", discriminator, theirs),
    ):
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise CorruptError(
                f"{name}/{WEIGHTS_FILE} does not hold the weights that pretraining_config.json "
                f"describes; export again ({error})"
            ) from error
    return generator, discriminator


def read_tensors(repository: Path) -> Tensors:
    """Read the weights of an exported repository.

    Args:
        repository: Folder with model.safetensors.

    Returns:
        key -> tensor, as stored.

    Raises:
        UserError: There is no such file.
        CorruptError: The file is no whole safetensors file.
    """
    path = repository / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a folder written by `deberta export`")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{path}: not a whole safetensors file ({error})") from error


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
