"""A fine-tuned model as a folder that transformers loads and `deberta export-onnx` takes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_prep.errors import UserError
from pipeline.export_repositories import TOKENIZER_FILES


def check_place(folder: Path) -> None:
    """Refuse a folder that holds something, before anything is trained.

    Args:
        folder: Where models are to be saved.

    Raises:
        UserError: It is not empty, or no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--save {folder} is not an empty folder: choose another")


def save_model(model: Any, repository: Path, folder: Path, labels: Sequence[str]) -> None:
    """Save a fine-tuned model of transformers with its tokenizer.

    Args:
        model: On any device.
        repository: What it was fine-tuned from; its tokenizer is copied.
        folder: To make.
        labels: Names of the outputs, for `id2label`; none where they have no names.

    Raises:
        UserError: The folder cannot be written.
    """
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    try:
        model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (repository / name).is_file():
                shutil.copyfile(repository / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--save {folder}: cannot be written: {error}") from error
