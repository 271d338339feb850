"""Run folders written by hand, in the documented layout, and engines that need no DeepSpeed.

Trained weights of a tiny run are close to their start: Delta is small, biases are zero, LayerNorms
are ones. Here everything is random, so that a tensor left out or put elsewhere shows.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from data_prep.shards import Dataset
from pipeline.checkpoint import CheckpointStore
from pipeline.commit import list_commits
from pipeline.config import CheckpointSection, RunConfig
from pipeline.modeling.pair import NetworkPair
from tests.reference.small_networks import scramble

NETWORK = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "position_buckets": 12,
    "layer_norm_eps": 1e-3,  # large enough to be seen
}


def run_config(dataset: Path, run_folder: Path, **sections: dict) -> RunConfig:
    """A run whose networks differ in depth; `sections` replace or add whole sections."""
    return RunConfig.model_validate(
        {
            "run": {"folder": str(run_folder), "seed": 5},
            "data": {"path": str(dataset), "sequence_length": 40},
            "model": {"vocab_size": Dataset.open(dataset).manifest.vocab_size},
            "generator": NETWORK,
            "discriminator": {**NETWORK, "num_hidden_layers": 3},
            "optimizer": {"generator_learning_rate": 1e-3},
            "schedule": {"max_steps": 100, "warmup_steps": 10},
            "evaluation": {"max_sequences": 8},
            **sections,
        }
    )


def random_pair(config: RunConfig, seed: int) -> NetworkPair:
    """Networks with all their weights random."""
    pair = NetworkPair(config)
    scramble(pair.generator, seed)
    if pair.discriminator is not None:
        scramble(pair.discriminator, seed + 1)
    return pair.eval()


def write_commit(config: RunConfig, step: int, pair: NetworkPair | None = None) -> Path:
    """Write a commit of two ranks into the run's folder."""
    commit = Path(config.run.folder) / "checkpoints" / f"step-{step:08d}"
    networks = (pair or random_pair(config, step)).trained_modules()
    for folder_name, network in networks.items():
        folder = commit / folder_name
        folder.mkdir(parents=True)
        for rank in range(2):
            starts, tensors = {}, {}
            for name, parameter in network.named_parameters():
                flat = parameter.detach().flatten()
                middle = flat.numel() // 3
                part = flat[:middle] if rank == 0 else flat[middle:]
                starts[name] = rank * middle
                for kind, factor in (("weight", 1.0), ("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
                    tensors[f"{kind}/{name}"] = part.clone() * factor
            save_file(
                tensors,
                folder / f"rank-{rank:05d}.safetensors",
                metadata={"starts": json.dumps(starts)},
            )
    dataset = Dataset.open(config.data.path)
    identity = {
        "dataset_fingerprint": dataset.fingerprint,
        "dataset": {"command": "deberta-prep build a|b"},
        "tokenizer_fingerprint": dataset.manifest.tokenizer_fingerprint,
        "world_size": 2,
        "environment": {"torch": "0.0-test", "python": "3.0-test", "host": "secret-host"},
    }
    resolved = {
        "format": 1,
        "run_config": config.model_dump(mode="json"),
        "deepspeed_config": {},
        "batch": {"train_micro_batch_size_per_gpu": 4, "tokens_per_step": 320},
    }
    state = {
        "state": {"step": step, "skipped": {name: 3 for name in networks}},
        "networks": {name: {"adam_step": step - 3, "loss_scaler": {}} for name in networks},
        "identity": identity,
        "tokens": step * 320,
    }
    (commit / "train_state.json").write_text(json.dumps(state))
    (commit / "config.resolved.json").write_text(json.dumps(resolved))
    _seal(commit, step)
    return commit


def _seal(commit: Path, step: int) -> None:
    files = {
        str(path.relative_to(commit)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in commit.rglob("*")
        if path.is_file()
    }
    manifest = {"format_version": 1, "step": step, "world_size": 2, "files": files}
    (commit / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((commit / "manifest.json").read_bytes()).hexdigest()
    (commit / "manifest.sha256").write_text(digest + "\n")


def reseal(commit: Path, **changes) -> None:
    """Rewrite the manifest with a valid seal, as somebody who means harm would."""
    manifest = {**json.loads((commit / "manifest.json").read_text()), **changes}
    (commit / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((commit / "manifest.json").read_bytes()).hexdigest()
    (commit / "manifest.sha256").write_text(digest + "\n")


def relist(commit: Path, *names: str) -> None:
    """Put files into the manifest as they are now, whoever wrote them, and seal it."""
    files = json.loads((commit / "manifest.json").read_text())["files"]
    for name in names:
        content = (commit / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(commit, files=files)


def plain_engine(seed: int = 0) -> SimpleNamespace:
    """What a DeepSpeed engine of stage 0 looks like to checkpoints, around a plain AdamW."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return SimpleNamespace(
        module=module,
        optimizer=optimizer,
        zero_optimization_stage=lambda: 0,
        fp16_enabled=lambda: False,
    )


def take_step(engine: SimpleNamespace) -> None:
    """Change every weight and both averages."""
    engine.module(torch.ones(2, 7)).square().sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


CONFIG = '{"format": 1}\n'
"""What a commit of plain engines has as its configuration."""


def store(folder, *, on_published=None, on_progress=lambda: None, **section) -> CheckpointStore:
    """The store of a single rank; `section` is of [checkpoint]."""
    return CheckpointStore(
        folder,
        CheckpointSection(**section),
        0,
        None,
        on_published=on_published,
        on_progress=on_progress,
    )


def state(step) -> dict:
    """A train_state.json."""
    return {"state": {"step": step}}


def steps(folder) -> list[int]:
    """Steps of the commits in a folder."""
    return [commit.step for commit in list_commits(folder)]


def left_behind(folder) -> set[str]:
    """Names in a folder that are no commit."""
    known = {"latest", *(commit.path.name for commit in list_commits(folder))}
    return {path.name for path in folder.iterdir()} - known


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def flip_a_byte(path: Path) -> None:
    """Damage a file in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def padded_ids(vocab_size: int, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of ids and their mask: bool, False at padding."""
    ids = torch.randint(4, vocab_size, (3, length), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(length) < torch.tensor([[length], [length - 11], [3]])
    return ids * mask, mask
