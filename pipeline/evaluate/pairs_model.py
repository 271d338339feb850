"""Minimal pairs of a finished model: which of two sentences its networks find better, and in what.

    evaluate_pairs_model   a model and files of pairs -> PairsReport
    pairs_table            PairsReport -> one row a phenomenon

The scores are those that training probes with (`minimal_pairs`), of all pairs of the files. Files
of BLiMP say in three columns what a pair is about; each gives rows of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from data_prep.errors import UserError
from data_prep.tokenizer import Tokenizer
from pipeline.evaluate.figures import FIGURES, interval
from pipeline.evaluate.heldout_model import choose_device
from pipeline.evaluate.load import PretrainedModel, load_pretrained
from pipeline.evaluate.minimal_pairs import (
    GROUP_FIELDS,
    MinimalPairs,
    minimal_pair_scores,
    read_minimal_pairs,
    right_shares,
)
from pipeline.export import open_tokenized
from pipeline.masking import MaskingVocabulary
from pipeline.objective_keys import ObjectiveKeys
from pipeline.runtime import World


@dataclass(frozen=True)
class GroupReport:
    """The pairs that are about the same."""

    field: str
    """Column of the files; "" for all pairs."""
    value: str
    pairs: int
    accuracy: Mapping[str, float]
    """Network -> share of the pairs whose good sentence scores higher; equal ones count half."""
    interval: Mapping[str, tuple[float, float]]
    """Network -> where the share lies in 95 % of the draws of pairs."""


@dataclass(frozen=True)
class PairsReport:
    """Which sentences the networks of a model prefer."""

    model: str
    pairs_path: str
    step: int
    num_left_out: int
    """Pairs with a sentence that is longer than the model's or empty, or with equal ids."""
    groups: tuple[GroupReport, ...]
    """All pairs, then those of each value of each column."""

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values.
        """
        return asdict(self)


def evaluate_pairs_model(
    model: Path,
    path: Path,
    *,
    dataset: Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> PairsReport:
    """Score both sentences of every pair with both networks.

    Args:
        model: A run folder, a commit or an export.
        path: A .jsonl file, or a folder of them, as that of BLiMP.
        dataset: For a run or commit, where its dataset is now.
        batch_size: Sequences of the training's length in a pass; training's where None.
        device: "auto", "cpu" or "cuda".

    Returns:
        The shares of pairs that each network gets right.

    Raises:
        UserError: Model or files are unusable, or do not belong together.
        CorruptError: The model is damaged.
    """
    chosen = choose_device(device)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--minimal-pairs {path}: this folder has no .jsonl file")
    pretrained = load_pretrained(model)
    tokenizer = _tokenizer(pretrained, dataset)
    length = pretrained.config.data.sequence_length
    parts = [read_minimal_pairs(file, tokenizer, length) for file in files]
    pairs = tuple(pair for part in parts for pair in part.pairs)
    keys = ObjectiveKeys(
        pretrained.config.objective,
        pretrained.config.run.seed,
        length,
        MaskingVocabulary.from_tokenizer(tokenizer),
        "heldout",
    )
    scores = minimal_pair_scores(
        pretrained.pair.eval().to(chosen).predict,
        pairs,
        tokenizer.mask_id,
        keys.draw,
        (batch_size or pretrained.micro_batch_size) * length,
        World(rank=0, local_rank=0, world_size=1, device=chosen),
    )
    assert scores is not None, "an evaluation that nothing can stop was stopped"
    merged = MinimalPairs(pairs, tokenizer.mask_id, sum(part.num_left_out for part in parts))
    return PairsReport(
        model=str(pretrained.source),
        pairs_path=str(path),
        step=pretrained.step,
        num_left_out=merged.num_left_out,
        groups=_groups(merged, {name: right_shares(*both) for name, both in scores.items()}),
    )


def _tokenizer(pretrained: PretrainedModel, dataset: Path | None) -> Tokenizer:
    """Load the model's tokenizer: an export's own, or that of the run's dataset."""
    folder = pretrained.tokenizer_folder
    if folder is None:
        fingerprint = pretrained.tokenizer_fingerprint
        folder = open_tokenized(pretrained.config, dataset, fingerprint).tokenizer_folder
    return Tokenizer.load(folder)


def _groups(pairs: MinimalPairs, right: Mapping[str, torch.Tensor]) -> tuple[GroupReport, ...]:
    """Average over all pairs, and over those of each value of each column."""
    members: dict[tuple[str, str], list[int]] = {("", ""): list(range(len(pairs.pairs)))}
    for field in GROUP_FIELDS:
        found: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs.pairs):
            if value := dict(pair.labels).get(field):
                found.setdefault(value, []).append(index)
        members |= {(field, value): found[value] for value in sorted(found)}
    reports = []
    for (field, value), indices in members.items():
        rows = {name: right_P[indices].numpy()[:, None] for name, right_P in right.items()}
        accuracy = {name: float(np.mean(some)) for name, some in rows.items()}
        ends = {name: interval([some], FIGURES["accuracy"]) for name, some in rows.items()}
        reports.append(GroupReport(field, value, len(indices), accuracy, ends))
    return tuple(reports)


def pairs_table(report: PairsReport) -> Table:
    """Tabulate a report.

    Args:
        report: The shares.

    Returns:
        One row a group: shares of both networks with their intervals.
    """
    networks = list(report.groups[0].accuracy)
    table = Table(
        title=f"minimal pairs, step {report.step:,}",
        caption="share whose good sentence scores higher; interval: 95 % of draws of pairs; "
        f"{report.num_left_out:,} pairs cannot be used",
    )
    table.add_column("column", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("pairs", justify="right")
    for name in networks:
        table.add_column(name, justify="right")
    for group in report.groups:
        cells = [
            f"{group.accuracy[name]:.4f} ({group.interval[name][0]:.4f} .. "
            f"{group.interval[name][1]:.4f})"
            for name in networks
        ]
        table.add_row(group.field or "all", group.value, f"{group.pairs:,}", *cells)
    return table
