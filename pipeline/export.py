"""From a commit to two Hugging Face repositories, whole and proven, or nothing.

1. commit        the newest valid one of a run, or the one that is named; every byte hashed
2. tokenizer     the dataset's, and the one that the commit was trained with
3. write         OUTPUT.partial/{discriminator,generator}, on disk (`export_repositories`)
4. verify        transformers reloads both in a clean process (`export_verify`)
5. publish       rename to OUTPUT
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_prep.errors import CorruptError, UserError
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.commit import Commit, list_commits, read_manifest, verify_commit
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.export_facts import export_facts
from pipeline.export_repositories import ARCHITECTURES, write_repositories
from pipeline.export_verify import Verification, verify_export
from pipeline.export_weights import DEFAULT_SHARD_SIZE, check_shard_size
from pipeline.hf_layout import ExportDtype, pair_from_tensors, repository_tensors
from pipeline.run_folder import fsync_file, fsync_folder
from pipeline.sequences import SequenceStream
from pipeline.weights import load_average_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how it was proven."""

    output: Path
    commit: Path
    step: int
    dtype: ExportDtype
    parameters: dict[str, int]
    """Parameters by network."""
    verification: Verification

    @property
    def encoder(self) -> Path:
        """The repository for downstream tasks: the discriminator's, where there is one."""
        return self.output / next(name for name in ARCHITECTURES if name in self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Convert for JSON.

        Returns:
            Plain values.
        """
        paths = {"output": str(self.output), "commit": str(self.commit)}
        return {**dataclasses.asdict(self), **paths}


def find_commit(run_or_commit: Path) -> Commit:
    """Find and verify the commit that a path means.

    Args:
        run_or_commit: A run folder, its checkpoints folder, or one commit.

    Returns:
        The commit; of a run the newest one whose every byte is as written, and what was passed
        over is named in the log.

    Raises:
        UserError: There is no commit.
        CorruptError: The commit that is named, or every commit of the run, is damaged.
    """
    path = run_or_commit
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder or one of its checkpoints")
    if (path / "manifest.json").is_file() or (path / "train_state.json").is_file():
        commit = Commit(path, 0)
        verify_commit(commit)
        return Commit(path, int(read_manifest(commit)["step"]))
    commits = list_commits(path / "checkpoints") or list_commits(path)
    if not commits:
        raise UserError(
            f"{path}: neither a run folder with a checkpoint nor a checkpoint; a run's first is "
            "written after checkpoint.interval_steps"
        )
    problems = []
    for commit in reversed(commits):
        try:
            verify_commit(commit)
        except CorruptError as error:
            logger.warning("%s; the checkpoint before it is used", error)
            problems.append(str(error))
        else:
            return commit
    raise CorruptError("no checkpoint is whole:\n  " + "\n  ".join(problems))


def find_newest_commits(run: Path, count: int) -> list[Commit]:
    """Find and verify the newest commits of a run, to average them.

    Args:
        run: A run folder, or its checkpoints folder.
        count: How many, at least 1.

    Returns:
        The commits, the newest first; damaged ones are passed over and named in the log.

    Raises:
        UserError: There are not so many.
    """
    found: list[Commit] = []
    for commit in reversed(list_commits(run / "checkpoints") or list_commits(run)):
        try:
            verify_commit(commit)
        except CorruptError as error:
            logger.warning("%s; the checkpoint before it is used", error)
        else:
            found.append(commit)
        if len(found) == count:
            return found
    raise UserError(
        f"{run}: has {len(found)} whole checkpoints, and {count} are to be averaged: name a run "
        "folder with as many (checkpoint.keep_last, checkpoint.milestone_interval_steps), or "
        "average fewer"
    )


def export_run(
    run_or_commit: Path,
    output: Path,
    *,
    dataset: Path | None = None,
    dtype: ExportDtype = "fp32",
    licence: str = "",
    average: int = 1,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    force: bool = False,
) -> ExportReport:
    """Export a commit as two repositories, proven before they appear.

    Args:
        run_or_commit: A run folder (its newest valid commit) or a commit.
        output: Folder to make; `discriminator` and `generator` are made in it.
        dataset: Where the dataset is now; data.path of the run where None.
        dtype: How weights are stored.
        licence: For the cards, an identifier of the hub such as "mit"; empty leaves it open.
        average: Export the mean of the weights of so many of the run's newest commits.
        max_shard_size: Largest file of weights, such as "5GB".
        force: Replace an earlier export.

    Returns:
        What was exported.

    Raises:
        UserError: An option or the output cannot be used, the dataset is not the run's, or the
            proof failed; no folder is left behind.
        CorruptError: The commit or the dataset is damaged.
    """
    check_shard_size(max_shard_size)
    _refuse_to_overwrite(output, force)
    averaged = find_newest_commits(run_or_commit, average) if average > 1 else []
    commit = averaged[0] if averaged else find_commit(run_or_commit)
    config = load_run_config(str(commit.path / "config.resolved.json"))
    identity = commit.read_json("train_state.json")["identity"]
    data = open_tokenized(config, dataset, identity["tokenizer_fingerprint"])
    pair = load_average_pair(averaged or [commit], config)
    tensors = repository_tensors(pair, config, dtype)
    parameters = {name: sum(t.numel() for t in part.values()) for name, part in tensors.items()}
    reference = pair if dtype == "fp32" else pair_from_tensors(config, tensors)
    with _published(output) as partial:
        steps = tuple(each.step for each in averaged)
        facts = export_facts(commit, config, dtype, licence, steps)
        write_repositories(partial, commit, facts, data.tokenizer_folder, tensors, max_shard_size)
        verification = verify_export(
            partial,
            reference,
            tensors,
            config,
            stream=_any_sequences(data, config.data.sequence_length),
            tokenizer=Tokenizer.load(data.tokenizer_folder),
        )
    return ExportReport(output, commit.path, commit.step, dtype, parameters, verification)


def open_tokenized(config: RunConfig, dataset: Path | None, fingerprint: str) -> Dataset:
    """Open a dataset and insist that its ids mean what the model learned.

    Args:
        config: The run.
        dataset: The dataset; data.path of the run where None.
        fingerprint: Of the tokenizer that the model was trained with.

    Returns:
        The open dataset.

    Raises:
        UserError: There is none, or it has another tokenizer.
        CorruptError: It is damaged.
    """
    path = Path(config.data.path) if dataset is None else dataset
    if dataset is None and not path.is_dir():
        raise UserError(
            f"the run's dataset {path} (data.path) is not there; say where it is now with --dataset"
        )
    opened = Dataset.open(path)
    found = opened.manifest.tokenizer_fingerprint
    if found != fingerprint:
        raise UserError(
            f"{path} was made with another tokenizer (spm.model {found[:12]}) than the model "
            f"({fingerprint[:12]}): name a dataset made with the model's tokenizer"
        )
    return opened


def _any_sequences(data: Dataset, sequence_length: int) -> SequenceStream:
    """Choose the held-out sequences, or the training ones where nothing is held out."""
    heldout = SequenceStream(data, "heldout", sequence_length)
    return heldout if heldout.num_sequences else SequenceStream(data, "train", sequence_length)


def _refuse_to_overwrite(output: Path, force: bool) -> None:
    """Keep what is there, unless it is an earlier export that may go."""
    if not output.exists():
        return
    if not force:
        raise UserError(f"{output} exists: choose another folder, or replace it with --force")
    names = {path.name for path in output.iterdir()} if output.is_dir() else {""}
    if not names <= set(ARCHITECTURES):
        raise UserError(
            f"{output} is not an earlier export, and --force replaces nothing else: choose another "
            "folder"
        )


@contextmanager
def _published(output: Path) -> Iterator[Path]:
    """Give a `.partial` folder that becomes the output where the block ends without an error."""
    partial = output.with_name(output.name + ".partial")
    replaced = output.with_name(output.name + ".replaced")
    try:
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            (fsync_folder if path.is_dir() else fsync_file)(path)
        fsync_folder(partial)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        fsync_folder(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{partial} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
