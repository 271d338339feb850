"""Weights as other programs write them: safetensors or torch's .bin, in one file or in shards.

Nothing that is read here is executed: a .bin goes through torch's loader of tensors alone, and a
file that needs more is refused by its name.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_prep.errors import CorruptError, UserError
from pipeline.config_files import read_json
from pipeline.hf_layout import Tensors


def read_weights(file: Path) -> Tensors:
    """Read all tensors of a model.

    Args:
        file: A .safetensors file, a .bin file, or the .index.json of either's shards.

    Returns:
        Name -> tensor on the CPU, both as stored.

    Raises:
        UserError: There is no such file, or it needs more than tensors.
        CorruptError: It is not whole.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix == ".json":
        return _read_shards(file)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)


def _read_shards(index: Path) -> Tensors:
    """Read the files that an index names; each must hold what the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(f, str) for f in places.values()):
        raise UserError(f"{index}: weight_map, from tensor to file, is missing or no such map")
    weights: Tensors = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name.endswith(".json"):
            raise UserError(f"{index}: names the shard {name!r}, which is no file beside it")
        weights |= read_weights(index.parent / name)
    if lost := sorted(set(places) - set(weights)):
        raise CorruptError(f"{index}: its shards lack {', '.join(lost)}; copy the model again")
    return weights


def _read_safetensors(file: Path) -> Tensors:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{file}: not a whole safetensors file ({error})") from error


def _read_bin(file: Path) -> Tensors:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds Python objects beside its tensors; such a file can run "
            "any program and is not loaded: convert it to model.safetensors where that may do no "
            "harm"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        first_line = str(error).partition("\n")[0] or "it ends early"
        raise CorruptError(f"{file}: not a whole file of torch ({first_line})") from error
    strangers = [type(content).__name__]
    if isinstance(content, Mapping):
        strangers = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)]
    if strangers:
        raise UserError(
            f"{file} must map names to tensors and holds something else ({', '.join(strangers)}): "
            "save the model's state_dict() alone"
        )
    return dict(content)
