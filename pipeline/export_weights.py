"""The weights of an exported repository: one safetensors file, or shards and an index of them.

write_weights   model.safetensors, or model-00001-of-00002.safetensors, ... and
                model.safetensors.index.json, as huggingface_hub divides them
read_tensors    reads either form back
"""

import json
import re
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from data_prep.errors import UserError
from pipeline.hf_layout import WEIGHTS_FILE, Tensors
from pipeline.initialize.weight_files import read_weights

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
DEFAULT_SHARD_SIZE = "5GB"
"""As huggingface_hub divides by default."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*[KMGT]B", re.IGNORECASE)


def check_shard_size(size: str) -> None:
    """Refuse a size that huggingface_hub would not understand.

    Args:
        size: Such as "500MB"; the units are powers of 1,000.

    Raises:
        UserError: It is none, or nothing.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(
            f"--max-shard-size {size}: give a number above 0 and its unit, KB, MB, GB or TB, for "
            'example "2GB"'
        )


def write_weights(tensors: Tensors, repository: Path, max_shard_size: str) -> None:
    """Write the weights in files of at most a given size.

    Args:
        tensors: Key -> contiguous tensor; no two share storage.
        repository: The folder.
        max_shard_size: Largest file, such as "5GB"; a tensor above it has a file of its own.

    Raises:
        UserError: The size is none.
        SafetensorError: A file cannot be written.
    """
    check_shard_size(max_shard_size)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        path = repository / name
        save_file({key: tensors[key] for key in keys}, path, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (repository / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_tensors(repository: Path) -> Tensors:
    """Read the weights of an exported repository.

    Args:
        repository: Folder with model.safetensors, or with an index and its shards.

    Returns:
        key -> tensor, as stored.

    Raises:
        UserError: There is no such file.
        CorruptError: A file is not whole, or a shard lacks what the index says.
    """
    for name in (WEIGHTS_FILE, INDEX_FILE):
        if (repository / name).is_file():
            return read_weights(repository / name)
    raise UserError(
        f"{repository / WEIGHTS_FILE}: no such file; name a folder written by `deberta export`"
    )
