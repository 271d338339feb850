"""What is compared before a run goes on from a commit, and what somebody may accept.

    configuration   `pipeline.resume_rules` judges every changed key; refused ones can be accepted
                    by --accept-config-change, impossible ones cannot
    data            another dataset is explained from what the commit keeps about its own, and can
                    be accepted by --accept-data-change; another tokenizer cannot
    the rest        ranks, versions, device, threads: named, because the state of a commit fits
                    every one of them (`pipeline.engine_state`), but rounds otherwise
    learning rate   shown where the next steps have another one than the commit's schedule says

What was accepted is a line of restarts.jsonl and a part of every later commit, with the values
before and after, and is told by the banner of this start and of every later one.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.ds_config import DeepSpeedConfig, load_deepspeed_config
from pipeline.findings import show
from pipeline.rate_table import rate_lines
from pipeline.resume_rules import (
    ACCEPT_CONFIG,
    Verdict,
    changed_deepspeed_keys,
    changed_keys,
    refuse_changes,
)
from pipeline.train_state import TrainState

ACCEPT_DATA = "--accept-data-change"
_NOT_COMPARED = {"host", "slurm_job_id"}


@dataclass(frozen=True)
class Accepts:
    """Which refusals the user has overruled for this start."""

    config_change: bool = False
    data_change: bool = False


ACCEPTS_NOTHING = Accepts()


@dataclass(frozen=True)
class Accepted:
    """One difference that a run went on with because somebody said so."""

    key: str
    """Dotted path, or dataset_fingerprint."""
    old: Any
    new: Any
    step: int
    """Completed optimizer steps at which it took effect."""
    details: tuple[str, ...] = ()
    """Of the data: what is different."""

    def __str__(self) -> str:
        return (
            f"accepted at step {self.step:,}: {self.key} was {show(self.old)}, then"
            f" {show(self.new)}"
        )


@dataclass(frozen=True)
class Comparison:
    """What a start has to say about the commit that it goes on from."""

    notes: list[str] = field(default_factory=list)
    """What keeps it from being bit for bit the run that the commit came from."""
    accepted: list[Accepted] = field(default_factory=list)
    """By this start."""
    accepted_before: list[Accepted] = field(default_factory=list)
    """By the starts that the commit came from."""
    rates: list[str] = field(default_factory=list)
    """Learning rates of the coming steps, where they are not those of the commit's schedule."""

    @property
    def accepted_so_far(self) -> list[Accepted]:
        """What the numbers from here on depend on beside the configuration."""
        return self.accepted_before + self.accepted


def compare_with_commit(
    commit: Commit,
    config: RunConfig,
    ds: DeepSpeedConfig,
    *,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    accepts: Accepts,
) -> Comparison:
    """Refuse to continue another run, and name what keeps a resume from being bit for bit.

    Args:
        commit: What would be continued.
        config: What the user asks for.
        ds: The DeepSpeed JSON given now.
        before: Identity stored in the commit.
        now: Identity of this start.
        accepts: What the user has overruled.

    Returns:
        Notes, accepted differences, and learning rates that differ.

    Raises:
        UserError: Data or configuration belong to another run.
    """
    old_config, old_ds = _configuration_of(commit, before, now)
    changes = changed_keys(old_config, config, commit.step)
    changes += changed_deepspeed_keys(old_ds, ds)
    notes = refuse_changes(
        config.run.folder, changes, is_accepted=accepts.config_change, flag=ACCEPT_CONFIG
    )
    accepted = [
        Accepted(change.path, change.old, change.new, commit.step)
        for change in changes
        if change.verdict is Verdict.REFUSED
    ]
    accepted += _compare_data(commit, config, before, now, accepts)
    notes += _other_world(before, now)
    rates = rate_lines(old_config, config, commit.step)
    earlier = [
        Accepted(**{**values, "details": tuple(values["details"])})
        for values in before.get("accepted", [])
    ]
    return Comparison(notes, accepted, earlier, rates)


