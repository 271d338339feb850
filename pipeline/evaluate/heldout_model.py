"""Held-out figures of a finished model: those that training logs, in one process.

Sequences, masks and draws are functions of the run's seed, so that the figures of a commit are
those of its row in metrics.jsonl: to rounding where training computed in fp32, and without the
rounding of bf16 or fp16 where it did not.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.heldout import evaluate_heldout
from pipeline.evaluate.load import load_pretrained
from pipeline.export import open_tokenized
from pipeline.masking import MaskingVocabulary
from pipeline.objective_keys import ObjectiveKeys
from pipeline.runtime import World
from pipeline.sequences import SequenceStream


@dataclass(frozen=True)
class HeldoutReport:
    """Held-out figures and what they were measured on."""

    model: str
    dataset: str
    dataset_fingerprint: str
    step: int
    sequences: int
    sequence_length: int
    figures: dict[str, float]
    """`eval/*` as in metrics.jsonl; losses in nats."""

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values.
        """
        return asdict(self)


def choose_device(name: str) -> torch.device:
    """Choose where to compute.

    Args:
        name: "auto" (a GPU if there is one), "cpu" or "cuda".

    Returns:
        The device.

    Raises:
        UserError: There is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def evaluate_heldout_model(
    model: Path,
    dataset: Path,
    *,
    max_sequences: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> HeldoutReport:
    """Measure both networks of a model on the held-out split of a dataset.

    Args:
        model: A run folder, a commit or an export.
        dataset: Made with the model's tokenizer; the run's own gives the run's own figures.
        max_sequences: Held-out sequences to read; evaluation.max_sequences of the run where None.
        batch_size: Sequences in a forward pass; training's where None. Changes rounding only.
        device: "auto", "cpu" or "cuda".

    Returns:
        The figures.

    Raises:
        UserError: Model or dataset are unusable, or do not belong together.
        CorruptError: One of them is damaged.
    """
    chosen = choose_device(device)
    pretrained = load_pretrained(model)
    config = pretrained.config
    length = config.data.sequence_length
    data = open_tokenized(config, dataset, pretrained.tokenizer_fingerprint)
    stream = SequenceStream(data, "heldout", length)
    if stream.num_sequences == 0:
        raise UserError(
            f"{dataset} holds nothing out: build it with `deberta-prep build --heldout-fraction`"
        )
    vocabulary = MaskingVocabulary.from_tokenizer(Tokenizer.load(data.tokenizer_folder))
    pair = pretrained.pair.eval().to(chosen)
    count = max_sequences or config.evaluation.max_sequences
    figures = evaluate_heldout(
        pair.predict,
        stream=stream,
        keys=ObjectiveKeys(config.objective, config.run.seed, length, vocabulary, "heldout"),
        chosen={"": np.arange(min(count, stream.num_sequences), dtype=np.int64)},
        batch_size=batch_size or pretrained.micro_batch_size,
        world=World(rank=0, local_rank=0, world_size=1, device=chosen),
    )
    assert figures is not None, "an evaluation that nothing can stop was stopped"
    return HeldoutReport(
        model=str(pretrained.source),
        dataset=str(dataset),
        dataset_fingerprint=data.fingerprint,
        step=pretrained.step,
        sequences=min(count, stream.num_sequences),
        sequence_length=length,
        figures=figures,
    )
