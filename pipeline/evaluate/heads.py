"""Models to fine-tune: transformers' own.

Letters: B examples, L sequence length.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_prep.errors import UserError


@contextmanager
def loaded_from(repository: Path) -> Iterator[None]:
    """Say of a repository that transformers refuses what is wrong with it.

    Args:
        repository: The folder.

    Raises:
        UserError: transformers raised something inside.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{repository}: its weights are damaged, or hold Python objects beside the tensors; "
            "such a file can run any program and is not loaded: convert it to model.safetensors "
            "where that may do no harm"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{repository}: transformers cannot load this model ({reason}); name a run, an export, "
            "or a DeBERTa-v2/v3 repository"
        ) from error


def build_model(
    repository: Path, start: str, head: str, num_labels: int, dropout: float | None = None
) -> Any:
    """Build the model of a task, with pre-trained or random weights.

    Args:
        repository: Folder with config.json and weights.
        start: "pretrained" or "random"; the head is random in both.
        head: Name of the class, as in `Kind.head`.
        num_labels: Outputs of the head, where it can have any number.
        dropout: In front of the head's last layer; the model's own where None.

    Returns:
        The model in fp32, on the CPU.

    Raises:
        UserError: transformers cannot load the repository.
    """
    import transformers  # costs seconds to import

    transformers.utils.logging.set_verbosity_error()  # the new head's missing weights are no news
    transformers.utils.logging.disable_progress_bar()
    auto_class = getattr(transformers, head)
    with loaded_from(repository):
        if start == "pretrained":
            model = auto_class.from_pretrained(
                repository, num_labels=num_labels, dtype=torch.float32, trust_remote_code=False
            )
        else:
            config = transformers.AutoConfig.from_pretrained(
                repository, num_labels=num_labels, trust_remote_code=False
            )
            model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if dropout is not None and hasattr(model, "dropout"):
        model.dropout.p = dropout
    return model
