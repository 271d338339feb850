"""A commit in other forms: a summary, another number of rank files, one file a network.

    summarize     what a commit says about its run, from its JSON files and headers alone
    rewrite       the same state in the files of another number of ranks; a run can go on from it
    consolidate   whole tensors by parameter name, for other programs

A ZeRO stage is no property of a commit: its files hold elements of parameters and not a stage's
buffers, so every stage and world reads every commit, and nothing needs to be converted to resume.
One slice is in memory at a time. A new folder gets its name when all of it is on the disk.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_prep.errors import CorruptError, UserError
from pipeline.commit import Commit, commit_name, is_commit_name, read_manifest, sha256_of
from pipeline.commit_upkeep import free_bytes
from pipeline.commit_writer import describe_file, seal
from pipeline.config_loading import load_run_config
from pipeline.modeling.pair import NetworkPair
from pipeline.rank_files import KINDS, StateReader, slice_metadata, write_tensors
from pipeline.run_folder import fsync_file, fsync_folder, to_json, write_durably
from pipeline.schedule import learning_rate_factor

SUMMARY_FILE = "checkpoint.json"


def networks_of(manifest: dict[str, Any]) -> list[str]:
    """List the folders of a commit.

    Args:
        manifest: The commit's manifest.

    Returns:
        "generator" and "discriminator", "generator" alone, or "joint".
    """
    return sorted({name.split("/")[0] for name in manifest["files"] if "/" in name})


def summarize(commit: Commit) -> dict[str, Any]:
    """Collect what a commit says about its run.

    Args:
        commit: A verified commit.

    Returns:
        Plain values: step, tokens, parameters, learning rates, world, hashes, environment, config.

    Raises:
        CorruptError: The commit contradicts itself.
    """
    manifest = read_manifest(commit)
    resolved = commit.path / "config.resolved.json"
    config = load_run_config(str(resolved))
    saved = commit.read_json("train_state.json")
    try:
        state, identity = saved["state"], saved["identity"]
        factor = learning_rate_factor(max(commit.step - 1, 0), config.schedule)
        readers = {name: StateReader(commit.path / name) for name in networks_of(manifest)}
        return {
            "commit": str(commit.path),
            "step": commit.step,
            "tokens": saved["tokens"],
            "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
            "world_size": manifest["world_size"],
            "trained_by_world_size": identity["world_size"],
            "parameters": {
                name: sum(reader.count(key) for key in reader.names)
                for name, reader in readers.items()
            },
            "adam_step": {name: each["adam_step"] for name, each in saved["networks"].items()},
            "loss_scaler": {name: each["loss_scaler"] for name, each in saved["networks"].items()},
            "skipped_steps": state.get("skipped", {}),
            "learning_rate": {
                name: config.optimizer.learning_rate(name) * factor for name in config.networks
            },
            "state": state,
            "identity": identity,
            "manifest_sha256": sha256_of(commit.path / "manifest.json"),
            "files": manifest["files"],
            "config": commit.read_json("config.resolved.json"),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{commit.path}/train_state.json: lacks {error}") from error


def rewrite(
    commit: Commit, output: Path, world_size: int, progress: Callable[[], None] = lambda: None
) -> Commit:
    """Write the same state as the files of another number of ranks.

    Args:
        commit: A verified commit.
        output: The commit folder to make; in a run's checkpoints folder it has the step's name.
        world_size: Number of rank files of each network.
        progress: Called after every few megabytes.

    Returns:
        The new commit.

    Raises:
        UserError: The output exists, has another step's name, or cannot be written.
        CorruptError: The commit's files do not hold every element exactly once.
    """
    if is_commit_name(output.name) and output.name != commit_name(commit.step):
        raise UserError(
            f"{output}: a commit of step {commit.step} is named {commit_name(commit.step)}"
        )
    manifest = read_manifest(commit)
    with _new_folder(output, _total_bytes(manifest)) as partial:
        files = {}
        for name in manifest["files"]:
            if "/" not in name:
                shutil.copyfile(commit.path / name, partial / name)
                fsync_file(partial / name)
                files[name] = describe_file(partial / name)
        for network in networks_of(manifest):
            (partial / network).mkdir()
            reader = StateReader(commit.path / network)
            for rank in range(world_size):
                name = f"{network}/rank-{rank:05d}.safetensors"
                _write_rank(reader, partial / name, rank, world_size, progress)
                files[name] = describe_file(partial / name, progress)
        seal(partial, commit.step, world_size, files)
    return Commit(output, commit.step)


def _write_rank(
    reader: StateReader, path: Path, rank: int, world_size: int, progress: Callable[[], None]
) -> None:
    """Write an equal run of every parameter, as a rank of stage 3 owns it."""
    runs: dict[str, tuple[int, int]] = {}
    for name in reader.names:
        share = -(-reader.count(name) // world_size)
        start = min(rank * share, reader.count(name))
        count = min(share, reader.count(name) - start)
        if count:
            runs[name] = start, count

    def read(key: str) -> torch.Tensor:
        kind, _, name = key.partition("/")
        return reader.read(name, kind, *runs[name])

    shapes = {f"{kind}/{name}": (count,) for name, (_, count) in runs.items() for kind in KINDS}
    starts = {name: start for name, (start, _) in runs.items()}
    write_tensors(path, slice_metadata(starts), shapes, read, progress)
    fsync_file(path)


def consolidate(
    commit: Commit, output: Path, progress: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Write whole tensors: OUTPUT/NETWORK.safetensors with KIND/PARAMETER, and a summary beside.

    Args:
        commit: A verified commit.
        output: Folder to make.
        progress: Called after every few megabytes.

    Returns:
        File name -> bytes.

    Raises:
        UserError: The output exists or cannot be written.
        CorruptError: The commit's parameters are not those of its configuration.
    """
    config = load_run_config(str(commit.path / "config.resolved.json"))
    with torch.device("meta"):
        modules = NetworkPair(config).trained_modules()
    summary = {**summarize(commit), "kinds": KINDS}
    with _new_folder(output, summary["bytes"]) as partial:
        for network, module in modules.items():
            shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
            path = partial / f"{network}.safetensors"
            _write_whole(StateReader(commit.path / network), path, shapes, progress)
        write_durably(partial / SUMMARY_FILE, to_json(summary))
    return {path.name: path.stat().st_size for path in sorted(output.iterdir())}


def _write_whole(
    reader: StateReader,
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    progress: Callable[[], None],
) -> None:
    """Write all parameters of a network with their shapes."""
    reader.require_names(set(shapes))

    def read(key: str) -> torch.Tensor:
        kind, _, name = key.partition("/")
        return reader.read(name, kind, 0, torch.Size(shapes[name]).numel()).view(shapes[name])

    wanted = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in KINDS}
    for name, shape in shapes.items():
        if (count := reader.count(name)) != torch.Size(shape).numel():
            raise CorruptError(f"{path.name}: {name} has {count} elements, the model's {shape}")
    write_tensors(path, {"format": "pt"}, wanted, read, progress)
    fsync_file(path)


def _total_bytes(manifest: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


@contextmanager
def _new_folder(output: Path, needed_bytes: int) -> Iterator[Path]:
    """Give out `OUTPUT.partial`; it gets its name if the block succeeds, and goes if it fails."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; name a folder that does not")
    partial = output.with_name(output.name + ".partial")
    try:
        if partial.exists():  # of a conversion that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        if (free := free_bytes(partial)) < needed_bytes:
            raise UserError(
                f"{output} needs {needed_bytes:,} bytes and {free:,} bytes are free there"
            )
        yield partial
        fsync_folder(partial)
        partial.rename(output)
        fsync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
