"""The files of an exported repository: configuration, weights, tokenizer, card.

OUTPUT/discriminator/   config.json, weights, tokenizer files, README.md,
OUTPUT/generator/       pretraining_config.json; the same files in both
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.commit import Commit
from pipeline.export_weights import write_weights
from pipeline.hf_layout import Tensors, repository_config
from pipeline.model_card import CURVES, ExportFacts, model_card
from pipeline.report.drawing import write_png
from pipeline.report.page import overview

PRETRAINING_CONFIG = "pretraining_config.json"
RTD_MODULE = "modeling_rtd.py"
"""The class that uses the discriminator's head, for people who have transformers alone."""
_RTD_CLASSES = {"AutoModelForPreTraining": "modeling_rtd.DebertaV2ForReplacedTokenDetection"}
ARCHITECTURES = {"discriminator": "DebertaV2Model", "generator": "DebertaV2ForMaskedLM"}
TOKENIZER_FILES = (
    "spm.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def write_repositories(
    folder: Path,
    commit: Commit,
    facts: ExportFacts,
    tokenizer_folder: Path,
    tensors: dict[str, Tensors],
    max_shard_size: str,
) -> None:
    """Write every file of both repositories.

    Args:
        folder: Gets a folder for each network.
        commit: What is exported; the newest where it is the mean of several.
        facts: For the cards.
        tokenizer_folder: The dataset's.
        tensors: By network, as from `repository_tensors`.
        max_shard_size: Largest file of weights, such as "5GB".

    Raises:
        UserError: A file of the tokenizer is missing.
    """
    config, dtype = facts.config, facts.dtype
    resolved = commit.read_json("config.resolved.json")
    export = {
        "step": facts.step,
        "averaged_steps": list(facts.averaged_steps),
        "dtype": dtype,
        "dataset_fingerprint": facts.dataset_fingerprint,
        "tokenizer_fingerprint": facts.tokenizer_fingerprint,
    }
    for name, network in config.networks.items():
        repository, architecture = folder / name, ARCHITECTURES[name]
        repository.mkdir()
        values = repository_config(network, config.model.vocab_size, architecture, dtype)
        if name == "discriminator":
            # Under no other Auto class, so that all the others work without code of ours.
            values |= {"rtd_head": config.objective.rtd_head, "auto_map": _RTD_CLASSES}
            # Read, not imported: it would import transformers.
            shutil.copyfile(Path(__file__).with_name(RTD_MODULE), repository / RTD_MODULE)
        _write_json(repository / "config.json", values)
        write_weights(tensors[name], repository, max_shard_size)
        for weights in repository.glob("*.safetensors"):
            # safetensors lets only the owner read what it writes; other files follow the umask.
            shutil.copymode(repository / "config.json", weights)
        _write_json(repository / PRETRAINING_CONFIG, {**resolved, "export": export})
        copy_tokenizer(tokenizer_folder, repository, network.max_position_embeddings)
        parameters = sum(tensor.numel() for tensor in tensors[name].values())
        if facts.history is not None:
            write_png(overview(facts.history), repository / CURVES)
        card = model_card(name, facts, parameters)
        (repository / "README.md").write_text(card, encoding="utf-8")


def copy_tokenizer(source: Path, repository: Path, max_length: int) -> None:
    """Copy the tokenizer, with the model's own longest sequence.

    Args:
        source: Folder of the tokenizer.
        repository: The folder.
        max_length: In tokens.

    Raises:
        UserError: A file is missing.
    """
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise UserError(
                f"{source / name} is missing, without which transformers cannot tokenize: build "
                "the dataset again with `deberta-prep build`, and name it with --dataset"
            )
        shutil.copyfile(source / name, repository / name)
    path = repository / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {**values, "model_max_length": max_length})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
