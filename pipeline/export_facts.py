"""What the cards of an export tell, gathered from the commit and from the run that it lies in."""

import dataclasses
import logging

from data_prep.errors import UserError
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.energy import cost_of
from pipeline.hf_layout import ExportDtype
from pipeline.model_card import ExportFacts, heldout_row
from pipeline.report.history import RunHistory, read_history
from pipeline.report.page import overview_panels

logger = logging.getLogger(__name__)


def export_facts(
    commit: Commit,
    config: RunConfig,
    dtype: ExportDtype,
    licence: str,
    averaged_steps: tuple[int, ...],
) -> ExportFacts:
    """Gather what the cards tell.

    Args:
        commit: What is exported; the newest where it is the mean of several.
        config: Its run.
        dtype: How weights are stored.
        licence: As the user said it.
        averaged_steps: Steps of the commits whose mean is exported; nothing where it is one.

    Returns:
        The facts.

    Raises:
        CorruptError: A file of the commit cannot be read.
    """
    saved = commit.read_json("train_state.json")
    identity = saved["identity"]
    environment = identity["environment"]
    history = _history_behind(commit)
    device = environment.get("device", "cpu")
    return ExportFacts(
        config=config,
        step=commit.step,
        tokens=saved["tokens"],
        averaged_steps=averaged_steps,
        dtype=dtype,
        dataset_fingerprint=identity["dataset_fingerprint"],
        dataset_command=identity["dataset"]["command"],
        tokenizer_fingerprint=identity["tokenizer_fingerprint"],
        versions=_package_versions(environment),
        cost=cost_of(
            history.rows if history else (),
            commit.step,
            identity["world_size"],
            environment.get("processor", "CPU") if device == "cpu" else device,
        ),
        licence=licence,
        history=history,
        heldout=heldout_row(commit.path.parent.parent / "metrics.jsonl", commit.step),
    )


def _history_behind(commit: Commit) -> RunHistory | None:
    """Read the run that a commit lies in; None without rows that can be drawn."""
    folder = commit.path.parent.parent
    try:
        history = read_history(folder, folder.name)
    except UserError as error:
        logger.warning("%s; the cards come without curves", error)
        return None
    rows = tuple(row for row in history.rows if row["step"] <= commit.step)
    history = dataclasses.replace(history, rows=rows)
    return history if overview_panels(history) else None


def _package_versions(environment: dict[str, str]) -> dict[str, str]:
    """Pick what a reader of the card can install."""
    packages = ("deberta-pretrain", "torch", "deepspeed", "python")
    return {name: environment[name] for name in packages if name in environment}
