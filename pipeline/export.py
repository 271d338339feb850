"""From a commit to two Hugging Face repositories, whole and proven, or nothing.

1. commit        the newest valid one of a run, or the one that is named; every byte hashed
                 (`export_commits`); others of the run on request, in folders beside it
2. tokenizer     the dataset's, and the one that the commit was trained with
3. write         OUTPUT.partial/{discriminator,generator}, on disk (`export_repositories`)
4. verify        transformers reloads both in a clean process (`export_verify`)
5. graphs        on request, of the encoder (`export_onnx`)
6. publish       rename to OUTPUT
"""

import dataclasses
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_prep.errors import UserError
from data_prep.shards import Dataset
from data_prep.tokenizer import Tokenizer
from pipeline.commit import Commit
from pipeline.config import RunConfig
from pipeline.config_loading import load_run_config
from pipeline.export_commits import find_commit, find_newest_commits, find_step_commits
from pipeline.export_facts import export_facts
from pipeline.export_onnx import OnnxForm, OnnxReport, check_onnx_packages, export_onnx
from pipeline.export_repositories import ARCHITECTURES, write_repositories
from pipeline.export_verify import Verification, verify_export
from pipeline.export_weights import DEFAULT_SHARD_SIZE, check_shard_size
from pipeline.hf_layout import ExportDtype, pair_from_tensors, repository_tensors
from pipeline.run_folder import fsync_file, fsync_folder
from pipeline.sequences import SequenceStream
from pipeline.weights import load_average_pair

_STEP = re.compile(r"step-\d{8,}")


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
    onnx: OnnxReport | None = None
    """Of the encoder's graphs, where they were asked for."""
    steps: dict[int, Verification] = field(default_factory=dict)
    """Commits that lie beside it, in folders `step-...`, and their proofs."""

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


def export_run(
    run_or_commit: Path,
    output: Path,
    *,
    dataset: Path | None = None,
    dtype: ExportDtype = "fp32",
    licence: str = "",
    average: int = 1,
    steps: Collection[int] | None = (),
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    onnx: Collection[OnnxForm] = (),
    force: bool = False,
) -> ExportReport:
    """Export a commit as two repositories, and others beside it, proven before they appear.

    Args:
        run_or_commit: A run folder (its newest valid commit) or a commit.
        output: Folder to make; `discriminator` and `generator` are made in it.
        dataset: Where the dataset is now; data.path of the run where None.
        dtype: How weights are stored.
        licence: For the cards, an identifier of the hub such as "mit"; empty leaves it open.
        average: Export the mean of the weights of so many of the run's newest commits.
        steps: Export the run's commits of these steps too, each into a folder as its own is named;
            all of them where None.
        max_shard_size: Largest file of weights, such as "5GB".
        onnx: Graphs to write of the encoder too; "int8" is written beside "fp32".
        force: Replace an earlier export.

    Returns:
        What was exported.

    Raises:
        UserError: An option or the output cannot be used, the dataset is not the run's, or the
            proof failed; no folder is left behind.
        CorruptError: The commit or the dataset is damaged.
    """
    check_shard_size(max_shard_size)
    if onnx:
        check_onnx_packages()
    _refuse_to_overwrite(output, force)
    commits = [find_commit(run_or_commit)]
    if average > 1:
        commits = find_newest_commits(run_or_commit, average)
    others = find_step_commits(run_or_commit, steps) if steps is None or steps else []
    config = load_run_config(str(commits[0].path / "config.resolved.json"))
    identity = commits[0].read_json("train_state.json")["identity"]
    data = open_tokenized(config, dataset, identity["tokenizer_fingerprint"])
    settings = _Settings(config, data, dtype, licence, max_shard_size)
    graphs = None
    with _published(output) as partial:
        parameters, verification = _export_weights(commits, partial, settings)
        if onnx:
            encoder = next(name for name in ARCHITECTURES if name in parameters)
            graphs = export_onnx(partial / encoder, int8="int8" in onnx)
        verifications = {}
        for commit in others:
            folder = partial / commit.path.name
            folder.mkdir()
            _, verifications[commit.step] = _export_weights([commit], folder, settings)
    newest = commits[0]
    return ExportReport(
        output, newest.path, newest.step, dtype, parameters, verification, graphs, verifications
    )


@dataclass(frozen=True)
class _Settings:
    """What all commits of an export share."""

    config: RunConfig
    data: Dataset
    dtype: ExportDtype
    licence: str
    max_shard_size: str


def _export_weights(
    commits: Sequence[Commit], folder: Path, settings: _Settings
) -> tuple[dict[str, int], Verification]:
    """Write the mean of some commits, the newest first; (parameters by network, proof)."""
    config, data, dtype = settings.config, settings.data, settings.dtype
    pair = load_average_pair(commits, config)
    tensors = repository_tensors(pair, config, dtype)
    averaged = tuple(each.step for each in commits) if len(commits) > 1 else ()
    facts = export_facts(commits[0], config, dtype, settings.licence, averaged)
    write_repositories(
        folder, commits[0], facts, data.tokenizer_folder, tensors, settings.max_shard_size
    )
    verification = verify_export(
        folder,
        pair if dtype == "fp32" else pair_from_tensors(config, tensors),
        tensors,
        config,
        stream=_any_sequences(data, config.data.sequence_length),
        tokenizer=Tokenizer.load(data.tokenizer_folder),
    )
    return {name: sum(t.numel() for t in part.values()) for name, part in tensors.items()}, (
        verification
    )


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
    if not all(name in ARCHITECTURES or _STEP.fullmatch(name) for name in names):
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