def _configuration_of(
    commit: Commit, before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[RunConfig, DeepSpeedConfig]:
    """Read a commit's configuration; a newer program may have written keys that this one lacks."""
    resolved = str(commit.path / "config.resolved.json")
    try:
        return load_run_config(resolved), load_deepspeed_config(resolved)
    except UserError as error:
        raise UserError(f"{error}\n{_versions(commit, before, now)}") from error


def _versions(commit: Commit, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Who wrote a commit that cannot be read, and who tried to read it."""
    theirs, ours = (each["environment"].get("deberta-pretrain") for each in (before, now))
    return (
        f"{commit.path} was written by deberta-pretrain {theirs}, this is {ours}: resume with the "
        "version that wrote it, or start a new run with initialize.path"
    )


def restored_state(commit: Commit, saved: Mapping[str, Any], now: Mapping[str, Any]) -> TrainState:
    """Read the trainer's state from a commit.

    Args:
        commit: The commit.
        saved: Its train_state.json.
        now: Identity of this start.

    Returns:
        The state; what an older version did not write yet has its first value.

    Raises:
        UserError: A newer version wrote values that this one would forget.
    """
    unknown = saved["state"].keys() - {each.name for each in fields(TrainState)}
    if unknown:
        raise UserError(
            f"{commit.path}/train_state.json holds {', '.join(sorted(unknown))}, which this "
            f"version does not know\n{_versions(commit, saved['identity'], now)}"
        )
    return TrainState(**saved["state"])


def _compare_data(
    commit: Commit,
    config: RunConfig,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    accepts: Accepts,
) -> list[Accepted]:
    """Refuse other data, or say what was accepted."""
    tokenizer, dataset = "tokenizer_fingerprint", "dataset_fingerprint"
    path = f"data.path {config.data.path} is not the data that {commit.path} was trained on"
    if before[tokenizer] != now[tokenizer]:
        raise UserError(
            f"{path} ({tokenizer} {now[tokenizer][:12]}, then {before[tokenizer][:12]}): ids mean "
            "other pieces, which no flag can accept; give the same dataset, or start a new run "
            "with another run.folder and initialize.path, initialize.new_vocabulary=resize"
        )
    if before[dataset] == now[dataset]:
        return []
    details = tuple(data_differences(before.get("dataset"), now["dataset"]))
    if not accepts.data_change:
        raise UserError(
            f"{path} ({dataset} {now[dataset][:12]}, then {before[dataset][:12]}):"
            + "".join(f"\n  - {line}" for line in details)
            + "\ngive the same dataset, or start a new run with another run.folder, or go on with "
            f"the new data by {ACCEPT_DATA}"
        )
    return [Accepted(dataset, before[dataset], now[dataset], commit.step, details)]


def data_differences(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Iterator[str]:
    """Explain how two datasets differ.

    Args:
        before: What the commit keeps (`pipeline.run_data.summarize_dataset`); None in a commit of
            an older version.
        now: The same of the dataset given now.

    Yields:
        One line for each difference.
    """
    if before is None:
        yield "the commit is of an older version and keeps nothing but the fingerprint of its data"
        return
    if before["train"]["content"] == now["train"]["content"]:
        yield "the tokens to train on are the same, byte for byte"
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            yield f"{key} was {_shown(old.get(key))} and is now {_shown(new.get(key))}"


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Words for a value and the value, without the hashes that say nothing beside their split."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key} ")
        else:
            yield f"{path}{key}", value


def _shown(value: Any) -> str:
    """Write a number with its thousands, and nothing as nothing."""
    if value is None:
        return "nothing"
    return f"{value:,}" if isinstance(value, int) else show(value)


def _other_world(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Name other ranks, versions and machines."""
    if before["world_size"] != now["world_size"]:
        yield (
            f"{now['world_size']} ranks instead of {before['world_size']}: the same samples, masks "
            "and draws; losses agree closely and not bit for bit"
        )
    old, new = before["environment"], now["environment"]
    for key in sorted(set(old) | set(new)):
        if key not in _NOT_COMPARED and key in old and old[key] != new.get(key):
            changed = f"{key} was {old[key]} and is now {new.get(key)}"
            yield f"{changed}: not bit for bit the same from here"


def record_accepted(restarts: Path, accepted: list[Accepted]) -> None:
    """Append what was accepted to restarts.jsonl, on disk before anything is trained with it.

    Args:
        restarts: The run's restarts.jsonl.
        accepted: Of this start; nothing is written where it is empty.
    """
    if not accepted:
        return
    line = json.dumps({"unix_seconds": time.time(), "accepted": [asdict(a) for a in accepted]})
    with restarts.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
