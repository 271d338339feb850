"""What a MODEL on the command line can be, and the two things that evaluation makes of it.

a run folder, one of its commits     networks from the commit; exported first for fine-tuning
an export, or one of its folders     networks rebuilt from both repositories
any DeBERTa-v2/v3 repository         for fine-tuning: config.json, weights and spm.model

load_pretrained        the networks in fp32, for held-out figures
encoder_repository     a folder that transformers loads, for fine-tuning
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.config_files import read_json
from pipeline.config_loading import load_run_config
from pipeline.export import export_run, find_commit
from pipeline.export_repositories import PRETRAINING_CONFIG
from pipeline.export_weights import read_tensors
from pipeline.hf_layout import pair_from_tensors
from pipeline.modeling.pair import NetworkPair
from pipeline.weights import load_commit_pair

_REPOSITORIES = ("discriminator", "generator")


@dataclass(frozen=True)
class PretrainedModel:
    """The networks of a run at some step, in fp32 on the CPU."""

    source: Path
    """The commit or export that was read."""
    config: RunConfig
    pair: NetworkPair
    step: int
    micro_batch_size: int
    """Sequences in a forward pass of the training."""
    tokenizer_fingerprint: str
    tokenizer_folder: Path | None = None
    """Where an export keeps its tokenizer; that of a commit is its dataset's."""


def load_pretrained(model: Path) -> PretrainedModel:
    """Load both networks.

    Args:
        model: A run folder (its newest valid commit), a commit, an export, or a folder of one.

    Returns:
        The networks and what evaluation must know of their training.

    Raises:
        UserError: The path is none of these.
        CorruptError: A file is damaged.
    """
    root = _export_root(model)
    if root is None:
        return _from_commit(model)
    present = [n for n in _REPOSITORIES if (root / n / PRETRAINING_CONFIG).is_file()]
    document = root / present[0] / PRETRAINING_CONFIG
    config, values = load_run_config(str(document)), read_json(document)
    missing = [name for name in config.networks if name not in present]
    if missing:
        raise UserError(
            f"{root / missing[0]} is missing: held-out figures and minimal pairs need the "
            "discriminator and the generator of an export side by side; fine-tuning (--train, "
            "--test) needs one of them"
        )
    if "export" not in values:
        raise UserError(f"{document}: the block `export` is missing; export the run again")
    tensors = {name: read_tensors(root / name) for name in config.networks}
    return PretrainedModel(
        root,
        config,
        pair_from_tensors(config, tensors),
        step=values["export"]["step"],
        micro_batch_size=values["batch"]["train_micro_batch_size_per_gpu"],
        tokenizer_fingerprint=values["export"]["tokenizer_fingerprint"],
        tokenizer_folder=root / present[0],
    )


def _from_commit(model: Path) -> PretrainedModel:
    """Load the networks of a run or commit."""
    commit = find_commit(model)
    document = commit.path / "config.resolved.json"
    config = load_run_config(str(document))
    return PretrainedModel(
        commit.path,
        config,
        load_commit_pair(commit, config),
        step=commit.step,
        micro_batch_size=read_json(document)["batch"]["train_micro_batch_size_per_gpu"],
        tokenizer_fingerprint=commit.read_json("train_state.json")["identity"][
            "tokenizer_fingerprint"
        ],
    )


def _export_root(model: Path) -> Path | None:
    """Find the folder that holds both repositories; None for what is no export."""
    if (model / PRETRAINING_CONFIG).is_file():
        return model.resolve().parent
    is_root = any((model / name / PRETRAINING_CONFIG).is_file() for name in _REPOSITORIES)
    return model if is_root else None


@contextmanager
def encoder_repository(model: Path, dataset: Path | None = None) -> Iterator[Path]:
    """Provide a folder that transformers loads as an encoder.

    Args:
        model: A run folder or commit (exported to a temporary folder first), an export, or a
            folder with config.json and spm.model.
        dataset: For a run or commit, where its dataset is now.

    Yields:
        The folder; of an export it is the discriminator's, where there is one, unless the
        generator's was named.

    Raises:
        UserError: The path is none of these.
        CorruptError: A file is damaged.
    """
    for name in _REPOSITORIES:
        if (model / name / "config.json").is_file():
            yield model / name
            return
    if (model / "config.json").is_file():
        if not (model / "spm.model").is_file():
            raise UserError(f"{model / 'spm.model'} is missing: text cannot be tokenized without")
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="deberta-evaluate-") as folder:
        output = Path(folder) / "export"
        yield export_run(model, output, dataset=dataset).encoder
