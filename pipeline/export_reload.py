"""Reload exported repositories with transformers alone: a program for a process of its own.

    python -P export_reload.py REQUEST_FOLDER

It imports nothing of this project, so that what loads here loads for anybody. `export_verify`
writes the request and judges the answer:

    request.json       texts to tokenize, and for each repository its folder and its Auto class
    NAME.safetensors   batches: ids_N int64 [B, L], mask_N bool [B, L], and the trainer's states
                       float32_N and float64_N [B, L, D]
    answer.json        written here: keys that did not match, distances, token ids
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it

import torch
import transformers
from safetensors.torch import load_file


def largest_difference(model: Any, tensors: dict[str, torch.Tensor], dtype: str) -> float:
    """Compare hidden states on the tokens that are not padding.

    Args:
        model: A reloaded model in that dtype.
        tensors: Batches and expected states.
        dtype: "float32" or "float64".

    Returns:
        Largest absolute difference over all batches; NaN where a state is none.
    """
    differences = []
    for key in sorted(tensors):
        if key.startswith("ids_"):
            number = key.removeprefix("ids_")
            mask_BL = tensors[f"mask_{number}"]
            with torch.no_grad():
                output = model.base_model(tensors[key], attention_mask=mask_BL.long())
            distance_BLD = output.last_hidden_state - tensors[f"{dtype}_{number}"]
            differences.append(distance_BLD[mask_BL].abs().max())
    return torch.stack(differences).max().item()


def examine(repository: dict[str, str], texts: list[str], tensors: Path) -> dict[str, Any]:
    """Load one repository and describe what became of it.

    Args:
        repository: "folder" and "auto_class".
        texts: Texts to tokenize.
        tensors: File of batches and expected states.

    Returns:
        JSON-ready answer.
    """
    folder = repository["folder"]
    auto_class = getattr(transformers, repository["auto_class"])
    model, loading = auto_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    expected = load_file(tensors)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
        "float32": largest_difference(model, expected, "float32"),
        "float64": largest_difference(model.double(), expected, "float64"),
        "token_ids": [tokenizer(text)["input_ids"] for text in texts],
    }


def main() -> None:
    """Answer the request."""
    folder = Path(sys.argv[1])
    transformers.utils.logging.set_verbosity_error()
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    answer = {
        name: examine(repository, request["texts"], folder / f"{name}.safetensors")
        for name, repository in request["repositories"].items()
    }
    answer["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
