"""Reload exported repositories with transformers alone: a program for a process of its own.

    python -P export_reload.py REQUEST_FOLDER

It imports nothing of this project, so that what loads here loads for anybody. `export_verify`
writes the request and judges the answer:

    request.json       texts to tokenize, and for each repository its folder and its Auto class
    NAME.safetensors   batches: ids_N int64 [B, L], mask_N bool [B, L], the trainer's states
                       states_float32_N and states_float64_N [B, L, D], and of a discriminator its
                       scores_float32_N and scores_float64_N [B, L]
    answer.json        written here: keys that did not match, distances, token ids
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it

import torch
import transformers
from safetensors.torch import load_file


def largest_difference(
    compute: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], prefix: str
) -> float:
    """Compare what a reloaded model computes on the tokens that are not padding.

    Args:
        compute: Gives states or scores for ids and a mask.
        tensors: Batches and what is expected.
        prefix: Which tensors are expected, such as "states_float32".

    Returns:
        Largest absolute difference over all batches; NaN where a number is none.
    """
    differences = []
    for key in sorted(tensors):
        if key.startswith("ids_"):
            number = key.removeprefix("ids_")
            mask_BL = tensors[f"mask_{number}"]
            with torch.no_grad():
                found = compute(tensors[key], attention_mask=mask_BL.long())
            distances = (found - tensors[f"{prefix}_{number}"])[mask_BL]
            differences.append(distances.abs().max())
    return torch.stack(differences).max().item()


def differences(
    model: Any, expected: dict[str, torch.Tensor], kind: str, part: Callable, field: str
) -> dict[str, float]:
    """Compare in both precisions.

    Args:
        model: Reloaded, in fp32; it is in fp64 afterwards.
        expected: Batches and what is expected.
        kind: "states" or "scores".
        part: Takes the module that is called from the model.
        field: Of its output.

    Returns:
        "KIND_DTYPE" -> largest difference.
    """
    answer = {}
    for dtype in ("float32", "float64"):
        module = part(model.eval().to(getattr(torch, dtype)))

        def compute(*given: Any, module: Any = module, **named: Any) -> torch.Tensor:
            return getattr(module(*given, **named), field)

        answer[f"{kind}_{dtype}"] = largest_difference(compute, expected, f"{kind}_{dtype}")
    return answer


def examine(repository: dict[str, str], texts: list[str], tensors: Path) -> dict[str, Any]:
    """Load one repository and describe what became of it.

    Args:
        repository: "folder" and "auto_class"; "rtd_class" where its head is to be used too.
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
    expected = load_file(tensors)
    answer = differences(model, expected, "states", lambda m: m.base_model, "last_hidden_state")
    if "rtd_class" in repository:
        rtd_class = getattr(transformers, repository["rtd_class"])
        model = rtd_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
        answer |= differences(model, expected, "scores", lambda m: m, "logits")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {
        **answer,
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
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
